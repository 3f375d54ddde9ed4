from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from potstill.compress.lesson import Lesson
from potstill.compress.likeness import cka, likeness, likeness_from_json
from potstill.compress.student import Student
from potstill.compress.terms import terms
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.task import Model, ModuleClassification, TextClassification


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """CKA by the empirical HSIC with linear kernels, tr(K H L H) / (n - 1)² (Kornblith 2019, equations 3 and 4)."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n

    def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
        return float(np.trace(k @ h @ l @ h)) / (n - 1) ** 2

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def features_cka(x: np.ndarray, y: np.ndarray) -> float:
    """CKA by features: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


@pytest.mark.parametrize("reference", [hsic_cka, features_cka])
@pytest.mark.parametrize("width", [3, 90])
def test_cka_is_what_the_paper_says(reference: Any, width: int) -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(40, 7)) + 5, rng.normal(size=(40, width))
    y = x @ rng.normal(size=(7, width)) + noise
    found = cka([x, noise], [y, x])
    expected = [[reference(a.astype(np.float64), b) for b in (y, x)] for a in (x, noise)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found[0, 1] == pytest.approx(1)
    assert found[1, 1] < found[0, 0] < 0.999


def test_cka_does_not_see_a_rotation_and_a_scale() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 6)).astype(np.float32)
    turned = 7 * x @ np.linalg.qr(rng.normal(size=(6, 6)))[0] - 3
    assert cka([x], [turned])[0, 0] == pytest.approx(1, abs=1e-6)


def test_a_constant_layer_is_like_nothing() -> None:
    x = np.random.default_rng(2).normal(size=(30, 6))
    found = cka([x, np.full((30, 4), 1 / 3, np.float32)], [x])
    assert found[0, 0] == pytest.approx(1)
    assert np.isnan(found[1, 0])


def lesson(task: Any, teacher: Model, train: Examples, tmp_path: Path, held_out: int = 60) -> Lesson:
    return Lesson(task, teacher, train, train.take(range(held_out), "held out"), 0, tmp_path)


def test_layers_of_transformers_over_real_tokens(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    teacher = TextClassification().load(Checkpoint(str(text_teacher)))
    student = Student(layers=2)(teacher, TextClassification(), {}, 0)
    learn = lesson(
        TextClassification(), teacher, load_examples(str(texts["train"]), ("text",), {"text": "sentence"}), tmp_path
    )
    found = likeness(student, learn, terms({"kl": 1, "hidden": 0.5, "relations": 0.1}))
    assert found
    assert found.student == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert found.teacher == [f"bert.encoder.layer.{i}" for i in range(4)]
    assert found.matched == [(0, 1), (1, 3)]  # hidden spreads evenly, relations match the last
    assert (found.examples, found.data) == (60, learn.held_out.name)
    # the same once more, one text at a time and so without padding, by transformers' own hidden states
    states: list[list[np.ndarray]] = [[], []]
    for text in learn.held_out.rows(range(60))["text"]:
        for kept, model in zip(states, (student, teacher), strict=True):
            core: Any = model.core
            encoded = model.encode.tokenizer(text, return_tensors="pt")  # type: ignore[attr-defined]
            with torch.no_grad():
                hidden = core(**encoded, output_hidden_states=True).hidden_states[1:]
            kept.append(torch.stack(hidden)[:, 0].mean(dim=1).double().numpy())
    ours, theirs = (np.stack(kept, axis=1) for kept in states)
    expected = [[hsic_cka(x, y) for y in theirs] for x in ours]
    np.testing.assert_allclose(np.array(found.cka, dtype=float), expected, atol=1e-5)
    assert likeness_from_json(found.to_json()) == found


class Net(nn.Module):
    """Pixels (B, 12, 12, 3) to logits (B, 4), with maps of 12 × 12 and 6 × 6; `dead` gives the second one as zeros."""

    def __init__(self, width: int, dead: bool = False) -> None:
        super().__init__()
        self.late = nn.Conv2d(width, width, 3, padding=1)
        self.early = nn.Conv2d(3, width, 3, padding=1)
        self.end = nn.Linear(width, 4)
        if dead:
            nn.init.zeros_(self.late.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.early(x.permute(0, 3, 1, 2) / 255))
        return self.end(self.late(nn.functional.max_pool2d(first, 2)).mean(dim=(2, 3)))


def module(core: nn.Module) -> Model:
    return Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("tests.none:made"), core)


def test_maps_of_convolutions_in_the_order_in_which_they_run(arrays: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = module(Net(5)), module(Net(9))
    learn = lesson(ModuleClassification(), teacher, load_examples(f"{arrays}:train", ("x",), {}), tmp_path, held_out=40)
    found = likeness(student, learn, terms({"kl": 1, "features": 1}))
    assert found
    assert found.student == found.teacher == ["early", "late"]
    assert found.matched == [(0, 0), (1, 1)]
    x = torch.from_numpy(np.asarray(learn.held_out.rows(range(40))["x"])).float().permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        early = [model.core.get_submodule("early")(x).mean(dim=(2, 3)).double().numpy() for model in (student, teacher)]
    assert found.cka[0][0] == pytest.approx(hsic_cka(*early), abs=1e-5)
    assert not any(module._forward_hooks for module in (*student.core.modules(), *teacher.core.modules()))


def test_a_dead_layer_has_no_likeness(arrays: Path, tmp_path: Path) -> None:
    student, teacher = module(Net(5, dead=True)), module(Net(9))
    learn = lesson(ModuleClassification(), teacher, load_examples(f"{arrays}:train", ("x",), {}), tmp_path)
    found = likeness(student, learn)
    assert found
    assert found.cka[1] == [None, None]
    assert all(value is not None for value in found.cka[0])
    assert found.matched == []


def test_a_model_without_layers_has_none(arrays: Path, tmp_path: Path) -> None:
    flat = module(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)))
    learn = lesson(ModuleClassification(), module(Net(9)), load_examples(f"{arrays}:train", ("x",), {}), tmp_path)
    assert likeness(flat, learn) is None


def test_at_most_256_examples_are_read_sixteen_at_a_time(arrays: Path, tmp_path: Path) -> None:
    student, teacher = module(Net(5)), module(Net(9))
    seen: list[int] = []
    student.core.get_submodule("late").register_forward_hook(
        lambda _module, inputs, _output: seen.append(len(inputs[0]))
    )
    learn = lesson(
        ModuleClassification(), teacher, load_examples(f"{arrays}:train", ("x",), {}), tmp_path, held_out=600
    )
    found = likeness(student, learn)
    assert found
    assert found.examples == 256
    assert seen[-16:] == [16] * 16
