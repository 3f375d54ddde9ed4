"""A package on disk, read with care, and the request that it makes of the agent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import yaml
from pydantic import BaseModel, NonNegativeInt, ValidationError

from potstill.targets.target import Target
from potstill.validate.errors import InputError
from potstill.validate.external_data import check_external_data, read_graph, streamed_bytes, weight_bytes
from potstill.validate.files import read_json, sha256_file, sha256_json

GOLDEN_FORMAT = "potstill-golden/1"
PROMPT, TOKENS, ROUNDS = 128, 64, 3  # that a language model reads and writes, where its context holds them

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


class _File(BaseModel):
    sha256: str


class _Manifest(BaseModel):
    target: Target
    files: dict[str, _File] = {}


@dataclass(frozen=True)
class Package:
    """What the agent needs of a package: its model, its target, and one golden sample's inputs.

    `inputs` maps a name to `file` (a path), `dtype` and `shape`; `file_mb` and `weights_mb`, of the constants alone,
    are in MB (10^6 bytes). `sha256` is over the manifest, the files that it names, and the model's.
    """

    folder: Path
    model: Path
    target: Target
    inputs: dict[str, dict[str, Any]]
    file_mb: float
    weights_mb: float
    model_sha256: str
    sha256: str
    writes: dict[str, int] = field(default_factory=dict)
    streamed_mb: float = 0.0

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    def spec(self) -> dict[str, Any]:
        """The package as a model of a request; see `Device`."""
        runtime = self.target.runtime
        return {
            "path": self.model,
            "inputs": self.inputs,
            "providers": runtime.providers,
            "provider_options": runtime.provider_options,
            "session_options": runtime.session_options,
            **({"writes": self.writes} if self.writes else {}),
        }

    def feeds(self) -> dict[str, Any]:
        """The inputs as arrays."""
        return {
            name: np.fromfile(entry["file"], dtype=entry["dtype"]).reshape(entry["shape"])
            for name, entry in self.inputs.items()
        }

    def input_texts(self) -> dict[str, str]:
        """Each input as text, such as "int64 1×23"."""
        return {name: f"{entry['dtype']} {'×'.join(map(str, entry['shape']))}" for name, entry in self.inputs.items()}


def read_package(folder: Path | Package) -> Package:
    """The package in a folder, or one that was read already; with the golden sample whose inputs are of median size.

    Raises InputError where the folder is no package, a file is missing or malformed, or a path leaves it; weights too.
    """
    if isinstance(folder, Package):
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a package, the folder that `potstill export` writes")
    model = _inside(folder, "model.onnx")
    graph = read_graph(model)
    files = [model, *check_external_data(model, graph)]
    manifest = _parse(_inside(folder, "manifest.json"), _Manifest)
    hashes = _check(folder, manifest, files[1:])
    golden_file = _inside(folder, "golden/golden.json")
    golden = _parse(golden_file, _Golden)
    if golden.format != GOLDEN_FORMAT:
        raise InputError(f"{golden_file}: format {golden.format!r}, expected {GOLDEN_FORMAT!r}; export the model again")
    if not golden.samples:
        raise InputError(f"{golden_file}: no samples, expected one or more; export the model again")
    samples = sorted(golden.samples, key=lambda sample: sum(math.prod(t.shape) for t in sample.inputs.values()))
    sample = samples[(len(samples) - 1) // 2]
    inputs = {name: _input(golden_file.parent, name, tensor) for name, tensor in sample.inputs.items()}
    size = sum(path.stat().st_size for path in files)
    return Package(
        folder,
        model,
        manifest.target,
        inputs,
        size / 1e6,
        weight_bytes(graph) / 1e6,
        hashes["model.onnx"],
        sha256_json(hashes),
        *_decoder(folder, graph),
    )


def _decoder(folder: Path, graph: onnx.ModelProto) -> tuple[dict[str, int], float]:
    """What a language model is to read and write, and MB of the constants that each token reads whole; else nothing."""
    config = folder / "genai_config.json"
    if not config.is_file() or not any(one.name.startswith("past_key_values.") for one in graph.graph.input):
        return {}, 0.0
    context = int(read_json(config)["model"]["context_length"])
    prompt = max(1, min(PROMPT, context // 2))
    writes = {"prompt": prompt, "tokens": max(1, min(TOKENS, context - prompt - 1)), "rounds": ROUNDS}
    return writes, streamed_bytes(graph) / 1e6


def _check(folder: Path, manifest: _Manifest, weights: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of the manifest, of the files that it names, which it has to name just so, and of the model's.

    Its options of providers must be known ones, and no option may name a file of the machine that runs it.
    """
    names = {
        "manifest.json",
        "model.onnx",
        *(file.relative_to(folder.resolve()).as_posix() for file in weights),
        *manifest.files,
    }
    hashes = {name: sha256_file(_inside(folder, name)) for name in names}
    for name, file in manifest.files.items():
        if hashes[name] != file.sha256:
            raise InputError(f"{folder}: {name} is not the file that manifest.json names; export the model again")
    runtime, known = manifest.target.runtime, _known_options()
    for provider, given in runtime.provider_options.items():
        for option in given:
            if option not in known.get(provider, []):
                raise InputError(
                    f"{folder}: manifest.json sets the option {option} of {provider}, and a package may set "
                    f"{', '.join(known.get(provider, [])) or 'none'}; export for a target without it"
                )
    for options in (runtime.session_options, *runtime.provider_options.values()):
        for option, value in options.items():
            if "/" in value or "\\" in value:
                raise InputError(
                    f"{folder}: the option {option} in manifest.json is a path ({value!r}); this is not a package to "
                    "trust"
                )
    return hashes


@cache
def _known_options() -> dict[str, list[str]]:
    """The options that a package may set, by provider."""
    text = resources.files("potstill.targets").joinpath("provider_options.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


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
    return {"file": file, "dtype": tensor.dtype, "shape": tensor.shape}
