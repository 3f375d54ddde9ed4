"""A Mamba as the student of a transformer: the whole road, and hidden states matched token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from potstill.compress.distill import Distill, Work
from potstill.compress.layers import Pair, blocks
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TASK, CPU = TASKS["text-generation"], torch.device("cpu")
LENGTH = {"max_length": 64}  # the teacher has so many positions, and a Mamba has no end


@pytest.fixture
def teacher(story_teacher: Path) -> Model:
    return TASK.load(Checkpoint(str(story_teacher)))


@pytest.fixture
def lesson(teacher: Model, story_files: dict[str, Path], tmp_path: Path) -> Lesson:
    train = TASK.checked(TASK.examples(str(story_files["train"]), {}), (), encode=teacher.encode)
    return Lesson(TASK, teacher, train.take(range(160), "t"), train.take(range(160, 200), "h"), 0, tmp_path / "work")


@pytest.fixture
def mamba(teacher: Model, story_teacher: Path, tmp_path: Path) -> Model:
    """Half as wide and half as deep as the teacher, with its tokenizer; read as `student: {checkpoint: …}` is."""
    torch.manual_seed(0)
    folder = tmp_path / "mamba"
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2
    )
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Student(checkpoint=str(folder))(teacher, TASK, LENGTH, 0)


def perplexity(model: Model, teacher: Model, examples: Examples) -> float:
    rows = [predicted(TorchPredictor(one, "one", CPU), examples, TASK.length_of) for one in (model, teacher)]
    found = TASK.judge(*rows, examples).perplexity  # type: ignore[arg-type, call-arg]
    assert found
    return found.value


def test_its_blocks_are_found(mamba: Model, teacher: Model) -> None:
    assert list(blocks(mamba.core)) == ["backbone.layers.0", "backbone.layers.1"]


def test_it_learns_from_a_transformer_and_opens_again(
    mamba: Model, teacher: Model, lesson: Lesson, tmp_path: Path
) -> None:
    before, best = (perplexity(one, teacher, lesson.held_out) for one in (mamba, teacher))
    Distill(epochs=3, learning_rate=1e-2, batch_size=16)(mamba, lesson)
    after = perplexity(mamba, teacher, lesson.held_out)
    assert best < after < min(before / 2, 2 * best)
    mamba.save(tmp_path / "saved")
    again = TASK.load(Checkpoint(str(tmp_path / "saved")), like=teacher, **LENGTH)
    assert perplexity(again, teacher, lesson.held_out) == pytest.approx(after, rel=1e-4)


def test_hidden_states_are_matched_token_by_token(mamba: Model, teacher: Model, lesson: Lesson) -> None:
    """The teacher packs and the Mamba does not: against the mean over all texts, each run by itself in float64."""
    work = Work(Distill(losses={"hidden": 1.0}), mamba, lesson, CPU)
    try:
        assert work.pupil.pairs["hidden"] == [
            Pair("backbone.layers.0", "model.layers.1"), Pair("backbone.layers.1", "model.layers.3")
        ]  # fmt: skip
        batch = work.collate([("train", 0, i) for i in range(8)])
        assert len(batch["teachers"][0]["input_ids"]) < len(batch["student"]["input_ids"]) == 8
        assert work.teacher
        taught = work.teacher(batch["teachers"])
        loss = work.pupil(batch["student"], taught, batch["labels"], batch["keep"])["hidden"].item()
        projections = [work.pupil.projections[f"hidden-{i}"].double() for i in range(2)]
    finally:
        work.close()
    total, values = 0.0, 0
    core: Any = mamba.core
    theirs: Any = teacher.core
    core.double(), theirs.double()
    for tokens in lesson.train.rows(range(8))["tokens"]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            ours = heard(core, ids, ["backbone.layers.0", "backbone.layers.1"])
            wanted = heard(theirs, ids, ["model.layers.1", "model.layers.3"])
        for projection, a, b in zip(projections, ours, wanted, strict=True):
            total += float((projection(a[0, :-1]).detach() - b[0, :-1]).square().sum())
            values += b[0, :-1].numel()
    core.float(), theirs.float()
    assert loss == pytest.approx(total / values, rel=1e-3)


def heard(core: Any, ids: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    """What some layers give."""
    found: list[torch.Tensor] = []
    handles = [core.get_submodule(name).register_forward_hook(lambda _m, _i, out: found.append(out)) for name in names]
    core(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [one[0] if isinstance(one, tuple) else one for one in found]


def test_matching_trains_the_student_alone(mamba: Model, lesson: Lesson) -> None:
    """MOHAWK's second stage: the student's states come nearer to the teacher's, and no projection is saved."""
    names = set(mamba.core.state_dict())
    log = Distill(epochs=2, learning_rate=1e-2, batch_size=16, losses={"hidden": 1.0})(mamba, lesson)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert set(mamba.core.state_dict()) == names


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ("relations", "MambaForCausalLM has not one query, key and value layer .* match hidden states instead"),
        ("pkd", "pkd matches first tokens, which in a language model have read nothing else; use hidden"),
    ],
)
def test_what_a_mamba_cannot_match(mamba: Model, lesson: Lesson, loss: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Distill(losses={loss: 1.0})(mamba, lesson)


def test_a_mamba_is_cut_by_depth_and_not_by_width(mamba: Model, lesson: Lesson) -> None:
    assert len(blocks(Student(layers=1)(mamba, TASK, {}, 0).core)) == 1
    with pytest.raises(InputError, match="a mamba has no single num_attention_heads"):
        Student(hidden=8)(mamba, TASK, {}, 0, lesson.train)
