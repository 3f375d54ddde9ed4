"""Golden samples: inputs and expected outputs that an app in any language can test itself with."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.targets.request import GOLDEN_FORMAT
from potstill.validate.data import Examples
from potstill.validate.decoder import PAST
from potstill.validate.encoder import Inputs
from potstill.validate.files import write_json
from potstill.validate.predictor import OnnxPredictor

GOLDEN = "golden"
GOLDEN_SAMPLES = 4
TOKENS = 16  # of a language model's text


def write_golden(
    folder: Path, predictor: OnnxPredictor, examples: Examples, tolerance: float, output: str = "logits"
) -> list[Inputs]:
    """Write inputs and expected outputs as raw little-endian files with an index that any language can read.

    `golden.json`: `samples`, each with `inputs` and `outputs` by name: `file`, `dtype`, `shape`, and for outputs
    `atol`, the largest absolute difference to expect: `tolerance` times the largest logit. Returns the inputs.
    """
    samples: list[dict[str, Any]] = []
    given: list[Inputs] = []
    folder.mkdir()
    for i in range(min(GOLDEN_SAMPLES, len(examples))):
        inputs = predictor.feeds(_short(predictor.encode(examples.rows([i])), predictor))
        given.append(inputs)
        logits = predictor.run(inputs)
        atol = tolerance * float(np.abs(logits).max())
        samples.append(
            {
                "inputs": {name: _raw(folder, f"{i}.{name}.bin", array) for name, array in inputs.items()},
                "outputs": {output: _raw(folder, f"{i}.{output}.bin", logits) | {"atol": atol}},
            }
        )
    write_json(folder / "golden.json", {"format": GOLDEN_FORMAT, "byte_order": "little", "samples": samples})
    return given


def _short(inputs: Inputs, predictor: OnnxPredictor) -> Inputs:
    """The first tokens of a decoder's text: each has as many outputs as the vocabulary has tokens."""
    if not any(name.startswith(PAST) for name in predictor.input_types):
        return inputs
    return {name: array[:, :TOKENS] for name, array in inputs.items() if name in predictor.input_types}


def _raw(folder: Path, name: str, array: NDArray[Any]) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    (folder / name).write_bytes(little.tobytes())
    return {"file": name, "dtype": array.dtype.name, "shape": list(array.shape)}
