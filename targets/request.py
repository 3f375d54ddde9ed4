"""A package on disk, read with care, and the request that it makes of the agent."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, NonNegativeInt, ValidationError

from potstill.targets.target import Target
from potstill.validate.errors import InputError
from potstill.validate.external_data import files_of
from potstill.validate.files import read_json

GOLDEN_FORMAT = "potstill-golden/1"

Form = TypeVar("Form", bound=BaseModel)


class _Tensor(BaseModel):
    file: str
    dtype: str
    shape: list[NonNegativeInt]


class _Sample(BaseModel):
    inputs: dict[str, _Tensor]


class _Golden(BaseModel):
    format: str
    samples: list[_Sample]


class _Manifest(BaseModel):
    target: Target


@dataclass(frozen=True)
class Package:
    """What the agent needs of a package: its model, its target, and one golden sample's inputs.

    `inputs` maps a name to `file` (an absolute path), `dtype` and `shape`; `file_mb` is in MB (10^6 bytes).
    """

    folder: Path
    model: Path
    target: Target
    inputs: dict[str, dict[str, Any]]
    file_mb: float

    def spec(self) -> dict[str, Any]:
        """The package as a model of an agent's request."""
        runtime = self.target.runtime
        return {
            "path": str(self.model),
            "inputs": self.inputs,
            "providers": runtime.providers,
            "provider_options": runtime.provider_options,
            "session_options": runtime.session_options,
        }

    def input_texts(self) -> dict[str, str]:
        """Each input as text, such as "int64 1×23"."""
        return {name: f"{entry['dtype']} {'×'.join(map(str, entry['shape']))}" for name, entry in self.inputs.items()}


def read_package(folder: Path) -> Package:
    """The package in a folder, with the golden sample whose inputs are of median size.

    Raises InputError where the folder is no package, a file is missing or malformed, or a path leaves it; weights too.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a package, the folder that `potstill export` writes")
    model = _inside(folder, "model.onnx")
    files_of(model)
    manifest = _parse(_inside(folder, "manifest.json"), _Manifest)
    golden_file = _inside(folder, "golden/golden.json")
    golden = _parse(golden_file, _Golden)
    if golden.format != GOLDEN_FORMAT:
        raise InputError(f"{golden_file}: format {golden.format!r}, expected {GOLDEN_FORMAT!r}; export the model again")
    if not golden.samples:
        raise InputError(f"{golden_file}: no samples, expected one or more; export the model again")
    samples = sorted(golden.samples, key=lambda sample: sum(math.prod(t.shape) for t in sample.inputs.values()))
    sample = samples[(len(samples) - 1) // 2]
    inputs = {name: _input(golden_file.parent, name, tensor) for name, tensor in sample.inputs.items()}
    parts = [path for path in model.parent.iterdir() if path.name.startswith(model.name)]
    return Package(folder, model, manifest.target, inputs, sum(path.stat().st_size for path in parts) / 1e6)


def _inside(folder: Path, name: str) -> Path:
    """The real path of a file of a folder; a path that leaves the folder is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: the path {name!r} leaves the folder; this is not a package to trust")
    if not path.is_file():
        raise InputError(f"{folder} has no {name}; give a package, the folder that `potstill export` writes")
    return path


def _parse(file: Path, form: type[Form]) -> Form:
    try:
        return form.model_validate(read_json(file))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise InputError(f"{file}: {where}: {fault['msg']}; export the model again") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}); export the model again") from None


def _input(folder: Path, name: str, tensor: _Tensor) -> dict[str, Any]:
    """One input as the agent takes it; the file must hold exactly the tensor."""
    file = _inside(folder, tensor.file)
    try:
        width = np.dtype(tensor.dtype).itemsize
    except TypeError:
        raise InputError(f"{file}: input {name!r} has dtype {tensor.dtype!r}, expected a numpy name") from None
    expected, given = math.prod(tensor.shape) * width, file.stat().st_size
    if given != expected:
        shape = f"{tensor.dtype} {tensor.shape}"
        raise InputError(f"{file}: holds {given} bytes, expected {expected} for {shape}; export the model again")
    return {"file": str(file), "dtype": tensor.dtype, "shape": tensor.shape}
