"""What feeds a package's model, where optimum, transformers.js and ONNX Runtime GenAI look for it."""

from pathlib import Path
from typing import Any

from potstill.validate.checkpoint import LABELS
from potstill.validate.files import read_json, write_json
from potstill.validate.task import Model


def write_sources(folder: Path, model: Model) -> None:
    """Config, tokenizer or processor where optimum and transformers.js look; the class names for a module."""
    core: Any = model.core
    model.encode.save(folder)
    if hasattr(core, "config"):
        core.config.save_pretrained(folder)
        _open_in_older(folder)
    else:
        write_json(folder / LABELS, list(model.labels))


def _open_in_older(folder: Path) -> None:
    """Name the tokenizer by the class that every transformers release knows."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
