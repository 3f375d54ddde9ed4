"""A package's golden samples, run by ONNX Runtime on this machine."""

from pathlib import Path
from typing import Any

import numpy as np

from potstill.export.golden import GOLDEN
from potstill.export.package import MODEL
from potstill.targets.host import runs_here
from potstill.targets.request import GOLDEN_FORMAT
from potstill.targets.target import Target
from potstill.validate.errors import GateFailed, InputError, told
from potstill.validate.files import read_json
from potstill.validate.session import open_session
from potstill.validate.units import counted


def rerun(folder: Path, target: dict[str, Any]) -> str:
    """Run a package's golden samples on the CPU and compare, in one sentence.

    Args:
        folder: of the package, whose files were checked.
        target: as its manifest has it.

    Raises:
        GateFailed: an output is further from the expected one than its `atol`, or of another shape.
        InputError: there are no samples of a form that is known, or ONNX Runtime does not open the model.
    """
    index = folder / GOLDEN / "golden.json"
    samples = read_json(index) if index.is_file() else {}
    if samples.get("format") != GOLDEN_FORMAT or not samples["samples"]:
        raise InputError(f"{index}: no samples of the form {GOLDEN_FORMAT!r}; export the model again")
    try:
        session = open_session(folder / MODEL, target["runtime"]["session_options"])
    except Exception as error:  # ONNX Runtime's own kinds have no common base but this
        raise InputError(f"ONNX Runtime does not open {folder / MODEL} here: {told(error)}") from error
    alike, why = runs_here(Target.model_validate(target))
    worst = 0.0
    for number, sample in enumerate(samples["samples"]):
        feeds = {name: _array(folder, one) for name, one in sample["inputs"].items()}
        found = session.run(list(sample["outputs"]), feeds)
        for (name, one), given in zip(sample["outputs"].items(), found, strict=True):
            wanted = _array(folder, one)
            off = float(np.abs(given - wanted).max()) if given.shape == wanted.shape else float("inf")
            if not off <= one["atol"]:
                raise GateFailed(
                    f"{folder}: golden sample {number}: {name} is {off:.4g} off, expected {one['atol']:.4g} at most"
                    + ("" if alike else f"; {why}")
                )
            worst = max(worst, off / one["atol"] if one["atol"] else 0.0)
    return f"{counted(len(samples['samples']), 'sample')} within {worst:.0%} of what they allow, on this CPU"


def _array(folder: Path, entry: dict[str, Any]) -> Any:
    kind = np.dtype(entry["dtype"]).newbyteorder("<")
    return np.fromfile(folder / GOLDEN / entry["file"], dtype=kind).reshape(entry["shape"])
