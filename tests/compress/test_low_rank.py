"""Weights as products of two thinner ones: the best such product, and a checkpoint that opens again."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from potstill.compress.low_rank import factorise, factors
from potstill.compress.student import Student
from potstill.export.graph import export_graph
from potstill.validate.checkpoint import RECORD, Checkpoint
from potstill.validate.data import load_examples
from potstill.validate.errors import InputError
from potstill.validate.low_rank import LowRank, ranks_of
from potstill.validate.task import TASKS, Model

TEXT, CPU = TASKS["text-classification"], torch.device("cpu")
ROWS = {"text": ["the film is good and bright", "a dull plot"]}


@pytest.fixture
def bert(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        outputs: torch.Tensor = model.module(*model.batch(ROWS, CPU))
    return outputs


@pytest.mark.parametrize(("shape", "rank"), [((12, 30), 5), ((30, 12), 1), ((16, 16), 16)])
def test_no_product_of_that_rank_is_nearer(shape: tuple[int, int], rank: int) -> None:
    """The squared error is the sum of the squared singular values left out, those by numpy in float64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tall, flat = factors(weight, rank)
    assert (tall.shape, flat.shape) == ((shape[0], rank), (rank, shape[1]))
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    error = np.square(weight.double().numpy() - tall.double().numpy() @ flat.double().numpy()).sum()
    assert error == pytest.approx(np.square(values[rank:]).sum(), rel=1e-5, abs=1e-9)


def test_the_full_rank_gives_the_same_function(bert: Model) -> None:
    before = logits(bert)
    for layer in bert.core.bert.encoder.layer:  # type: ignore[union-attr]
        old = layer.intermediate.dense  # type: ignore[union-attr]
        new = LowRank(32, 32, 64, bias=True)
        tall, flat = factors(old.weight, 32)  # type: ignore[arg-type]
        new.load_state_dict({"0.weight": flat, "1.weight": tall, "1.bias": old.bias})
        layer.intermediate.dense = new  # type: ignore[union-attr]
    assert torch.allclose(logits(bert), before, atol=1e-5)


def test_only_what_gets_smaller_is_replaced(bert: Model) -> None:
    student = Student(rank=0.5)(bert, TEXT, {}, 0)
    ranks = ranks_of(student.core)
    assert ranks == {
        f"bert.encoder.layer.{i}.{name}.dense": 16 for i in range(4) for name in ("intermediate", "output")
    }
    assert student.parameters == bert.parameters - 8 * (32 * 64 - 16 * (32 + 64))
    assert {*ranks_of(Student(rank=5)(bert, TEXT, {}, 0).core).values()} == {5}
    assert len(ranks_of(Student(rank=15)(bert, TEXT, {}, 0).core)) == 4 * 6
    assert not ranks_of(bert.core)


def test_it_is_saved_and_opened_with_its_structure(bert: Model, tmp_path: Path) -> None:
    student = Student(layers=2, rank=0.25)(bert, TEXT, {}, 0)
    student.save(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text()) == {"low_rank": ranks_of(student.core)}
    again = TEXT.load(Checkpoint(str(tmp_path)), bert.labels)
    assert torch.equal(logits(again), logits(student))
    assert (again.parameters, again.fresh) == (student.parameters, ())


def test_its_graph_is_smaller_and_computes_the_same(bert: Model, texts: dict[str, Path], tmp_path: Path) -> None:
    student = Student(rank=4)(bert, TEXT, {}, 0)
    samples = load_examples(str(texts["calibrate"]), TEXT.features, {"text": "sentence"})
    export_graph(student, samples, tmp_path / "low.onnx", 20)
    stored = sum(int(np.prod(w.dims)) for w in onnx.load(tmp_path / "low.onnx").graph.initializer)
    assert stored == pytest.approx(student.parameters, rel=0.05)
    assert student.parameters < 0.5 * bert.parameters
    session = onnxruntime.InferenceSession(str(tmp_path / "low.onnx"), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    inputs = {name: array for name, array in student.encode(ROWS).items() if name in names}
    assert np.allclose(session.run(None, inputs)[0], logits(student).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"bert.pooler": 3}, "has no Linear 'bert.pooler' of a rank from 3"),
        ({"bert.pooler.dense": 33}, "has no Linear 'bert.pooler.dense' of a rank from 33"),
        ({"bert.pooler.dense": "4"}, "expected a rank above 0 for the path of each module"),
        ({"bert.pooler.dense": 0}, "expected a rank above 0 for the path of each module"),
        (["bert.pooler.dense"], "expected a rank above 0 for the path of each module"),
        ({"bert.pooler.dense": 3}, "does not fit .* is foreign"),
    ],
)
def test_a_record_that_does_not_fit(bert: Model, record: object, match: str, tmp_path: Path) -> None:
    bert.save(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({"low_rank": record}))
    with pytest.raises(InputError, match=match):
        TEXT.load(Checkpoint(str(tmp_path)))


def test_a_record_of_another_rank(bert: Model, tmp_path: Path) -> None:
    Student(rank=0.25)(bert, TEXT, {}, 0).save(tmp_path)
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text().replace(": 8", ": 7"))
    with pytest.raises(InputError, match="cannot open .*size mismatch"):
        TEXT.load(Checkpoint(str(tmp_path)))


def test_missing_weights_are_told(bert: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    Student(rank=0.25)(bert, TEXT, {}, 0).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("bert.encoder.layer.0.output.dense.0.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="holds no trained weights for bert.encoder.layer.0.output.dense.0.weight"):
        TEXT.load(Checkpoint(str(tmp_path)))


def test_factorise_says_what_it_did(bert: Model) -> None:
    assert factorise(bert.core, 2) == ranks_of(bert.core)
    with pytest.raises(InputError, match="rank=2 makes none of the layers' weights"):
        factorise(bert.core, 2)
