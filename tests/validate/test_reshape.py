"""Shapes that are recorded as data, and every record that is refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from potstill.validate.checkpoint import Checkpoint, beside, build_module
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, write_json
from potstill.validate.reshape import attributes_of, mark, record_of, recorded, reshape
from potstill.validate.task import TASKS


class Small(nn.Module):
    """Each kind of module that can be reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.conv, self.batch = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
        self.sound, self.last = nn.Conv1d(4, 6, 3), nn.Linear(4, 9, bias=False)
        self.last.weight = self.words.weight


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


SHAPES = {
    "words.weight": (8, 3), "norm.weight": (3,), "norm.bias": (3,), "conv.weight": (3, 1, 3, 3), "conv.bias": (3,),
    "batch.weight": (3,), "batch.bias": (3,), "batch.running_mean": (3,), "batch.running_var": (3,),
    "sound.weight": (5, 3, 3), "sound.bias": (5,),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_module_takes_the_shapes_and_says_so(device: str) -> None:
    module: Any = small().to(device)
    module.last.weight = module.words.weight  # moving to meta unties them
    reshape(module, SHAPES, {"conv.groups": 3})
    assert {name: tuple(p.shape) for name, p in module.state_dict().items() if name in SHAPES} == SHAPES
    assert (module.conv.in_channels, module.conv.out_channels, module.conv.groups) == (3, 3, 3)
    assert (module.sound.in_channels, module.sound.out_channels) == (3, 5)
    assert (module.words.num_embeddings, module.words.embedding_dim) == (8, 3)
    assert (module.norm.normalized_shape, module.batch.num_features) == ((3,), 3)
    assert module.last.weight is module.words.weight  # shared as before
    assert (module.last.in_features, module.last.out_features) == (3, 8)
    assert {parameter.device.type for parameter in module.parameters()} == {device}


def test_only_what_is_marked_is_recorded_and_copies_keep_the_mark() -> None:
    module = small()
    assert record_of(module) == {}
    mark(module)
    assert record_of(copy.deepcopy(module)) == {"reshaped": {"attributes": {"conv.groups": 4, "sound.groups": 1}}}
    assert recorded(record_of(module)) == dict(attributes_of(module))
    assert recorded({"factory": "a:b"}) is None


@pytest.mark.parametrize(
    ("shapes", "attributes", "match"),
    [
        ({}, {"conv.__class__": 1}, "would set conv.__class__; only all_head_size, groups"),
        ({}, {"conv.stride": 1}, "would set conv.stride; only"),
        ({}, {"none.groups": 1}, "would set none.groups to 1; the model has None"),
        ({}, {"conv.num_heads": 1}, "would set conv.num_heads to 1; the model has None"),
        ({}, {"conv.groups": 8}, "would set conv.groups to 8; the model has 4, and it can but shrink"),
        ({}, {"conv.groups": 0}, "would set conv.groups to 0"),
        ({"last.weight": (10, 4)}, {}, r"last.weight of shape \(10, 4\), the model has \(9, 4\)"),
        ({"last.weight": (0, 4)}, {}, r"last.weight of shape \(0, 4\)"),
        ({"last.weight": (36,)}, {}, r"last.weight of shape \(36,\)"),
    ],
)
def test_what_is_not_allowed(shapes: dict[str, Any], attributes: dict[str, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        reshape(small(), shapes, attributes)


def test_a_kind_of_module_that_cannot_be_reshaped() -> None:
    with pytest.raises(InputError, match="0 is a PReLU, whose shapes cannot be recorded"):
        reshape(nn.Sequential(nn.PReLU(4)), {"0.weight": (3,)}, {})


@pytest.mark.parametrize(
    "record", [7, {}, {"attributes": [1]}, {"attributes": {"a": "1"}}, {"attributes": {"a": True}}]
)
def test_records_of_another_form(record: Any) -> None:
    with pytest.raises(InputError, match="'reshaped' holds .*; expected 'attributes', names with whole numbers"):
        recorded({"reshaped": record})


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.usefixtures("_importable")
def test_a_factorys_record_lies_beside_its_weights(tmp_path: Path) -> None:
    module = small()
    reshape(module, SHAPES, {"conv.groups": 3})
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    source = Checkpoint("test_reshape:small")
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "model.safetensors"
    save_file({k: v for k, v in module.state_dict().items() if k != "last.weight"}, weights)
    with pytest.raises(InputError, match="size mismatch|shape"):
        build_module(Checkpoint(source.source, weights))
    plain = Checkpoint(source.source, weights).digest()
    write_json(tmp_path / "a" / "potstill.json", record_of(module))
    again = build_module(Checkpoint(source.source, weights))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())
    assert Checkpoint(source.source, weights).digest() != plain
    other = shutil.copy(weights, tmp_path / "a" / "other.safetensors")
    assert beside(Path(other)) == {}  # the record is not of that file


def test_a_transformers_folder_without_its_record_is_the_error_it_was(text_teacher: Path, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    model = task.load(Checkpoint(str(text_teacher)))
    bert: Any = model.core
    for name in ("query", "key", "value"):
        linear = getattr(bert.bert.encoder.layer[0].attention.self, name)
        linear.weight, linear.bias = nn.Parameter(linear.weight[:8].clone()), nn.Parameter(linear.bias[:8].clone())
    output = bert.bert.encoder.layer[0].attention.output.dense
    output.weight = nn.Parameter(output.weight[:, :8].clone())
    bert.bert.encoder.layer[0].attention.self.num_attention_heads = 1
    mark(bert)
    model.save(tmp_path)
    inputs = model.batch({"text": ["a good film"]}, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(task.load(Checkpoint(str(tmp_path))).module(*inputs), model.module(*inputs))
    record = read_json(tmp_path / "potstill.json")
    assert record["reshaped"]["attributes"]["bert.encoder.layer.0.attention.self.num_attention_heads"] == 1
    (tmp_path / "potstill.json").unlink()
    with pytest.raises(InputError, match="attention.*(query|output|key|value)|mismatch"):
        task.load(Checkpoint(str(tmp_path)))
