"""Whose child a model is: how close its outputs are to each suspect's, measured against strangers.

A student keeps some of its teacher's ways: how it ranks the wrong classes (Hinton 2015, "dark knowledge") and which
mistakes it makes. Most of that all good models share, and models of one build share more; it is taken away by what
the others do. Two measures of a pair of models:

    logits      partial correlation of their centred log-probabilities, means of each true class taken off, with every
                other model held fixed
    mistakes    the same of their wrong answers, one-hot

Strangers are suspects and references, none of them kin to another. Each pair of them shows how close strangers come:
more where the others explain both alike (a common build). A line through these pairs, its spread in proportion, says
what to expect of a stranger to each suspect, and how far beyond it the model is (a prediction by Student's t). The
suspects are tested by their logits, corrected by Holm.

Shapes: N examples, C classes, M models: strangers first, the one in question last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_softmax

from potstill.validate.errors import InputError
from potstill.validate.metrics import holm

Array = NDArray[np.float64]
MEASURES = ("logits", "mistakes")
FEWEST = 5  # strangers: ten pairs
LEAST = -12.0  # a log-probability below this says no more than that the class is not meant
GROUPS = 50  # of examples, for the jackknife
CHUNK = 8192
RIDGE = 1e-6  # two models that are the same leave nothing to divide by
FARTHEST = 0.999  # a correlation beyond it is taken for it: its arc tangent has no end


@dataclass(frozen=True)
class Closeness:
    """How close the model is to one suspect by one measure.

    Attributes:
        suspect: its name.
        measure: one of `MEASURES`.
        value: the partial correlation.
        interval: 95 %, of the value, by the jackknife over groups of examples.
        stranger: 95 %, what a stranger of this build would have.
        p: one-sided, that a stranger is as close.
        p_holm: corrected for all suspects.
        detectable: the value that would be found four times in five at the suspects' number.
    """

    suspect: str
    measure: str
    value: float
    interval: tuple[float, float]
    stranger: tuple[float, float]
    p: float
    p_holm: float
    detectable: float


@dataclass(frozen=True)
class Kinship:
    """The evidence on a model's parent.

    Attributes:
        named: the closest of the suspects that pass `alpha`, if any does.
        also: the others that pass.
        closeness: for each measure and suspect.
        examples: that all models answered.
        wrong: how many of them the model has wrong.
        strangers: suspects and references.
        alpha: the chance, at most, that anybody is named for a model without a parent.
    """

    named: str | None
    also: tuple[str, ...]
    closeness: tuple[Closeness, ...]
    examples: int
    wrong: int
    strangers: int
    alpha: float


def kinship(
    model: NDArray[np.floating],
    suspects: Mapping[str, NDArray[np.floating]],
    references: Sequence[NDArray[np.floating]],
    labels: NDArray[np.int64],
    alpha: float = 0.05,
) -> Kinship:
    """Test each suspect as the parent of a model.

    Args:
        model: its logits (N, C).
        suspects: logits (N, C) of each, by name.
        references: logits (N, C) of models that are kin to nobody here.
        labels: true classes (N,).
        alpha: of the test.

    Raises:
        InputError: fewer than five suspects and references, or arrays that do not belong together.
    """
    everyone = [*suspects.values(), *references, model]
    check_strangers(len(suspects), len(references))
    if any(one.shape != (len(labels), model.shape[1]) for one in everyone):
        shapes = ", ".join(str(one.shape) for one in everyone)
        raise InputError(f"outputs of shapes {shapes} for {len(labels)} labels; all models answer the same examples")
    found: list[Closeness] = []
    for measure, grams in zip(MEASURES, _products(everyone, labels), strict=True):
        whole = grams.sum(axis=0)
        found += against_strangers(measure, whole, whole - grams, list(suspects), alpha)
    wrong = int((np.asarray(model).argmax(axis=1) != labels).sum())
    named = named_by(found, MEASURES[0], alpha)
    return Kinship(*named, tuple(found), len(labels), wrong, len(everyone) - 1, alpha)


def check_strangers(suspects: int, references: int) -> None:
    """Raise InputError where there are too few to compare with."""
    if suspects + references < FEWEST or not suspects:
        raise InputError(
            f"{suspects} suspects and {references} references, expected 1 suspect or more, and {FEWEST} models of both "
            "kinds to tell kin from chance; give more references"
        )


def named_by(found: Sequence[Closeness], measure: str, alpha: float) -> tuple[str | None, tuple[str, ...]]:
    """The closest suspect that passes by a measure, and the others that pass."""
    kin = sorted((one for one in found if one.measure == measure and one.p_holm < alpha), key=lambda one: one.p)
    order = [one.suspect for one in kin]
    return (order[0] if order else None), tuple(order[1:])


def _products(everyone: Sequence[NDArray[np.floating]], labels: NDArray[np.int64]) -> tuple[Array, Array]:
    """For each measure the products of the models' residuals, summed within groups of examples (G, M, M).

    A residual is what is left when the mean of a true class is taken off.
    """
    count, classes = len(everyone), everyone[0].shape[1]
    held, index = np.unique(labels, return_inverse=True)
    groups = np.arange(len(labels)) % min(GROUPS, len(labels))
    parts = [slice(start, start + CHUNK) for start in range(0, len(labels), CHUNK)]
    means = np.zeros((2, len(held), count, classes))
    for part in parts:
        for measure, z in enumerate(_features(everyone, labels, part)):
            np.add.at(means[measure], index[part], z.transpose(1, 0, 2))
    means /= np.bincount(index)[:, None, None]
    grams = np.zeros((2, groups.max() + 1, count, count))
    for part in parts:
        for measure, z in enumerate(_features(everyone, labels, part)):
            left = z.transpose(1, 0, 2) - means[measure][index[part]]
            np.add.at(grams[measure], groups[part], left @ left.transpose(0, 2, 1))
    return grams[0], grams[1]


def _features(everyone: Sequence[NDArray[np.floating]], labels: NDArray[np.int64], part: slice) -> tuple[Array, Array]:
    """Centred log-probabilities, and wrong answers one-hot, of some examples (M, n, C)."""
    logits = np.stack([np.asarray(one[part], dtype=np.float64) for one in everyone])
    z = np.maximum(log_softmax(logits, axis=2), LEAST)
    said = logits.argmax(axis=2)
    wrong = np.eye(logits.shape[2])[said] * (said != labels[part])[:, :, None]
    return z - z.mean(axis=2, keepdims=True), wrong


def against_strangers(measure: str, gram: Array, without: Array, names: Sequence[str], alpha: float) -> list[Closeness]:
    """Each suspect by one measure.

    Args:
        measure: its name.
        gram: products of the models' features (M, M); suspects first, then references, the model last.
        without: the same without each group of examples (G, M, M), for the jackknife.
        names: of the suspects.
        alpha: of the test.
    """
    count = len(gram) - 1
    pairs = _pairs(gram, count)
    line = _Line.through(pairs)
    alike, close = np.array([_of_model(gram, count, k) for k in range(len(names))]).T
    alike = np.minimum(alike, pairs[:, 0].max())  # a child is as alike as no strangers are: the line says nothing there
    left = np.array([[_of_model(one, count, k)[1] for k in range(len(names))] for one in without])
    error = np.sqrt((len(left) - 1) * left.var(axis=0))
    expected, spread = line.at(alike)
    t = stats.t(line.freedom)
    p = t.sf((close - expected) / spread)
    corrected, far = holm(p), 1.96 * error
    needed = (t.ppf(1 - alpha / len(names)) + t.ppf(0.8)) * spread
    half = t.ppf(0.975) * spread
    return [
        Closeness(
            name, measure, _r(close[k]), (_r(close[k] - far[k]), _r(close[k] + far[k])),
            (_r(expected[k] - half[k]), _r(expected[k] + half[k])), float(p[k]), float(corrected[k]),
            _r(expected[k] + needed[k]),
        )
        for k, name in enumerate(names)
    ]  # fmt: skip


def _r(z: float) -> float:
    return float(np.tanh(z))


def _correlations(gram: Array) -> Array:
    scale = np.sqrt(np.diag(gram)) + 1e-12
    return np.asarray((gram / np.outer(scale, scale) + RIDGE * np.eye(len(gram))) / (1 + RIDGE))


def _pair(r: Array, a: int, b: int, others: list[int]) -> tuple[float, float]:
    """How alike two models are in what others explain of them, and how close in what is left; both as artanh."""
    held = r[np.ix_(others, others)]
    by_a, by_b = np.linalg.solve(held, r[others][:, [a, b]]).T
    aa, bb, ab = r[a, others] @ by_a, r[b, others] @ by_b, r[a, others] @ by_b
    alike = ab / np.sqrt(max(aa * bb, 1e-12))
    close = (r[a, b] - ab) / np.sqrt(max((1 - aa) * (1 - bb), 1e-12))
    return float(np.arctanh(np.clip(alike, 0.05, FARTHEST))), float(np.arctanh(np.clip(close, -FARTHEST, FARTHEST)))


def _pairs(gram: Array, count: int) -> Array:
    """`_pair` of every two strangers (P, 2), all other strangers held fixed."""
    r = _correlations(gram)
    return np.array(
        [_pair(r, a, b, [u for u in range(count) if u not in (a, b)]) for a in range(count) for b in range(a)]
    )


def _of_model(gram: Array, count: int, suspect: int) -> Array:
    """`_pair` of the model and a suspect; as many are held fixed as for strangers, each left out in turn, the mean."""
    r = _correlations(gram)
    others = [u for u in range(count) if u != suspect]
    found: Array = np.mean([_pair(r, count, suspect, [u for u in others if u != left]) for left in others], axis=0)
    return found


@dataclass(frozen=True)
class _Line:
    """A line by least squares, whose spread grows in proportion to x."""

    weights: Array
    inverse: Array
    sigma: float
    freedom: int

    @classmethod
    def through(cls, pairs: Array) -> "_Line":
        """The line of closeness on likeness."""
        x, y = pairs.T
        design = np.stack([1 / x, np.ones_like(x)], axis=1)  # of (1, x), over x
        weights = np.linalg.lstsq(design, y / x, rcond=None)[0]
        freedom = len(x) - 2
        sigma = float(np.sqrt(((y / x - design @ weights) ** 2).sum() / freedom))
        return cls(weights, np.linalg.pinv(design.T @ design), sigma, freedom)

    def at(self, x: Array) -> tuple[Array, Array]:
        """What is expected there, and the standard error of one more value."""
        design = np.stack([np.ones_like(x), x], axis=1)
        own = np.einsum("ki,ij,kj->k", design, self.inverse, design)
        expected: Array = design @ self.weights
        return expected, self.sigma * np.sqrt(x**2 + own)
