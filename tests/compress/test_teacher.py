"""Several teachers: how they are joined, and which cannot be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.teacher import Teacher, identity, together
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import ArrayEncoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (3, 20, 5))
WEIGHTS = np.array([0.5, 0.3, 0.2])


def joined(weighing: Any, logs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return together(torch.from_numpy(logs).float(), torch.from_numpy(WEIGHTS).float(), weighing).double().numpy()


def test_fixed_weights_give_the_geometric_mean() -> None:
    wanted = np.einsum("m,mrc->rc", WEIGHTS, LOGITS)  # of the logits, which is the same up to a constant
    found = joined("fixed", log_softmax(LOGITS, axis=2))
    assert np.allclose(log_softmax(found, axis=1), log_softmax(wanted, axis=1), atol=1e-5)


def test_confidence_weighs_each_example_by_the_inverse_entropy() -> None:
    logs = log_softmax(LOGITS, axis=2)
    wanted = np.empty((20, 5))
    for row in range(20):
        shares = np.array([w / -(np.exp(x[row]) * x[row]).sum() for w, x in zip(WEIGHTS, logs, strict=True)])
        wanted[row] = (shares / shares.sum()) @ logs[:, row]
    assert np.allclose(joined("confidence", logs), wanted, atol=1e-5)


def test_a_teacher_without_doubt_decides_and_gives_no_nan() -> None:
    logits = LOGITS.copy()
    logits[1, :, 2] = 300.0
    found = joined("confidence", log_softmax(logits, axis=2))
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == 2).all()


def answering(values: Any, labels: tuple[str, ...], name: str = "torch.nn:Identity") -> Model:
    """A model that says the same of every row."""

    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(values))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits + torch.zeros(len(x), 1)

    core = Says()
    return Model(core, ArrayEncoder(), ("x",), labels, Checkpoint(name), core)


def test_classes_in_another_order_are_put_in_the_first_teachers() -> None:
    one, other = answering([1.0, 2.0, 4.0], ("a", "b", "c")), answering([4.0, 1.0, 2.0], ("c", "a", "b"))
    taught = Teacher([one, other], [1, 3], "fixed", CPU)([{"x": torch.zeros(2, 1)}] * 2)
    assert taught.outputs is not None
    assert torch.allclose(taught.outputs, torch.log_softmax(torch.tensor([1.0, 2.0, 4.0]), 0).expand(2, 3))


def test_weights_are_shares() -> None:
    members = [answering([0.0, 4.0], ("a", "b")), answering([0.0, 0.0], ("a", "b"))]
    taught = Teacher(members, [3, 1], "fixed", CPU)([{"x": torch.zeros(1, 1)}] * 2)
    assert taught.outputs is not None
    assert (taught.outputs[0, 1] - taught.outputs[0, 0]).item() == pytest.approx(3.0)


def test_one_teacher_says_its_own_logits() -> None:
    taught = Teacher([answering([1.0, 5.0], ("a", "b"))], [2], "confidence", CPU)([{"x": torch.zeros(1, 1)}])
    assert taught.outputs is not None
    assert taught.outputs.tolist() == [[1.0, 5.0]]
    assert not taught.outputs.requires_grad


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (("a", "c"), "teachers must have the same classes: torch.nn:Identity has a, b, torch.nn:Linear has a, c"),
        (("a", "b", "c"), "the same classes"),
        ((), "torch.nn:Linear has none"),
    ],
)
def test_teachers_of_other_classes(labels: tuple[str, ...], match: str) -> None:
    one, other = answering([0.0, 1.0], ("a", "b")), answering([0.0] * len(labels), labels, "torch.nn:Linear")
    with pytest.raises(InputError, match=match):
        Teacher([one, other], [1, 1], "fixed", CPU)


def test_who_teaches_is_told_from_weights_order_and_weighing() -> None:
    one, other = answering([0.0, 1.0], ("a", "b")), answering([0.5, 1.0], ("a", "b"))
    found = {
        identity([one], [1], "fixed"),
        identity([other], [1], "fixed"),
        identity([one, other], [1, 1], "fixed"),
        identity([one, other], [1, 2], "fixed"),
        identity([other, one], [1, 1], "fixed"),
        identity([one, other], [1, 1], "confidence"),
    }
    assert len(found) == 6
    assert identity([one], [1], "fixed") == identity([one], [5], "fixed")  # alone, its weight says nothing


@pytest.fixture
def letters(tmp_path: Path) -> Model:
    """An untrained DistilBERT that reads letters, with the two classes the other way round."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocab), dim=16, n_heads=2, hidden_dim=24, n_layers=1, max_position_embeddings=96, pad_token_id=0,
        id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1},
    )  # fmt: skip
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "letters")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "letters")
    return TASKS["text-classification"].load(Checkpoint(str(tmp_path / "letters")))


def test_two_architectures_with_two_tokenizers_teach_one_student(
    lesson: Lesson, letters: Model, fresh: Callable[..., Model], tmp_path: Path
) -> None:
    assert isinstance(letters.encode, TextEncoder)
    both = dataclasses.replace(lesson, others=(letters,), weights=(9.0, 1.0), outputs=tmp_path / "outputs")
    student = fresh()
    log = Distill(epochs=6, learning_rate=3e-3, losses={"kl": 1.0})(student, both)
    assert log[-1]["taught_rows"] == 572
    first, second, ours = (
        predicted(TorchPredictor(model, "m", CPU), lesson.held_out) for model in (lesson.teacher, letters, student)
    )
    wanted = 0.9 * log_softmax(first, axis=1) + 0.1 * log_softmax(second[:, ::-1], axis=1)
    assert (ours.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.95
    eval_loss = min(entry["eval_loss"] for entry in log if "eval_loss" in entry)
    p, q = (log_softmax(x / 2, axis=1) for x in (wanted, ours))
    assert eval_loss == pytest.approx(4 * (np.exp(p) * (p - q)).sum(axis=1).mean(), rel=0.02)


def test_two_teachers_and_layers_of_the_first(lesson: Lesson, letters: Model, fresh: Callable[..., Model]) -> None:
    both = dataclasses.replace(lesson, others=(letters,))
    log = Distill(epochs=0.2, losses={"kl": 1.0, "hidden": 1.0}, weighing="confidence")(fresh(), both)
    assert {"kl", "hidden"} <= set(log[0])
