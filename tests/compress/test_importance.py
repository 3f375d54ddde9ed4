"""Importance: what is measured, and that keeping by it is better than keeping what comes first."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from potstill.compress import student as student_file
from potstill.compress.anatomy import spaces_of
from potstill.compress.importance import block_influence, most_important, taylor_importance
from potstill.compress.student import Student
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import IGNORED, Arrays, Examples, load_examples
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TEXT, CPU = TASKS["text-classification"], torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def bert(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


@pytest.fixture(scope="module")
def parts(bert: Model, texts: dict[str, Path]) -> dict[str, Examples]:
    return {
        name: load_examples(str(path), TEXT.features, {"text": "sentence"}).with_labels(bert.labels)
        for name, path in texts.items()
    }


def architecture(name: str) -> Any:
    """A small untrained model and inputs for it."""
    import transformers as hf

    torch.manual_seed(1)
    match name:
        case "bert":
            model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=30, **SMALL))
        case "roberta":
            model = hf.RobertaForSequenceClassification(hf.RobertaConfig(vocab_size=30, **SMALL))
        case "distilbert":
            config = hf.DistilBertConfig(vocab_size=30, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
            model = hf.DistilBertForSequenceClassification(config)
        case _:
            model = hf.ViTForImageClassification(hf.ViTConfig(image_size=12, patch_size=6, **SMALL))
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases too are to matter
            weight += 0.2 * torch.randn_like(weight)
    inputs = torch.randn(3, 3, 12, 12) if name == "vit" else torch.randint(2, 30, (3, 7))
    return model.eval(), inputs


def shuffle(core: torch.nn.Module, head_size: int) -> None:
    """Permute each space of a model: hidden dimensions, heads with their dimensions, neurons."""
    orders: dict[str, torch.Tensor] = {}
    weights = dict(core.named_parameters())
    for name, spaces in spaces_of(core).items():
        for dim, space in enumerate(found[0] if found else "" for found in spaces):
            if space and space != "vocabulary":
                size, unit = weights[name].shape[dim], head_size if space.startswith("heads") else 1
                if space not in orders:
                    groups = torch.randperm(size // unit)[:, None] * unit + torch.arange(unit)
                    orders[space] = groups.flatten()
                weights[name].data = weights[name].data.index_select(dim, orders[space])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "vit"])
def test_every_dimension_is_in_its_space(name: str) -> None:
    """A permutation of every space, through all the weights that it runs through, leaves the function as it was."""
    model, inputs = architecture(name)
    with torch.inference_mode():
        before = model(inputs).logits
    shuffle(model, head_size=8)
    with torch.inference_mode():
        assert torch.allclose(model(inputs).logits, before, atol=1e-5)


def test_an_architecture_of_another_layout_is_refused() -> None:
    import transformers as hf

    config = hf.DebertaV2Config(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(InputError, match="a deberta-v2 is not laid out like BERT.*give --student CHECKPOINT"):
        spaces_of(hf.DebertaV2ForSequenceClassification(config))


def test_taylor_against_its_formula_in_float64(bert: Model, parts: dict[str, Examples]) -> None:
    """Of a hidden dimension, a head and a neuron: Σ |w · ∂L/∂w|, each slope by central differences in float64."""
    examples = parts["train"].take([*range(16)], "one batch")
    scores = taylor_importance(bert, examples, spaces_of(bert.core), 0)
    module = bert.module.double()
    inputs, labels = bert.batch(examples.rows(range(16)), CPU), torch.from_numpy(examples.labels)

    def slope(weight: torch.Tensor, at: tuple[int, ...], step: float = 1e-5) -> float:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[at] += sign * step
                values.append(F.cross_entropy(module(*inputs), labels).item())
                weight[at] -= sign * step
        return (values[0] - values[1]) / (2 * step)

    layer = bert.core.get_submodule("bert.encoder.layer.1")
    up, down = layer.intermediate.dense, layer.output.dense  # type: ignore[union-attr]
    places = [(up.weight, (5, k)) for k in range(32)] + [(up.bias, (5,))] + [(down.weight, (k, 5)) for k in range(32)]  # type: ignore[union-attr]
    expected = sum(abs(weight[at].item() * slope(weight, at)) for weight, at in places)  # type: ignore[index, arg-type]
    module.float()
    assert scores["neurons.1"][5].item() == pytest.approx(expected, rel=1e-3)


def test_the_sum_over_all_spaces_of_a_weight_is_the_same(bert: Model, parts: dict[str, Examples]) -> None:
    """Rows and columns of the same weights: neurons' inputs and outputs lie in the hidden space too."""
    spaces = {name: found for name, found in spaces_of(bert.core).items() if name.endswith("intermediate.dense.weight")}
    scores = taylor_importance(bert, parts["calibrate"], spaces, 0)
    neurons = sum(scores[f"neurons.{i}"].sum() for i in range(4))
    assert torch.isclose(scores["hidden"].sum(), torch.as_tensor(neurons), rtol=1e-5)


def test_importance_needs_classes(bert: Model, parts: dict[str, Examples]) -> None:
    import dataclasses

    scored = dataclasses.replace(parts["train"], labels=np.linspace(0, 5, len(parts["train"])))
    with pytest.raises(InputError, match="importance is measured with class labels"):
        taylor_importance(bert, scored, spaces_of(bert.core), 0)


def test_block_influence_against_hidden_states(bert: Model, parts: dict[str, Examples]) -> None:
    examples = parts["calibrate"]
    tensors = bert.tensors(examples.rows(range(len(examples))), CPU)
    with torch.inference_mode():
        states = bert.core(**{k: tensors[k] for k in bert.input_names}, output_hidden_states=True).hidden_states
    real = tensors["attention_mask"].bool().numpy()
    h = [state.double().numpy()[real] for state in states]
    h = [tokens / np.linalg.norm(tokens, axis=1, keepdims=True) for tokens in h]
    cosine = [(before * after).sum(axis=1) for before, after in pairwise(h)]
    assert np.allclose(block_influence(bert, examples, 0), [1 - c.mean() for c in cosine], atol=1e-5)


def test_most_important_are_the_largest_in_their_order() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 9.0, 2.0, 2.5], dtype=torch.float64)
    assert most_important(scores, 3).tolist() == [3, 4, 5]


def loss_and_logits(model: Model, examples: Examples) -> tuple[float, np.ndarray]:
    logits = predicted(TorchPredictor(model, "a student", CPU), examples)
    return F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(examples.labels)).item(), logits


@pytest.mark.parametrize("hidden", [16, 24])
def test_keeping_by_importance_beats_keeping_what_comes_first(
    bert: Model, parts: dict[str, Examples], hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_importance, _ = loss_and_logits(Student(hidden=hidden)(bert, TEXT, {}, 0, parts["train"]), parts["eval"])
    first = lambda model, examples, spaces, seed: {  # noqa: E731
        space: -torch.arange(len(score)) for space, score in taylor_importance(model, examples, spaces, seed).items()
    }
    monkeypatch.setattr(student_file, "taylor_importance", first)
    leading, _ = loss_and_logits(Student(hidden=hidden)(bert, TEXT, {}, 0, parts["train"]), parts["eval"])
    assert by_importance < 0.8 * leading


def test_a_permuted_teacher_gives_the_same_student(bert: Model, parts: dict[str, Examples], text_teacher: Path) -> None:
    other = TEXT.load(Checkpoint(str(text_teacher)))
    torch.manual_seed(5)
    shuffle(other.core, head_size=8)
    _, theirs = loss_and_logits(other, parts["eval"])
    assert np.allclose(theirs, loss_and_logits(bert, parts["eval"])[1], atol=1e-4)
    settings = Student(layers=3, hidden=24, neurons=40)
    students = [settings(teacher, TEXT, {}, 0, parts["train"]) for teacher in (bert, other)]
    (_, one), (_, same) = (loss_and_logits(student, parts["eval"]) for student in students)
    assert np.allclose(one, same, atol=1e-4)
    assert not torch.equal(*(s.core.get_input_embeddings().weight for s in students))  # type: ignore[operator]


def test_importance_needs_labels(text_teacher: Path) -> None:
    model = TEXT.load(Checkpoint(str(text_teacher)))
    none = Examples("plain", Arrays({"text": np.array(["good"] * 20)}), np.full(20, IGNORED), None, "d")
    with pytest.raises(InputError, match="measured with labels, and plain has none; cut layers"):
        taylor_importance(model, none, spaces_of(model.core), 0)
