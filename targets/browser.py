"""A browser as a device: headless Chromium of this machine, or whatever browser opens an address on the local network.

The runtime is onnxruntime-web. The page and its agent are `browser_page.html` and `browser_agent.mjs`.
"""

import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import segno

from potstill.targets.browser_job import BrowserJob
from potstill.targets.device import BrokenOff, Kind
from potstill.targets.local import too_slow
from potstill.validate.errors import InputError, Unreachable
from potstill.validate.files import short_folder

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get install chromium, or Chrome from its maker"
FLAGS = (
    "--headless",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-renderer-backgrounding",
    "--disable-sync",
)
_OPEN_S = 60  # for Chromium to start and take the request
_RETURN_S = 10  # for a page that is still open to take the next request


@dataclass(frozen=True)
class Browser:
    """A device: fresh headless Chromium for each request.

    Attributes:
        serve: start no browser; print an address of the local network, for one browser of any device there. Its page
            takes further requests, too, while it stays open.
        flags: further ones of Chromium's command line.
    """

    serve: bool = False
    flags: tuple[str, ...] = ()
    where: str = "browser"
    kind: Kind = "measured"
    _visits: list[BrowserJob] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.serve:
            chromium()

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """Have a page answer, for which time is limited once a browser has the request; see `Device`.

        `notes` of the reply are sentences for the user.
        """
        if request.get("cores"):
            raise InputError(f"a browser cannot keep to the cores {request['cores']}; leave the cores out")
        end = math.inf  # until a browser has come
        with self._job(request) as job, self._visitor(job) as check:
            while not job.done.wait(0.05):
                check()
                if job.claimed:
                    end = min(end, time.monotonic() + timeout_s)
                if time.monotonic() > end:
                    raise too_slow(timeout_s, job.said)
            reply = job.reply()
        reply["machine"]["name"] = None if self.serve else platform.node()
        return reply | {"notes": _notes(reply, request["threads"], job.runtime_bytes)}

    def _job(self, request: Mapping[str, Any]) -> BrowserJob:
        if not self.serve:
            return BrowserJob("127.0.0.1", request)
        job = BrowserJob(_lan_address(), request, after=self._visits.pop() if self._visits else None)
        self._visits.append(job)
        return job

    @contextmanager
    def _visitor(self, job: BrowserJob) -> Iterator[Callable[[], None]]:
        """A browser that opens a job's page; what is given raises Unreachable where it is gone."""
        if not self.serve:
            with _chromium(job.url, self.flags) as started:
                yield lambda: started.check(job)
            return
        at, told = time.monotonic() + (_RETURN_S if job.expected else 0), False

        def invite() -> None:
            nonlocal told
            if not (told or job.claimed) and time.monotonic() >= at:
                told = True
                _announce(job.url)

        yield invite


def chromium() -> str:
    """The program that is Chromium here.

    Raises:
        InputError: there is none: what to do.
    """
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        raise InputError(f"no browser is here, looked for {', '.join(PROGRAMS)}: {INSTALL}")
    return found


@dataclass(frozen=True)
class _Started:
    """Chromium in a folder of its own."""

    process: "subprocess.Popen[bytes]"
    log: Path
    at: float

    def check(self, job: BrowserJob) -> None:
        """Raises BrokenOff where it ended, and Unreachable where it did not open the page."""
        code = self.process.poll()
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise BrokenOff(f"Chromium {how} before the page answered: {self._said()}", job.said)
        if not job.claimed and time.monotonic() > self.at + _OPEN_S:
            raise Unreachable(f"Chromium did not open the page within {_OPEN_S} s: {self._said()}")

    def _said(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join([line for line in lines if "dbus" not in line][-4:]) or "no output"


@contextmanager
def _chromium(url: str, flags: tuple[str, ...]) -> Iterator[_Started]:
    """Chromium with a fresh profile; its processes and its folder are gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="potstill-", dir=short_folder(), ignore_cleanup_errors=True) as folder:
        home = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR"), folder)
        # Chromium refuses its sandbox to root; the page is our own
        more = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        log = Path(folder, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [chromium(), *FLAGS, *more, *flags, f"--user-data-dir={folder}/profile", url],
                env={**os.environ, **home},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield _Started(process, log, time.monotonic())
        finally:
            _end(process, folder)


def _end(process: "subprocess.Popen[bytes]", folder: str) -> None:
    """Kill a program and all that it started: by its group, and by the folder that their command lines name."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    left = [one for one in psutil.process_iter(["cmdline"]) if folder in " ".join(one.info["cmdline"] or ())]
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, timeout=5)


def _announce(url: str) -> None:
    print(f"Open {url} in a browser on the local network; it is good for one browser, once.", file=sys.stderr)
    segno.make(url).terminal(out=sys.stderr, compact=True)


def _lan_address() -> str:
    """This machine's address on its local network; no packet is sent.

    Raises:
        InputError: it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of RFC 5737, which no host has
        except OSError:
            raise InputError("this machine has no address on a local network; connect it to the phone's") from None
        return str(probe.getsockname()[0])


def _notes(reply: Mapping[str, Any], wanted: int, runtime_bytes: int) -> list[str]:
    """What is to be known of a browser's figures."""
    said, ran = reply["browser"], reply["threads"]
    if said["isolated"]:
        notes = [f"threads are on: the page is cross-origin isolated, and {ran} of {wanted or ran} ran"]
    else:
        notes = [
            f"threads are off: the page is not cross-origin isolated, which needs HTTPS or this machine itself; "
            f"{ran} of {wanted or ran} ran"
        ]
    notes.append(
        f"onnxruntime-web {reply['versions']['onnxruntime-web']} itself has {runtime_bytes / 1e6:.1f} MB that an app "
        f"ships beside its model, and was ready after {said['start_ms']:.0f} ms"
    )
    medians = [float(np.median(one["times_ms"])) for one in reply.get("models", []) if "times_ms" in one]
    if medians and said["clock_ms"] > 0.01 * min(medians):
        notes.append(
            f"the browser's clock goes in steps of {said['clock_ms']:.3g} ms, beside {min(medians):.3g} ms a run"
        )
    if gpu := said.get("gpu"):
        what = ", which is software: its times are not those of a GPU" if gpu["software"] else ""
        notes.append(f"WebGPU ran on {gpu['name']}{what}")
    return notes + [f"{name} is not here: {why}" for name, why in said["refused"].items()]
