"""Pruning and quantisation-aware training of language models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from potstill.compress.distill import Distill
from potstill.compress.gates import importance
from potstill.compress.lesson import Lesson
from potstill.compress.prune import Prune
from potstill.compress.qat import Qat
from potstill.compress.student import Student
from potstill.compress.transformer_parts import encoder_of
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.files import read_json
from potstill.validate.quantized import FakeQuantized
from potstill.validate.task import TASKS, Model

TASK, CPU = TASKS["text-generation"], torch.device("cpu")
SHORT = Distill(epochs=0.2, learning_rate=1e-6)  # so little that what is left is what was cut


@pytest.fixture
def teacher(story_teacher: Path) -> Model:
    return TASK.load(Checkpoint(str(story_teacher)))


@pytest.fixture
def student(teacher: Model) -> Model:
    return Student(layers=4)(teacher, TASK, {}, 0)


@pytest.fixture
def lesson(teacher: Model, story_files: dict[str, Path], tmp_path: Path) -> Lesson:
    train = TASK.checked(TASK.examples(str(story_files["train"]), {}), (), encode=teacher.encode)
    return Lesson(TASK, teacher, train.take(range(64), "t"), train.take(range(160, 180), "h"), 0, tmp_path / "work")


def logits(model: Model) -> Tensor:
    ids = torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(0))
    core: Any = model.core
    with torch.inference_mode():
        found: Tensor = core(input_ids=ids).logits
    return found


def feed_forwards(model: Model) -> list[Any]:
    core: Any = model.core
    return [layer.mlp for layer in core.model.layers]


def test_importance_is_of_each_text_though_they_are_packed(student: Model, lesson: Lesson) -> None:
    """A gate's slope is Σ w ∂L/∂w over the weights that take the neuron, L the summed loss of one text by itself."""
    few, found = lesson.train.take(range(5), "few"), encoder_of(student.core)
    assert found
    measured = importance(student, [found.neuron_parts()[1]], few, CPU)[0]
    core: Any = student.core
    weight, expected = feed_forwards(student)[1].down_proj.weight, np.zeros(64)
    for tokens in few.rows(range(5))["tokens"]:
        core.zero_grad()
        ids = torch.tensor([tokens])
        torch.nn.functional.cross_entropy(core(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        expected += (weight * weight.grad).sum(dim=0).abs().detach().numpy() / 5
    np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=1e-6)


def test_silent_neurons_go_first_and_nothing_changes(student: Model, lesson: Lesson, tmp_path: Path) -> None:
    for i, layer in enumerate(feed_forwards(student)):
        layer.down_proj.weight.data[:, 10 * i : 10 * i + 4] = 0
    before = logits(student)
    log = Prune(neurons=4 / 64, distill=SHORT)(student, replace(lesson, teacher=student))
    cut = read_json(lesson.work / "round-1" / "cut.json")["neurons"]
    assert list(cut.values()) == [list(range(10 * i, 10 * i + 4)) for i in range(4)]
    assert [layer.gate_proj.out_features for layer in feed_forwards(student)] == [60] * 4
    torch.testing.assert_close(logits(student), before, rtol=1e-3, atol=1e-3)  # after a training at next to no rate
    assert log[0]["parameters"] - log[1]["parameters"] == 4 * 4 * 3 * 32
    student.save(tmp_path / "saved")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert opened.config.intermediate_size == 60
    torch.testing.assert_close(logits(replace(student, core=opened)), logits(student), rtol=1e-5, atol=1e-5)


def test_a_silent_layer_goes(student: Model, lesson: Lesson, tmp_path: Path) -> None:
    core: Any = student.core
    core.model.layers[2].mlp.down_proj.weight.data.zero_()
    core.model.layers[2].self_attn.o_proj.weight.data.zero_()
    before = logits(student)
    log = Prune(layers=1, distill=SHORT)(student, replace(lesson, teacher=student))
    assert core.config.num_hidden_layers == len(core.model.layers) == 3
    torch.testing.assert_close(logits(student), before, rtol=1e-3, atol=1e-3)
    per_token = (log[0]["macs"] - log[1]["macs"]) / longest(lesson)
    products = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q; k, v of half the heads; o; gate, up, down
    assert products <= per_token <= products + 2 * 32 * longest(lesson)  # and attention's own


def longest(lesson: Lesson) -> int:
    """Tokens of a row in which the first four examples stand one by one."""
    return max(len(tokens) for tokens in lesson.train.rows(range(4))["tokens"])


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [({"heads": 0.25}, "heads"), ({"channels": 0.25}, "channels"), ({"heads": 0.5, "layers": 1}, "heads or layers")],
)
def test_what_a_llama_does_not_lose(student: Model, lesson: Lesson, settings: dict[str, Any], kinds: str) -> None:
    match = f"prune: of LlamaForCausalLM no {kinds} can be removed: models of Llama's form .* lose layers and neurons"
    with pytest.raises(InputError, match=match):
        Prune(**settings)(student, lesson)


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_language_models_of_another_form_are_not_pruned(
    kind: str, student: Model, lesson: Lesson, story_teacher: Path
) -> None:
    config: Any = {
        "gpt2": transformers.GPT2Config(vocab_size=15, n_embd=32, n_layer=2, n_head=4),
        "mamba": transformers.MambaConfig(vocab_size=15, hidden_size=16, num_hidden_layers=2, state_size=4),
    }[kind]
    core = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"prune: of .* no neurons can be removed: .* other language models nothing"):
        Prune(neurons=0.25)(replace(student, core=core), lesson)


def test_a_llama_learns_in_integers(student: Model, lesson: Lesson, tmp_path: Path) -> None:
    before = logits(student)
    Qat(distill=Distill(epochs=1, batch_size=16))(student, lesson)
    module = student.module
    assert isinstance(module, FakeQuantized)
    assert sum("layers.3." in site for site in module.sites) == 4  # what goes into q, k, v; o; gate and up; down
    assert not torch.equal(logits(student), before)
    student.save(tmp_path / "saved")
    again = TASK.load(Checkpoint(str(tmp_path / "saved")), like=student)
    inputs = student.batch(lesson.train.rows(range(3)), CPU)
    with torch.inference_mode():
        ours = module(*inputs)
        assert torch.equal(again.module(*inputs), ours)
        assert not torch.equal(module.inner(*inputs), ours)
