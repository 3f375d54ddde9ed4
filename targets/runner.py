"""The runner for phones, which have no Python: a small program with the libraries it needs, in one folder.

`python -m potstill.targets.runner arm64` builds it, once for each version of ONNX Runtime: `runner.cpp` by Zig's C++
compiler, ONNX Runtime's library from the wheel of the version that is installed here, and the C library with its
loader from Debian, because Android's own is another. `runner.yaml` lists them, each with its SHA-256.
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml

from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.files import cache_home, sha256_json, whole_folder

HERE = Path(__file__).parent
SOURCES = (HERE / "runner.cpp", HERE / "runner_machine.h")
PROGRAM, LIBRARY, NOTES = "potstill-runner", "libonnxruntime.so.1", "LICENCES.txt"
ARCHS = ("arm64", "x86_64")


@cache
def parts() -> dict[str, Any]:
    """What `runner.yaml` lists."""
    return dict(yaml.safe_load((HERE / "runner.yaml").read_text(encoding="utf-8")))


def loader(arch: str) -> str:
    """The file of a built runner that starts it: `./LOADER --library-path . ./potstill-runner REQUEST`."""
    return str(parts()[arch]["loader"])


def place(arch: str) -> Path:
    """Where the runner for an architecture lies once it is built, in the user's cache folder."""
    key = sha256_json([path.read_text(encoding="utf-8") for path in SOURCES] + [parts(), version("onnxruntime")])[:16]
    return cache_home() / "runner" / f"{arch}-{key}"


def built(arch: str) -> Path:
    """The folder of the runner for an architecture.

    Raises:
        InputError: it is not built here.
    """
    folder = place(arch)
    if not folder.is_dir():
        raise InputError(
            f"a phone needs a runner, and none for {arch} and ONNX Runtime {version('onnxruntime')} is built here; "
            f"build it once: {Path(sys.executable).name} -m potstill.targets.runner {arch}"
        )
    return folder


def build(arch: str, mirror: str | None = None) -> Path:
    """Build the runner for an architecture, unless it is there; about a minute, 150 MB fetched, 30 MB kept.

    Raises:
        InputError: no mirror of Debian is given, and apt has none; or no hash is known of ONNX Runtime's wheel.
        Unreachable: a part of it cannot be fetched, or is not what was expected.
        PotstillError: it does not compile, or that version of ONNX Runtime has no library of its own.
    """
    folder, wanted = place(arch), parts()[arch]
    if folder.is_dir():
        return folder
    runtime = f"onnxruntime=={version('onnxruntime')}"
    if runtime not in parts()["wheels"]:
        known = ", ".join(name for name in parts()["wheels"] if name.startswith("onnxruntime=="))
        raise InputError(f"no hash is known of the wheel of {runtime}; install {known} to build the runner")
    mirror = mirror or _mirror()
    with tempfile.TemporaryDirectory(prefix="potstill-") as work, whole_folder(folder) as into:
        headers = Path(work, "headers")
        for part in parts()["headers"]:
            with _package(part, mirror) as package:
                package.extractall(headers, _under(package, "./usr/include/"), filter="data")
        _compile(wanted["triple"], headers, Path(work), into / PROGRAM)
        wheel = Path(work, "wheel")
        _pip(wheel, runtime, "--platform", wanted["wheel"])
        libraries = list(wheel.glob("onnxruntime/capi/libonnxruntime.so.1.*"))
        if len(libraries) != 1:
            raise PotstillError(
                f"the wheel of onnxruntime {version('onnxruntime')} has no library; take another version"
            )
        shutil.copy(libraries[0], into / LIBRARY)
        for part in wanted["packages"]:
            with _package(part, mirror) as package:
                for name in part["files"]:
                    (into / name).write_bytes(_file(package, name))
        (into / NOTES).write_text(_notes(arch), encoding="utf-8")
    return folder


def _compile(triple: str, headers: Path, work: Path, program: Path) -> None:
    """Compile `runner.cpp` for a system, by Zig's C++ compiler."""
    _pip(work / "zig", parts()["compiler"])
    include = headers / "usr/include"
    flags = ["-std=c++17", "-O2", "-s", "-fPIE", "-pie", "-Wall", "-Wextra"]
    places = ["-isystem", str(include / "onnxruntime"), "-isystem", str(include)]
    caches = {name: str(work / "zig-cache") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ziglang",
            "c++",
            "-target",
            triple,
            *flags,
            *places,
            str(SOURCES[0]),
            "-o",
            str(program),
        ],
        env={**os.environ, "PYTHONPATH": str(work / "zig"), **caches},
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise PotstillError(f"the runner for {triple} does not compile with {parts()['compiler']}: {said[-1000:]}")


def _pip(into: Path, package: str, *words: str) -> None:
    """Install a package from its wheel, which must have a hash of `runner.yaml`, into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(" ".join([package, *(f"--hash=sha256:{one}" for one in parts()["wheels"][package])]))
        command += ["--require-hashes", "--requirement", str(wanted), "--target", str(into), *words]
        done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    if "DO NOT MATCH THE HASHES" in said:
        raise Unreachable(
            f"the wheel of {package} is none of those in runner.yaml (SHA-256); take another index of pip"
        )
    if done.returncode != 0:
        last = " ".join(said.strip().splitlines()[-1:])
        raise Unreachable(f"pip cannot get {package}: {last}; the runner is built with a network and pip")


def _mirror() -> str:
    """Debian's mirror, as apt is set up here."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        found = []
    if not found:
        raise InputError("apt names no mirror of Debian here, whose packages the runner needs; give one with --mirror")
    return found[0].rstrip("/")


def _package(part: dict[str, Any], mirror: str) -> tarfile.TarFile:
    """The files of a package of Debian, checked by its SHA-256."""
    url = f"{mirror}/{part['path']}"
    try:
        with urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, HTTPException) as error:
        raise Unreachable(f"cannot fetch {url}: {error}; try again, or give another mirror with --mirror") from None
    found = hashlib.sha256(content).hexdigest()
    if found != part["sha256"]:
        raise Unreachable(
            f"{url} has SHA-256 {found}, expected {part['sha256']}; it was changed on the way: give another mirror"
        )
    data = next(body for name, body in _members(content) if name.startswith("data.tar"))
    return tarfile.open(fileobj=io.BytesIO(data))


def _members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an archive of `ar`, which a package of Debian is (deb(5)): heads of 60 bytes, even places."""
    start = len(b"!<arch>\n")
    while start + 60 <= len(archive):
        name, size = archive[start : start + 16].decode("ascii").strip(), int(archive[start + 48 : start + 58])
        yield name, archive[start + 60 : start + 60 + size]
        start += 60 + size + size % 2


def _under(package: tarfile.TarFile, folder: str) -> list[tarfile.TarInfo]:
    return [member for member in package.getmembers() if member.name.startswith(folder)]


def _file(package: tarfile.TarFile, name: str) -> bytes:
    """A file of a package by its last name; a link gives the file that it leads to in its folder."""
    found = [member for member in package.getmembers() if Path(member.name).name == name]
    opened = package.extractfile(sorted(found, key=lambda member: member.issym())[0])
    assert opened is not None
    return opened.read()


def _notes(arch: str) -> str:
    """Which file of a built runner is under which licence."""
    rows = [
        (PROGRAM, "Apache-2.0 (Potstill), with what is compiled into it:"),
        *((" ", part["licence"]) for part in parts()["headers"]),
        (" ", "Apache-2.0 with LLVM-exception (libc++, by Zig)"),
        (LIBRARY, f"MIT (ONNX Runtime {version('onnxruntime')}; its wheel has ThirdPartyNotices.txt)"),
        *(
            (name, f"{part['licence']} (Debian, {Path(part['path']).name}, whose source package has its source)")
            for part in parts()[arch]["packages"]
            for name in part["files"]
        ),
    ]
    return "".join(f"{name}: {licence}\n" if name.strip() else f"    {licence}\n" for name, licence in rows)


def main(words: list[str] | None = None) -> int:
    """Build the runners that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m potstill.targets.runner", description="Build the runner for phones."
    )
    parser.add_argument("arch", nargs="*", choices=ARCHS, default=["arm64"], help="default: arm64")
    parser.add_argument("--mirror", help="of Debian; default: that of apt here")
    given = parser.parse_args(words)
    try:
        for arch in given.arch:
            print(build(arch, given.mirror))
    except PotstillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
