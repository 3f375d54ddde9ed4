"""ONNX Runtime for browsers: its npm package, in one version, in the user's cache folder."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from potstill.validate.errors import InputError, PotstillError, told
from potstill.validate.files import cache_home, whole_folder

NAME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
TARBALL = f"{NAME}-{VERSION}.tgz"
WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
WEBGPU_LIST = "webgpu-operators.md"
_FETCH_S = 300


def bundle(providers: Sequence[str]) -> tuple[str, ...]:
    """The files of the runtime that some providers need: its module, and that and the code of its WebAssembly."""
    return WEBGPU if "webgpu" in providers else WASM


def cache_folder() -> Path:
    """Where the package lies unpacked, or will."""
    return cache_home() / f"{NAME}-{VERSION}"


def runtime() -> Path:
    """The folder with the files of `WASM` and `WEBGPU`, fetched from npm's registry the first time.

    Raises:
        InputError: it is not there and cannot be fetched: what to do.
        PotstillError: what was fetched is not the package that is known here.
    """
    folder = cache_folder()
    if folder.is_dir():
        return folder
    placed = folder.parent / TARBALL
    with tempfile.TemporaryDirectory(prefix="potstill-") as work:
        tarball = placed if placed.is_file() else _fetched(Path(work))
        given = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        if f"sha512-{given}" != INTEGRITY:
            raise PotstillError(
                f"{tarball.name} has the hash sha512-{given}, expected {INTEGRITY}; remove it, and ask who changed it"
            )
        with whole_folder(folder) as into, tarfile.open(tarball) as archive:
            for name in (*(f"dist/{one}" for one in (*WASM, *WEBGPU)), f"docs/{WEBGPU_LIST}"):
                member = archive.extractfile(f"package/{name}")
                assert member is not None  # the hash says so
                with member, (into / Path(name).name).open("wb") as file:
                    shutil.copyfileobj(member, file)
    return folder


def _fetched(folder: Path) -> Path:
    """The package's archive, by npm where it is here, so that its registry and proxy apply."""
    command = ["npm", "pack", f"{NAME}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_S, check=True)
        return folder / TARBALL
    except (subprocess.SubprocessError, OSError) as error:
        said = told(Exception(getattr(error, "stderr", None) or error))
        raise InputError(
            f"{NAME} {VERSION} is not here and cannot be fetched ({said}); run `npm pack {NAME}@{VERSION}` where there "
            f"is a network, and put {TARBALL} into {cache_folder().parent}"
        ) from None
