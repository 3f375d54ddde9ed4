"""Sentence embeddings: pooling by hand, Spearman and recall against scipy and by counting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Examples, Pairs
from potstill.validate.embedding import spearman
from potstill.validate.errors import InputError
from potstill.validate.leaks import shared
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

EMBED = TASKS["feature-extraction"]
CPU = torch.device("cpu")


@pytest.fixture
def model(text_teacher: Path) -> Model:
    return EMBED.load(Checkpoint(str(text_teacher)))


class Texts:
    """A table of two columns of texts."""

    def __init__(self, first: list[str], second: list[str]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, indices: list[int]) -> dict[str, list[str]]:
        return {"text": [self.first[i] for i in indices], "text2": [self.second[i] for i in indices]}


def pairs(labels: np.ndarray, seconds: list[str] | None = None) -> Examples:
    texts = [f"t{i}" for i in range(len(labels))]
    return Examples("made", Pairs(Texts(texts, seconds or texts)), labels, None, "d")


def vectors(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2 * n, width)).astype(np.float32)


def test_the_vector_is_the_mean_over_a_texts_own_tokens(model: Model) -> None:
    texts = ["good", "a very bad film and a plot"]
    tensors = model.tensors({"text": texts}, CPU)
    found = model.answers(tensors)
    for i in range(len(texts)):
        n = int(tensors["attention_mask"][i].sum())
        alone = {name: tensor[i : i + 1, :n] for name, tensor in tensors.items()}
        mean = model.core(**alone).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(found[i], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_spearman_is_that_of_scipy_ties_included() -> None:
    a, b = np.random.default_rng(0).integers(8, size=(2, 5, 60)).astype(float)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-12)
    assert spearman(np.ones((1, 9)), a[:1, :9]).tolist() == [0.0]


def test_scores_are_judged_by_rank(text_teacher: Path) -> None:
    teacher, scores = vectors(80, 12, 0), np.random.default_rng(1).normal(size=80)
    mine = np.concatenate([teacher, vectors(80, 5, 2)], axis=1) * 3  # another width, another length
    card = EMBED.judge(mine, teacher, pairs(scores))
    cosine = [[1 - _distance(one, i) for i in range(80)] for one in (mine, teacher)]
    assert card.value == pytest.approx(stats.spearmanr(cosine[0], scores).statistic)
    assert card.teacher_value == pytest.approx(stats.spearmanr(cosine[1], scores).statistic)
    assert card.beside == {"Spearman with the teacher": pytest.approx(stats.spearmanr(*cosine).statistic)}
    theirs = stats.bootstrap(
        (np.array(cosine[0]), scores), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        method="percentile", n_resamples=1000, rng=0,
    ).confidence_interval  # fmt: skip
    assert card.interval.low == pytest.approx(theirs.low, abs=0.05)
    assert card.interval.high == pytest.approx(theirs.high, abs=0.05)
    assert (card.agreement, card.lost, card.kl_nats, card.scale) == (None, None, None, "× 100")


def _distance(vectors: np.ndarray, i: int) -> float:
    from scipy.spatial.distance import cosine

    return float(cosine(vectors[2 * i], vectors[2 * i + 1]))


def test_pairs_without_scores_are_judged_by_search() -> None:
    teacher, n = vectors(50, 12, 0), 50
    teacher[1::2] = teacher[::2] + 0.4 * teacher[1::2]
    mine = teacher + 0.7 * vectors(50, 12, 1)
    card = EMBED.judge(mine, teacher, pairs(np.full(n, -100)))
    found = []
    for one in (mine, teacher):
        unit = one / np.linalg.norm(one, axis=1, keepdims=True)
        found.append([max(range(n), key=lambda j, i=i, unit=unit: unit[2 * i] @ unit[2 * j + 1]) for i in range(n)])
    hits = [np.array(one) == np.arange(n) for one in found]
    assert card.metric == "recall@1"
    assert 0.2 < card.value < 1
    assert (card.value, card.teacher_value) == (hits[0].mean(), hits[1].mean())
    assert (card.lost, card.gained) == ((hits[1] & ~hits[0]).sum(), (hits[0] & ~hits[1]).sum())
    assert card.agreement == np.mean(np.array(found[0]) == np.array(found[1]))


def test_the_nearest_of_many_is_that_of_all_at_once() -> None:
    exact = vectors(1300, 8, 5)  # more texts than are compared at a time
    exact[1::2] = exact[::2] + 0.4 * exact[1::2]
    mine = exact.astype(np.float16)
    unit = mine.astype(np.float64) / np.linalg.norm(mine.astype(np.float64), axis=1, keepdims=True)
    wanted = (unit[::2] @ unit[1::2].T).argmax(axis=1)
    assert 0.2 < (wanted == np.arange(1300)).mean() < 0.9
    card = EMBED.judge(mine, mine, pairs(np.full(1300, -100)))
    assert card.value == np.mean(wanted == np.arange(1300))


def test_the_same_text_twice_is_found_either_way() -> None:
    same = np.tile(np.array([[1, 0], [1, 0.1]], dtype=np.float32), (2, 1))
    assert EMBED.judge(same, same, pairs(np.full(2, -100), ["one", "one"])).value == 1.0
    assert EMBED.judge(same, same, pairs(np.full(2, -100), ["one", "two"])).value == 0.5


def test_pairs_are_read_predicted_and_judged(model: Model, pair_files: dict[str, Path]) -> None:
    examples = EMBED.checked(EMBED.examples(str(pair_files["eval"]), {}, judging=True), (), judging=True)
    assert len(examples) == 150
    rows = predicted(TorchPredictor(model, "teacher", CPU, batch_size=32), examples, "text")
    assert rows.shape == (300, 32)
    few = examples.take([5, 2], "two")
    np.testing.assert_allclose(
        predicted(TorchPredictor(model, "t", CPU), few), rows[[10, 11, 4, 5]], rtol=2**-10, atol=1e-5
    )
    card = EMBED.judge(rows, rows, examples)
    assert card.value > 0.6
    assert card.difference == 0


def test_training_texts_among_the_pairs_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "a", "text2": "b", "label": 1.0}, {"text": "a", "text2": "c", "label": 2.0}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in "abx"))
    judging = EMBED.examples(str(tmp_path / "e.jsonl"), {}, judging=True)
    assert len(shared(judging, EMBED.examples(str(tmp_path / "t.jsonl"), {}))) == 1


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.array(["a", "b"]), "expected a score for each pair"),
        (np.array([1.0, 1.0]), "have the score 1.0"),
        (np.array([1.0, np.nan]), "expected a score"),
    ],
)
def test_scores_that_cannot_judge(labels: np.ndarray, match: str) -> None:
    with pytest.raises(InputError, match=match):
        EMBED.checked(pairs(labels), (), judging=True)


def test_vectors_of_other_examples_are_refused() -> None:
    with pytest.raises(InputError, match="gave 4 vectors and the teacher 6 for 3 pairs"):
        EMBED.judge(vectors(2, 3, 0), vectors(3, 3, 0), pairs(np.zeros(3)))


def test_another_pooling_is_refused(text_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config.json").write_text((text_teacher / "config.json").read_text())
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(InputError, match="pools by cls_token; only the mean"):
        EMBED.load(Checkpoint(str(tmp_path)))
