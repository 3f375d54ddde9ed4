"""Where an artefact came from: the record in `potstill.json` beside a checkpoint and in a package's manifest."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from potstill.targets.host import here
from potstill.validate.task import Model

VERSIONED = [
    "potstill",
    "torch",
    "torch-pruning",
    "torchvision",
    "pillow",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "optimum",
    "onnx",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnxscript",
    "numpy",
]


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on; `not installed` where it is not."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """This machine: system, processor, cores, and the accelerator that training uses."""
    import torch

    host = here()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": host.system,
        "arch": host.arch,
        "cpu": host.cpu,
        "cores": str(host.cores),
        "accelerator": accelerator,
    }


def lineage(seed: int, teacher: dict[str, Any], data: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What made a model.

    Args:
        seed: of the recipe.
        teacher: `source` and `sha256`.
        data: for `train`, `eval` and `calibrate`: `name`, `sha256`, `examples`.
        stages: each with `name`, `settings`, `seconds`.
    """
    return {
        "format": "potstill-lineage/1",
        "teacher": teacher,
        "data": data,
        "stages": stages,
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
    }


def identity(model: Model, seed: int) -> list[Any]:
    """What a loaded teacher is: its content; for a hub name the revision; for a factory without weights the seed."""
    checkpoint = model.checkpoint
    revision = getattr(getattr(model.core, "config", None), "_commit_hash", None)
    drawn = seed if checkpoint.is_factory and not checkpoint.weights else None
    return [checkpoint.source, checkpoint.digest(), revision, drawn]
