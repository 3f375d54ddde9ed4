"""What a package's `manifest.json` says of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from potstill.targets.target import Target
from potstill.validate.encoder import TextEncoder
from potstill.validate.files import sha256_file
from potstill.validate.task import Model

if TYPE_CHECKING:
    from potstill.export.package import Order, Package


def manifest_of(package: "Package", target: Target, order: "Order", folder: Path, model: Model) -> dict[str, Any]:
    """Everything a reader must know, with the hash of every other file of the package."""
    max_length = model.encode.max_length if isinstance(model.encode, TextEncoder) else None
    return {
        "format": "potstill-package/1",
        "key": order.key,
        "target": target.model_dump(mode="json"),
        "labels": list(model.labels),
        "quantization": plain(package.quantized),
        "asked": order.limits.asked if order.limits else None,
        "search": plain(package.search) if package.search else None,
        "not_searched": package.not_searched,
        "fusions": plain(package.fusions) if package.fusions else None,
        "coverage": plain(package.coverage) if package.coverage else None,
        "context": plain(package.context) if package.context else None,
        "rewritten": package.rewritten,
        "parity": plain(order.parity),
        "opset": order.opset,
        "max_length": max_length,
        "checked": package.checked,
        "scorecard": package.scorecard.to_json(),
        "verdict": plain(package.verdict) if package.verdict else None,
        "model_bytes": package.model_bytes,
        "seconds": package.seconds,
        "lineage": order.lineage,
        "files": {
            path.relative_to(folder).as_posix(): hashed(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }


def hashed(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it."""
    plain: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return plain
