"""Run as a program: checkpoints' graphs and their quantised forms, for each a line with the hash of each file.

`python exporting.py '[[TASK, CHECKPOINT, DATA, OUT, COLUMN], …]'`; the task `own` is a module of this file's own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.export.graph import export_graph
from potstill.export.quantize import quantize
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.files import sha256_file
from potstill.validate.task import TASKS, Model

SCHEMES: dict[str, dict[str, Any]] = {
    "static": {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True},
    "mse": {"method": "static", "activation": "int8", "weight": "int8", "per_channel": True, "calibration": "mse"},
    "dynamic": {"method": "dynamic", "weight": "int8", "per_channel": True},
    "float16": {"method": "float16"},
}


class Own(nn.Module):
    """Convolutions of three kinds, and a recurrent layer if asked for."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(),
            nn.Conv2d(8, 16, 1), nn.GELU(),
        )  # fmt: skip
        self.run = nn.GRU(16, 16, batch_first=True) if recurrent else nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4)."""
        found = self.run(self.layers(x).flatten(2).transpose(1, 2))
        return self.out((found[0] if isinstance(found, tuple) else found).amax(dim=1))  # type: ignore[no-any-return]


def made(task: str, checkpoint: str, data: str, columns: dict[str, str]) -> tuple[Model, Examples]:
    """The model and examples."""
    if not task.startswith("own"):
        return TASKS[task].load(Checkpoint(checkpoint)), TASKS[task].examples(data, columns)
    core = Own(task == "own-recurrent").eval()
    x = np.random.default_rng(0).normal(size=(16, 3, 12, 12)).astype(np.float32)
    examples = Examples("made", Arrays({"x": x}), np.zeros(16, dtype=np.int64), None, "d")
    return Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core), examples


def main(task: str, checkpoint: str, data: str, out: str, column: str) -> None:
    """Export and quantise; print the task, and name and hash of every file."""
    model, examples = made(task, checkpoint, data, {"text": column} if column else {})
    graph = Path(out, "graph.onnx")
    export_graph(model, examples, graph, 20)
    for name, scheme in SCHEMES.items():
        if name != "dynamic" or task != "own":  # its convolutions have no dynamic form
            quantize(graph, Path(out, f"{name}.onnx"), Scheme(**scheme, why="test"), examples, model.encode, 0)
    print(task, *(f"{path.name}={sha256_file(path)}" for path in sorted(Path(out).iterdir())))


if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        main(*words)
