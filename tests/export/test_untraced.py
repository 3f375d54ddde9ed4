"""What cannot be written as ONNX is named, with the user's own module and line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.export.graph import export_graph
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import TASKS, Model

pytestmark = pytest.mark.usefixtures("exported_anew")


def images() -> Examples:
    x = np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(4, dtype=np.int64), None, "d")


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.special.bessel_j0(x)
        return found


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Compared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.equal(x, x.abs()) else x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such vocabulary")


class Outer(nn.Module):
    """A part that cannot be exported, two levels down."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Sequential(nn.ReLU(), part)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)[:, :4]


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), start=1) if line.strip() == text)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (
            Bessel(),
            r"the operator prims.bessel_j0 of blocks.1.1 \(Bessel\), test_untraced.py line "
            rf"{line_of('found: Tensor = torch.special.bessel_j0(x)')}, has no ONNX form; write it",
        ),
        (
            Branch(),
            r"what it does next is data-dependent in blocks.1.1 \(Branch\), test_untraced.py line "
            rf"{line_of('if x.sum() > 0:')}: `if x.sum\(\) > 0:`; choose by torch.where",
        ),
        (Compared(), r"what it does next is data-dependent in blocks.1.1 \(Compared\), test_untraced.py line "),
        (Failing(), r".no such vocabulary. \(in blocks.1.1 \(Failing\), test_untraced.py line .*: `raise KeyError"),
    ],
)
def test_the_module_and_the_line(part: nn.Module, match: str, tmp_path: Path) -> None:
    core = Outer(part).eval()
    model = Model(core, ArrayEncoder(), ("x",), tuple("abcd"), Checkpoint("made:up"), core)
    with pytest.raises(InputError, match=rf"made:up cannot be exported to ONNX: {match}"):
        export_graph(model, images(), tmp_path / "g.onnx", 20)
    assert not list(tmp_path.iterdir())


def test_inside_a_transformers_model(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)))
    model.core.bert.encoder.layer[2].output.dropout = Bessel()  # type: ignore[union-attr,index]
    sentences = load_examples(str(texts["eval"]), ("text",), {"text": "sentence"})
    with pytest.raises(
        InputError, match=r"prims.bessel_j0 of bert.encoder.layer.2.output.dropout \(Bessel\), test_unt"
    ):
        export_graph(model, sentences, tmp_path / "g.onnx", 20)
