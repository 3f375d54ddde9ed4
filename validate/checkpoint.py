"""A checkpoint: a folder or hub name that `transformers` opens, or a factory with a weights file.

No code runs from a checkpoint: tensors come from safetensors or through `weights_only=True`, and a factory
is named by the user, never read from a file.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from potstill.validate.errors import InputError, Unreachable, told
from potstill.validate.files import read_json, sha256_file, sha256_folder, sha256_json
from potstill.validate.finite import check_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

RECORD = "potstill.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
LABELS = "labels.json"  # names the classes of a module's ONNX file
RESHAPED = "reshaped"  # in the record: see validate/reshape.py
SMALL = (".json", ".txt", ".model", ".jinja")  # suffixes of what transformers writes beside weights
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


def is_factory(source: str) -> bool:
    """Whether a checkpoint is written as `package.module:factory`."""
    return _FACTORY.fullmatch(source) is not None


def onnx_file(source: str) -> Path | None:
    """The ONNX file that a source is: a file of that suffix, or `model.onnx` in a folder without other weights."""
    path = Path(source).expanduser()
    if path.suffix == ".onnx" and not path.is_dir():
        return path
    weights = ("*.safetensors", "*.bin")
    found = (path / ONNX).is_file() and not any(one for pattern in weights for one in path.glob(pattern))
    return path / ONNX if found else None


@dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from.

    Attributes:
        source: a folder, a hub name, `package.module:factory`, or an ONNX file.
        weights: for a factory, a `.safetensors` file or a PyTorch file of plain tensors. None leaves the
            factory's own initial weights.
        preprocessing: for an ONNX file, the folder with its config and its tokenizer or processor; None: its own.
    """

    source: str
    weights: Path | None = None
    preprocessing: Path | None = None

    def __post_init__(self) -> None:
        """Refuse weights without a factory, preprocessing without an ONNX file, and files that are not there."""
        if self.weights and not self.is_factory:
            raise InputError(
                f"weights {self.weights} were given for {self.source!r}, which is not a factory; "
                "write the model as package.module:factory, or give the checkpoint's folder alone"
            )
        if self.weights and not self.weights.is_file():
            raise InputError(f"no such weights file: {self.weights}")
        if self.preprocessing and not self.onnx:
            raise InputError(
                f"the preprocessing {self.preprocessing} was given for {self.source!r}, which is no ONNX file; "
                "a checkpoint brings its own"
            )
        if self.preprocessing and not self.preprocessing.is_dir():
            raise InputError(f"no such folder: {self.preprocessing}")

    def __str__(self) -> str:
        return self.source + (f" ({self.weights.name})" if self.weights else "")

    @property
    def is_factory(self) -> bool:
        """Whether the model is built by `package.module:factory`."""
        return is_factory(self.source)

    @property
    def onnx(self) -> Path | None:
        """The ONNX file; None for what is none."""
        return None if self.is_factory else onnx_file(self.source)

    @property
    def beside_onnx(self) -> Path:
        """The folder with the config, and the tokenizer or processor, of an ONNX file."""
        assert self.onnx
        return self.preprocessing or self.onnx.parent

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a factory or a hub name."""
        path = Path(self.source).expanduser()
        return path if path.is_dir() else None

    def digest(self) -> str:
        """SHA-256 of the content: a folder's files; a factory's weights, their shapes and its code; else the name.

        What a factory's file imports is not seen. Of an ONNX file: it, its weights beside it, and the small files that
        say how it is fed.
        """
        if self.onnx:
            from potstill.validate.external_data import files_of

            said = [path for path in self.beside_onnx.iterdir() if path.suffix in SMALL]
            return sha256_json([[path.name, sha256_file(path)] for path in [*files_of(self.onnx), *sorted(said)]])
        if self.is_factory:
            code = inspect.getsourcefile(_imported(self))
            files = [sha256_file(Path(path)) if path else None for path in (self.weights, code)]
            shapes = beside(self.weights).get(RESHAPED) if self.weights else None
            return sha256_json([self.source, *files, *([shapes] if shapes else [])])
        return sha256_folder(self.folder) if self.folder else f"name:{self.source}"


def beside(weights: Path) -> dict[str, Any]:
    """The record that lies beside the weights that Potstill wrote; empty for other files."""
    path = weights.with_name(RECORD)
    record: dict[str, Any] = read_json(path) if weights.name == WEIGHTS and path.is_file() else {}
    return record


def open_folder(checkpoint: Checkpoint) -> str:
    """The path or hub name that `transformers` is to open.

    Raises:
        InputError: the folder is not there, is no checkpoint, or holds weights for a user's own factory.
    """
    folder, source = checkpoint.folder, checkpoint.source
    if folder is None:
        if source.startswith((".", "/", "~")) or Path(source).suffix in {".safetensors", ".bin", ".pt", ".th"}:
            raise InputError(f"no such checkpoint folder: {source}; expected a folder with config.json and weights")
        return source
    record = beside(folder / WEIGHTS)
    if record.get("factory"):
        raise InputError(
            f"{folder} holds weights for the factory {record['factory']!r}, and no code is run from a checkpoint; "
            f"name the factory yourself: {record['factory']} --weights {folder / WEIGHTS}"
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json, so it is not a transformers checkpoint; "
            "a model of your own is given as package.module:factory --weights FILE"
        )
    return str(folder)


@contextmanager
def reading_weights(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what libraries raise on broken, foreign or unreachable weights into one clear sentence."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise InputError(
            f"cannot read the weights of {checkpoint}: {told(error)}; "
            "expected a whole safetensors file, or a PyTorch file of plain tensors"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        if "No space left" in str(error):
            raise
        if checkpoint.folder is None and not checkpoint.is_factory:
            raise Unreachable(
                f"{checkpoint.source!r} is no folder here, and the model hub did not give it: {told(error)}"
            ) from error
        raise InputError(f"cannot open {checkpoint}: {told(error)}") from error


def build_module(checkpoint: Checkpoint) -> "nn.Module":
    """Call the factory and load its weights, in eval mode.

    Raises:
        InputError: the factory cannot be imported or called, or its parameters and the file do not match.
    """
    from torch import nn

    name = checkpoint.source.partition(":")[2]
    factory: Callable[[], Any] | None = getattr(_imported(checkpoint), name, None)
    if factory is None:
        raise InputError(f"cannot import {checkpoint.source}: its module has no {name!r}")
    try:
        module = factory()
    except Exception as error:  # whatever a user's own code raises
        raise InputError(
            f"{checkpoint.source} cannot be called without arguments: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{checkpoint.source} returned {type(module).__name__}, expected a torch.nn.Module")
    if checkpoint.weights:
        _load_weights(module, checkpoint)
    check_finite(checkpoint.weights.name if checkpoint.weights else str(checkpoint), floats_of(module))
    return module.eval()


def floats_of(module: "nn.Module") -> Iterator[tuple[str, Any]]:
    """The floating-point entries of a module's state, as arrays, by name."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            yield name, tensor.float().numpy(force=True)


def _imported(checkpoint: Checkpoint) -> ModuleType:
    """The module of a factory, from the current folder or the installed packages."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(checkpoint.source.partition(":")[0])
    except Exception as error:  # whatever a user's own code raises
        raise InputError(
            f"cannot import {checkpoint.source}: {type(error).__name__}: {error}; it is looked for in the current "
            "folder and among the installed packages"
        ) from error


def _load_weights(module: "nn.Module", checkpoint: Checkpoint) -> None:
    """Load a weights file into a module, reshaped first where the record says so; every key must match."""
    import torch
    from safetensors.torch import load_model

    from potstill.validate.reshape import recorded, reshape, shapes_in

    assert checkpoint.weights is not None
    attributes = recorded(beside(checkpoint.weights))
    with reading_weights(checkpoint):
        if attributes is not None:
            reshape(module, shapes_in([checkpoint.weights]), attributes)
        if checkpoint.weights.suffix == ".safetensors":
            missing, unexpected = load_model(module, checkpoint.weights, strict=False)
            missing, unexpected = list(missing), list(unexpected)
        else:
            state = _plain_tensors(torch.load(checkpoint.weights, map_location="cpu", weights_only=True), checkpoint)
            missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise InputError(
            f"{checkpoint.weights.name} does not fit {checkpoint.source}: {len(missing)} parameters are missing "
            f"({some(missing)}) and {len(unexpected)} are foreign ({some(unexpected)})"
        )


def _plain_tensors(loaded: Any, checkpoint: Checkpoint) -> "dict[str, Tensor]":
    """The state dict in a PyTorch file: at the top or under `state_dict` or `model`, `module.` prefix dropped."""
    from torch import Tensor

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise InputError(
            f"{checkpoint.weights} holds no state dict: expected names with plain tensors, "
            "at the top of the file or under 'state_dict'"
        )
    prefix = "module."  # torch.nn.DataParallel and DistributedDataParallel
    if all(key.startswith(prefix) for key in loaded):
        loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    state: dict[str, Tensor] = loaded
    return state


def some(names: list[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"
