"""Students: cut from the teacher, or of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.compress.student import Student, layers_of
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Examples, load_examples
from potstill.validate.errors import InputError
from potstill.validate.task import TASKS, Model

TEXT, IMAGE, MODULE = TASKS["text-classification"], TASKS["image-classification"], TASKS["module"]


@pytest.fixture(scope="module")
def bert(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


@pytest.fixture(scope="module")
def vit(image_teacher: Path) -> Model:
    return IMAGE.load(Checkpoint(str(image_teacher)))


@pytest.fixture(scope="module")
def train(bert: Model, texts: dict[str, Path]) -> Examples:
    return load_examples(str(texts["train"]), TEXT.features, {"text": "sentence"}).with_labels(bert.labels)


@pytest.fixture(scope="module")
def images(vit: Model, pictures: dict[str, Path]) -> Examples:
    return load_examples(str(pictures["train"]), IMAGE.features, {}).with_labels(vit.labels)


def layer(model: Model, index: int) -> dict[str, torch.Tensor]:
    return {k.split(f"layer.{index}.")[1]: v for k, v in model.core.state_dict().items() if f"layer.{index}." in k}


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_a_cut_by_depth_keeps_the_teachers_layers(bert: Model, layers: int, kept: list[int]) -> None:
    student = Student(layers=layers)(bert, TEXT, {}, 0)
    assert student.core.config.num_hidden_layers == layers
    for mine, theirs in enumerate(kept):
        ours, wanted = layer(student, mine), layer(bert, theirs)
        assert len(ours) == 16
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert torch.equal(student.core.classifier.weight, bert.core.classifier.weight)
    assert student.encode is bert.encode


def test_all_layers_kept_computes_the_same(bert: Model) -> None:
    student = Student(layers=4)(bert, TEXT, {}, 0)
    inputs = bert.batch({"text": ["the film is good"]}, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(student.module(*inputs), bert.module(*inputs))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"layers": 2, "pick": "first"}, [0, 1]),
        ({"layers": (1, 2)}, [1, 2]),
        ({"layers": 2, "pick": "importance"}, [1, 2]),  # of the largest block influence in this teacher
    ],
)
def test_which_layers(bert: Model, train: Examples, settings: dict[str, Any], kept: list[int]) -> None:
    student = Student(**settings)(bert, TEXT, {}, 0, train)
    for mine, theirs in enumerate(kept):
        assert torch.equal(layer(student, mine)["output.dense.weight"], layer(bert, theirs)["output.dense.weight"])
    assert student.core.config.num_hidden_layers == 2


def test_a_cut_by_width_keeps_whole_heads_and_the_same_hidden_dimensions_everywhere(
    bert: Model, train: Examples
) -> None:
    student = Student(layers=2, hidden=16)(bert, TEXT, {}, 0, train)
    config = student.core.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 2, 32)
    ours, theirs = student.core.state_dict(), bert.core.state_dict()
    key = "bert.embeddings.word_embeddings.weight"
    hidden = [int(i) for i in range(32) if any(torch.equal(theirs[key][:, i], ours[key][:, k]) for k in range(16))]
    assert len(hidden) == 16
    query, whole = "bert.encoder.layer.0.attention.self.query.weight", theirs[key.replace("word", "position")]
    assert torch.equal(ours[key.replace("word", "position")], whole[:, hidden])
    heads = [h for h in range(4) if torch.equal(theirs[query][8 * h : 8 * h + 8][:, hidden], ours[query][:8])]
    assert len(heads) == 1
    with torch.inference_mode():
        assert student.module(*student.batch({"text": ["a good film"]}, torch.device("cpu"))).isfinite().all()


def test_a_vision_transformer_is_cut_too(vit: Model, images: Examples) -> None:
    student = Student(layers=2, hidden=16, neurons=40)(vit, IMAGE, {}, 0, images)
    assert student.core.config.intermediate_size == 40
    assert student.parameters < vit.parameters / 3
    assert student.labels == vit.labels


@pytest.mark.parametrize("settings", [{"layers": 2}, {"hidden": 16}, {"neurons": 20}, {"vocabulary": "used"}])
def test_a_cut_opens_with_transformers(bert: Model, train: Examples, settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    student = Student(**settings)(bert, TEXT, {}, 0, train)
    student.save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    encoded = AutoTokenizer.from_pretrained(tmp_path)(["a good film"], return_tensors="pt")
    with torch.inference_mode():
        ours = student.module(*student.batch({"text": ["a good film"]}, torch.device("cpu")))
        assert torch.allclose(model.eval()(**encoded).logits, ours, atol=1e-6)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_layers_of(text_teacher: Path) -> None:
    assert layers_of(Checkpoint(str(text_teacher))) == 4


@pytest.mark.parametrize(
    ("student", "match"),
    [
        (Student(layers=5), "layers=5: the teacher has 4 layers, so a cut keeps 1 to 4"),
        (Student(layers=(0, 4)), r"layers=\[0, 4\]: the teacher's 4 layers are numbered from 0 to 3"),
        (Student(neurons=65), "neurons=65: the teacher's feed-forward is 64 wide, so a cut keeps 1 to 64"),
        (Student(rank=32), "rank=32 makes none of the layers' weights .32 × 32, 32 × 64, 64 × 32. smaller"),
        (Student(hidden=20), "hidden=20: a multiple of 8 is needed, for the teacher's head size 8, and at most 32"),
        (Student(hidden=64), "hidden=64"),
    ],
)
def test_cuts_that_do_not_go(bert: Model, train: Examples, student: Student, match: str) -> None:
    with pytest.raises(InputError, match=match):
        student(bert, TEXT, {}, 0, train)


@pytest.mark.parametrize(
    "settings", [{"hidden": 16}, {"neurons": 8}, {"vocabulary": 20}, {"layers": 1, "pick": "importance"}]
)
def test_a_cut_by_the_examples_asks_for_them(bert: Model, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cut by the training examples, and there are none: give data.train"):
        Student(**settings)(bert, TEXT, {}, 0)


def test_an_architecture_without_layers_to_count() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    core = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    teacher = Model(core, None, ("pixel_values",), ("a", "b"), Checkpoint("x"), core)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a resnet has no single .*give --student CHECKPOINT"):
        Student(layers=1)(teacher, IMAGE, {}, 0)


def test_a_factory_is_not_cut() -> None:
    core = torch.nn.Linear(2, 2)
    teacher = Model(core, None, ("x",), ("0", "1"), Checkpoint("a.b:c"), core)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a factory's module cannot be cut"):
        Student(layers=1)(teacher, MODULE, {}, 0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "neither is given"),
        ({"layers": 2, "checkpoint": "x"}, "both are given"),
        ({"checkpoint": "x", "weights": "w.th"}, "weights go with package.module:factory only"),
        ({"layers": True}, "expected a number of layers from 1, or their indices from 0, rising; given True"),
        ({"layers": [2, 0]}, r"rising; given \[2, 0\]"),
        ({"layers": []}, r"rising; given \[\]"),
        ({"layers": [0, 1], "pick": "first"}, "pick: first chooses among layers, and layers gives no number"),
        ({"hidden": 8, "pick": "importance"}, "layers gives no number of them"),
        ({"vocabulary": "all"}, "expected 'used', or the largest number of tokens; given 'all'"),
        ({"rank": 1.5}, "expected a share of the full rank above 0 and below 1, or a whole rank; given 1.5"),
        ({"rank": 0}, "or a whole rank; given 0"),
    ],
)
def test_settings_that_say_no_student(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Student(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 2}, "2 of 4 layers"),
        ({"layers": [0, 3], "hidden": 16}, "2 of 4 layers (0, 3), 16 of 32 wide"),
        ({"layers": 2, "pick": "importance", "neurons": 20}, "2 of 4 layers (importance), 20 of 64 neurons"),
        ({"vocabulary": "used", "rank": 0.25}, "tokens in use, rank 25%"),
        ({"vocabulary": 900, "rank": 64}, "at most 900 tokens, rank 64"),
        ({"checkpoint": "org/small"}, "org/small"),
    ],
)
def test_in_words(bert: Model, settings: dict[str, Any], words: str) -> None:
    assert Student(**settings).in_words(bert) == words


def distilbert(folder: Path, bert: Path) -> Path:
    """A DistilBERT with the tokenizer of the BERT."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=25, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def test_a_distilbert_is_fed_only_what_it_takes_and_cut_whole(
    text_teacher: Path, train: Examples, tmp_path: Path
) -> None:
    teacher = TEXT.load(Checkpoint(str(distilbert(tmp_path, text_teacher))))
    assert teacher.input_names == ("input_ids", "attention_mask")
    student = Student(layers=2, hidden=16)(teacher, TEXT, {}, 0, train)
    assert (student.core.config.n_layers, student.core.config.dim, student.core.config.hidden_dim) == (2, 16, 32)


def test_an_architecture_that_cannot_be_cut_says_so(text_teacher: Path, tmp_path: Path) -> None:
    from transformers import SwinConfig, SwinForImageClassification, ViTImageProcessorPil

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    SwinForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    teacher = IMAGE.load(Checkpoint(str(tmp_path)))
    with pytest.raises(InputError, match="give --student CHECKPOINT"):
        Student(layers=1)(teacher, IMAGE, {}, 0)
