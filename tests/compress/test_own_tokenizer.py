"""Students with a tokenizer of their own: what they learn from a teacher, and a vocabulary that is cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from potstill.compress.distill import Distill, Work
from potstill.compress.lesson import Lesson
from potstill.compress.losses import uld
from potstill.compress.meeting import meeting_of
from potstill.compress.prune import Prune
from potstill.compress.pupil import Taught
from potstill.compress.student import Student
from potstill.compress.terms import terms
from potstill.compress.vocabulary import Vocabulary, cut_vocabulary, first_pieces, places_in, unknown_tokens
from potstill.validate.aligned import OWN, between, read_by
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.byte_tokenizers import byte_tokenizer, save_small
from tests.conftest import stories
from tests.predicted import predicted

TASK, CPU = TASKS["text-generation"], torch.device("cpu")


@pytest.fixture
def teacher(story_teacher: Path) -> Model:
    return TASK.load(Checkpoint(str(story_teacher)))


@pytest.fixture
def student(teacher: Model, tmp_path: Path) -> Model:
    """It spells in bytes what is a word to the teacher."""
    return TASK.load(
        Checkpoint(str(save_small(tmp_path / "s", byte_tokenizer(stories(80, 1), 290), 128))), like=teacher
    )


def in_both(source: Path, teacher: Model, own: Any) -> Examples:
    encode = replace(teacher.encode, beside=own)  # type: ignore[type-var]
    return TASK.checked(TASK.examples(str(source), {}), (), encode=encode)


def lesson_of(teacher: Model, own: Any, source: Path, work: Path) -> Lesson:
    train = in_both(source, teacher, own)
    parts = train.take(range(80), "train"), train.take(range(160, 180), "held out")
    return Lesson(TASK, teacher, *parts, 0, work / "work", outputs=work / "outputs")


@pytest.fixture
def lesson(teacher: Model, student: Model, story_files: dict[str, Path], tmp_path: Path) -> Lesson:
    return lesson_of(teacher, student.encode, story_files["train"], tmp_path)


def card(student: Model, teacher: Model, examples: Examples) -> Any:
    rows = [predicted(TorchPredictor(one, "one", CPU), read_by(examples, one.encode)) for one in (student, teacher)]
    return TASK.judge(rows[0], rows[1], between(examples, student.encode, teacher.encode))


def logs_of(model: Model, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after each (T - 1, V), of one text by itself, in float64."""
    core: Any = model.core
    with torch.no_grad():
        return torch.log_softmax(core.eval()(input_ids=torch.tensor([tokens])).logits[0, :-1].double(), 1)


@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_uld_is_the_distance_of_sorted_probabilities(wide: str) -> None:
    """The paper's sum in float64, and scipy's distance of the two sets of probabilities, which is a mean over them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"student": 30, "teacher": 17} if wide == "student" else {"student": 17, "teacher": 30}
    mine, theirs = (torch.randn(9, sizes[who], generator=generator) * 3 for who in ("student", "teacher"))
    found = []
    for q, p in zip(mine.double().softmax(1), theirs.double().softmax(1), strict=True):
        q, p = (np.sort(np.pad(one, (0, 30 - len(one))))[::-1] for one in (q.numpy(), p.numpy()))
        assert np.abs(q - p).sum() == pytest.approx(30 * wasserstein_distance(q, p))
        found.append(np.abs(q - p).sum())
    assert uld(mine, theirs).item() == pytest.approx(np.mean(found), rel=1e-5)
    assert uld(mine, mine[:, torch.randperm(sizes["student"], generator=generator)]).item() == pytest.approx(
        0, abs=1e-6
    )


def test_the_loss_is_of_the_rows_after_the_same_text(student: Model, teacher: Model, lesson: Lesson) -> None:
    """Of each text by itself: where both have spelled the same letters, sorted probabilities; all tokens of its own."""
    work = Work(Distill(losses={"hard": 1.0, "uld": 1.5}), student, lesson, CPU)
    batch = work.collate([("train", 0, i) for i in range(7)])
    assert work.teacher
    taught = work.meeting(work.teacher(batch["teachers"]), batch["met"])
    parts = work.pupil(batch["student"], taught, batch["labels"], batch["keep"])
    work.close()
    hard, apart, tokens = 0.0, list[float](), 0
    own, theirs = student.encode.tokenizer, teacher.encode.tokenizer  # type: ignore[attr-defined]
    for text in lesson.train.rows(range(7))["text"]:
        ids, words = own(text)["input_ids"], theirs(text)["input_ids"]
        q, p = logs_of(student, ids), logs_of(teacher, words)
        hard -= float(q.gather(1, torch.tensor(ids)[1:, None]).sum())
        tokens += len(ids) - 1
        said = [own.decode(ids[1 : i + 1]) for i in range(len(ids) - 1)]
        for i in range(len(words) - 1):
            before = theirs.decode(words[1 : i + 1])
            if before in said:
                mine, other = q[said.index(before)].exp(), p[i].exp()
                other = torch.nn.functional.pad(other, (0, len(mine) - len(other)))
                apart.append(float((mine.sort().values - other.sort().values).abs().sum()))
    assert len(apart) > 60
    assert parts["hard"].item() == pytest.approx(hard / tokens, rel=1e-4)
    assert parts["uld"].item() == pytest.approx(np.mean(apart), rel=1e-4)


@pytest.mark.parametrize("losses", [None, {"hard": 1.0}, {"hard": 1.0, "uld": 0.5}])
def test_a_student_learns_in_its_own_tokens(
    losses: dict[str, float] | None, student: Model, teacher: Model, lesson: Lesson
) -> None:
    before = card(student, teacher, lesson.held_out)
    log = Distill(epochs=2, learning_rate=1e-2, batch_size=8, losses=losses)(student, lesson)  # type: ignore[arg-type]
    after = card(student, teacher, lesson.held_out)
    assert after.perplexity.bits_per_byte < 0.6 * before.perplexity.bits_per_byte
    assert (log[-1]["taught_rows"] > 0) == (losses is not None and "uld" in losses)


def test_what_needs_the_same_tokens_is_refused(student: Model, teacher: Model, lesson: Lesson) -> None:
    for losses, match in (
        ({"kl": 1.0}, r"kl compares the probabilities of the same tokens, and .* has another tokenizer than"),
        (
            {"hidden": 1.0},
            r"hidden compares token with token, and .* has another tokenizer than .*; use losses on outp",
        ),
    ):
        with pytest.raises(InputError, match=match):
            Distill(losses=losses)(student, lesson)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"on_policy writes in the student's tokens, and .*; leave it out"):
        Distill(on_policy=0.5)(student, lesson)


def test_uld_is_for_language_models(text_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "the film is good,positive\na dull plot,negative\n" * 3)
    task = TASKS["text-classification"]
    model = task.load(Checkpoint(str(text_teacher)))
    examples = task.checked(task.examples(str(tmp_path / "t.csv"), {}), model.labels)
    with pytest.raises(InputError, match="uld is for language models with different tokenizers; the task is text-cla"):
        Distill(losses={"uld": 1.0})(model, Lesson(task, model, examples, examples, 0, tmp_path / "w"))


def test_pruning_reads_the_students_own_labels(student: Model, teacher: Model, lesson: Lesson) -> None:
    before = student.parameters
    Prune(neurons=0.5, rounds=1, examples=16, distill=Distill(epochs=0.2, losses={"hard": 1.0}))(student, lesson)
    assert student.parameters < before


# A vocabulary that is cut.


def cut_of(teacher: Model, source: Path) -> Vocabulary:
    found = cut_vocabulary(teacher, TASK.checked(TASK.examples(str(source), {}), (), encode=teacher.encode), "used")
    return replace(found, encode=replace(found.encode, prefix=OWN))  # type: ignore[type-var]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Texts of some of the words."""
    (tmp_path / "few.jsonl").write_text(
        "".join(
            json.dumps({"text": text}) + "\n" for text in stories(400, 2) if "ann" not in text and "old" not in text
        )
    )
    return tmp_path / "few.jsonl"


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_student_says_what_the_teacher_says_of_the_tokens_left(tied: bool, tmp_path: Path) -> None:
    """Bytes, tokens in use and what they merge from stay; texts of these are cut as before, and rows are the same."""
    texts, ends = [text for text in stories(60, 1) if "ann" not in text], [1, 290]
    path = save_small(tmp_path / "t", byte_tokenizer(stories(300, 5), 320), tied=tied, pad_token_id=280)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": ends, "max_new_tokens": 290, "suppress_tokens": [290]})
    )
    teacher = TASK.load(Checkpoint(str(path)))
    source = tmp_path / "few.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = TASK.checked(TASK.examples(str(source), {}), (), encode=teacher.encode)
    found = cut_of(teacher, source)
    student = Student(vocabulary="used")(teacher, TASK, {}, 0, raw, found)
    kept = torch.tensor(found.kept)
    assert 258 <= len(kept) < len(teacher.encode.tokenizer)  # type: ignore[attr-defined]
    assert {0, 1, 280, 290} <= set(found.kept)
    old, new = teacher.encode.tokenizer, student.encode.tokenizer  # type: ignore[attr-defined]
    for text in [*texts[:3], "naïve ann 😀", "the old ann"]:
        before, after = old(text)["input_ids"], new(text)["input_ids"]
        assert new.decode(after, skip_special_tokens=True) == text
        if text in texts:
            assert kept[after].tolist() == before
            torch.testing.assert_close(logits_of(student, after), logits_of(teacher, before)[:, kept])
        else:
            assert len(after) > len(before)
    core: Any = student.core
    where = {one: k for k, one in enumerate(found.kept)}
    assert core.generation_config.eos_token_id == [where[one] for one in ends]
    assert (core.generation_config.max_new_tokens, core.generation_config.suppress_tokens) == (290, [where[290]])
    assert (core.config.vocab_size, core.config.pad_token_id) == (len(kept), where[280])
    student.save(tmp_path / "student")
    again = TASK.load(Checkpoint(str(tmp_path / "student")), like=teacher)
    assert again.encode.prefix == OWN  # type: ignore[attr-defined]
    assert places_in(again, teacher) == found.kept
    reopened: Any = again.core
    assert reopened.generation_config.eos_token_id == core.generation_config.eos_token_id


def logits_of(model: Model, tokens: list[int]) -> torch.Tensor:
    core: Any = model.core
    with torch.no_grad():
        found: torch.Tensor = core.eval()(input_ids=torch.tensor([tokens])).logits[0]
    return found


def test_a_cut_vocabulary_is_taught_the_whole_distribution(
    teacher: Model, story_files: dict[str, Path], few: Path, tmp_path: Path
) -> None:
    """KL of each text by itself, over the words left; what the teacher gives to others is of the unknown one."""
    vocabulary = cut_of(teacher, few)
    lesson = lesson_of(teacher, vocabulary.encode, story_files["train"], tmp_path)
    student = Student(vocabulary="used")(teacher, TASK, {}, 0, lesson.train, vocabulary)
    core: Any = student.core
    torch.nn.init.normal_(core.lm_head.weight, std=0.3)
    kept = vocabulary.kept
    assert len(kept) == 15 - 3  # without ann, likes and old
    columns = meeting_of(student, teacher).columns
    assert columns is not None
    assert columns.tolist() == kept
    stage = Distill()
    assert {term.name: term.weight for term in stage.terms(lesson, student)} == {"kl": 1, "hard": 1}
    work = Work(stage, student, lesson, CPU)
    batch = work.collate([("train", 0, i) for i in range(5)])
    assert work.teacher
    taught = work.meeting(work.teacher(batch["teachers"]), batch["met"])
    found = work.pupil(batch["student"], taught, batch["labels"], batch["keep"])["kl"].item()
    work.close()
    apart, new = list[float](), {old: k for k, old in enumerate(kept)}
    for words in lesson.train.rows(range(5))["tokens"]:
        q = logs_of(student, [new.get(word, 0) for word in words])  # <unk> is 0 in both
        p = logs_of(teacher, words)[:, kept].exp()
        p[:, 0] += 1 - p.sum(1)
        p = p.log()
        apart += (p.exp() * (p - q)).sum(1).tolist()
    assert found == pytest.approx(np.mean(apart), rel=1e-4)
    assert unknown_tokens(student, lesson.train) > unknown_tokens(teacher, lesson.train) == 0


def test_a_token_that_is_gone_counts_for_the_first_that_spells_it(tmp_path: Path) -> None:
    """By the whole tokenizer, on the token's own text."""
    teacher = TASK.load(Checkpoint(str(save_small(tmp_path / "t", byte_tokenizer(stories(300, 5), 290), 64))))
    wide = TASK.load(
        Checkpoint(str(save_small(tmp_path / "w", byte_tokenizer(stories(300, 5), 275), 64))), like=teacher
    )
    places = places_in(wide, teacher)
    assert places
    begins = first_pieces(wide, teacher, places)
    theirs, ours = (one.encode.tokenizer for one in (teacher, wide))  # type: ignore[attr-defined]
    assert max(begins) < 275
    for i in range(2, 290):
        text = theirs.decode([i])
        if "\ufffd" not in text:
            assert begins[i] == ours(text, add_special_tokens=False)["input_ids"][0]
    meeting, outputs = meeting_of(wide, teacher), torch.randn(4, 290)
    rows = torch.tensor([2, 0]), torch.tensor([1, 3])
    found = meeting(Taught(outputs), rows)
    assert found.outputs is not None
    wanted = np.zeros((2, 275))
    for row, p in zip(wanted, outputs[[1, 3]].double().softmax(1).numpy(), strict=True):
        np.add.at(row, begins, p)
    np.testing.assert_allclose(found.outputs.exp().numpy(), wanted, rtol=1e-4, atol=1e-9)
    assert found.rows is rows[0]


def test_other_tokenizers_have_no_places(student: Model, teacher: Model, tmp_path: Path) -> None:
    assert places_in(student, teacher) is None
    assert places_in(teacher, teacher) == [*range(15)]
    other = save_small(tmp_path / "o", byte_tokenizer(stories(80, 1), 300), 128)
    wider = TASK.load(Checkpoint(str(other)))
    assert places_in(wider, student) is None  # it knows more
    narrower = places_in(student, wider)
    assert narrower
    assert wider.encode.tokenizer.convert_ids_to_tokens(narrower) == (  # type: ignore[attr-defined]
        student.encode.tokenizer.convert_ids_to_tokens([*range(290)])  # type: ignore[attr-defined]
    )
    none = replace(student, encode=object())  # type: ignore[arg-type]
    assert places_in(none, teacher) is None


def test_without_a_part_of_the_vocabulary_labels_alone_are_learned(student: Model, lesson: Lesson) -> None:
    assert [term.name for term in Distill().terms(lesson, student)] == [one.name for one in terms({"hard": 1.0})]
    assert (read_by(lesson.train, student.encode).labels != IGNORED).all()
