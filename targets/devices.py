"""A device by the word that a user has for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable
from urllib.parse import SplitResult, urlsplit

from potstill.targets.device import FORMS, Device
from potstill.targets.local import Local
from potstill.targets.target import Target, load_target
from potstill.validate.errors import InputError


@dataclass(frozen=True)
class Reach:
    """What is said of how a device is reached, beside its word.

    Attributes:
        target: of the package that is to run there; None where none is.
        python: the interpreter there, of a device that has several.
        serve: let a browser of another device come, and start none.
    """

    target: Target | None = None
    python: str | None = None
    serve: bool = False


def open_device(where: str, reach: Reach = Reach()) -> Device:
    """The device that a word names.

    Nothing is reached yet, but what is needed here to reach it is looked for.

    Raises:
        InputError: the word names no device, does not go with `reach`, or what reaches it is not here: what to do.
    """
    try:
        parts = urlsplit(where if "://" in where else f"{where}://")
    except ValueError as error:
        raise InputError(f"{where!r} is no address ({error}); expected {FORMS}") from None
    opener = DEVICES.get(parts.scheme)
    if opener is None:
        raise InputError(f"no device is called {where!r}; expected {FORMS}")
    if reach.python and parts.scheme not in ("local", "ssh"):
        raise InputError(f"{where} has no Python to choose; leave out --python")
    if reach.serve and parts.scheme != "browser":
        raise InputError(f"--serve is for a browser that comes by itself, and the device is {where}; leave it out")
    return opener(parts, reach)


def clean(where: str) -> int:
    """Remove what earlier runs left on a device; the bytes that it took.

    Raises:
        InputError: nothing is ever left there, or as of `open_device`.
        Unreachable: it is not there.
    """
    device = None if where.startswith(("emulate", "qnn-sim")) else open_device(where)
    if not isinstance(device, Cleanable):
        raise InputError(f"nothing is kept on {where}; only hosts over ssh and phones keep files for the next run")
    return device.clean()


@runtime_checkable
class Cleanable(Protocol):
    """A device that keeps files for the next run."""

    def clean(self) -> int:
        """Remove them; the bytes that they took."""
        ...


def _local(parts: SplitResult, reach: Reach) -> Device:
    _nothing_more(parts)
    return Local((reach.python,)) if reach.python else Local()


def _emulate(parts: SplitResult, reach: Reach) -> Device:
    from potstill.targets.emulate import EmulatedCpu

    if other := f"{parts.netloc}{parts.path}":
        return EmulatedCpu(load_target(other), f"emulate://{other}")
    if reach.target is None:
        raise InputError("emulate is the CPU of a package's target, and there is none here; name it: emulate://TARGET")
    return EmulatedCpu(reach.target)


def _qnn_sim(parts: SplitResult, reach: Reach) -> Device:
    from potstill.targets.qnn import QnnSim

    _nothing_more(parts)
    if reach.target is None:
        raise InputError("qnn-sim is the NPU of a package's target, and there is no package here; give one")
    return QnnSim(reach.target)


def _ssh(parts: SplitResult, reach: Reach) -> Device:
    from potstill.targets.ssh import Ssh

    device = Ssh.at(parts)
    return replace(device, python=reach.python) if reach.python else device


def _browser(parts: SplitResult, reach: Reach) -> Device:
    from potstill.targets.browser import Browser

    _nothing_more(parts)
    return Browser(serve=reach.serve)


def _adb(parts: SplitResult, reach: Reach) -> Device:
    from potstill.targets.adb import Adb

    return Adb.at(parts)


def _nothing_more(parts: SplitResult) -> None:
    if parts.netloc or parts.path:
        raise InputError(f"{parts.scheme} has no address, and {parts.geturl()!r} gives one; expected {FORMS}")


DEVICES: dict[str, Callable[[SplitResult, Reach], Device]] = {
    "local": _local,
    "emulate": _emulate,
    "qnn-sim": _qnn_sim,
    "ssh": _ssh,
    "adb": _adb,
    "browser": _browser,
}
