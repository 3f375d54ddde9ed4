"""Whether the judge can be trusted, by simulation, and what judging costs.

    coverage     of each interval: how often the 95 % interval holds the truth, over 2,000 simulated evaluation sets
    false_pass   how often a strict gate passes a model whose true drop is right at the limit, over as many; of the
                 whole set, of one of several slices, and of the calibration error
    false_stop   how often a gate on the worst of several slices stops a model without a true drop, over as many
    overhead     seconds of judging 10,000 examples over those of predicting them, by ResNet-20 on 32 × 32 images with
                 random weights. Timer: around all that a run makes of each model (scorecard, flips, slices by class and
                 confidence, calibration, gate), and around the whole `predict`; median of 5, in turn

`QUICK=1` takes fewer resamples and repeats. Prints a table; the last line is JSON, also in `results/judge.json`.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

from potstill.validate.calibration import calibration, confidence
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.embedding import spearman
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.files import write_json
from potstill.validate.flips import flips
from potstill.validate.gate import Check, Gate, parse_limit
from potstill.validate.metrics import Interval, bootstrap, paired_difference, proportion
from potstill.validate.predictor import TorchPredictor, predict
from potstill.validate.scorecard import Scorecard, paired
from potstill.validate.slices import Cut, by_class, in_thirds, slices
from potstill.validate.task import TASKS, Model
from potstill.validate.worst_slice import judge_slices

ROOT = Path(__file__).resolve().parents[1]
QUICK = os.environ.get("QUICK") == "1"
SETS, RESAMPLES, REPEATS, N = 2000, 500 if QUICK else 2000, 3 if QUICK else 5, 10_000
Drawn = Iterator[tuple[Interval, float]]


def accuracy(rng: np.random.Generator) -> Drawn:
    """Wilson's interval of 92 % on 500 examples."""
    for right in rng.binomial(500, 0.92, size=SETS):
        yield proportion(int(right), 500), 0.92


def drop(rng: np.random.Generator) -> Drawn:
    """The paired interval of a drop of 2 points on 500 examples: 5 % lost, 3 % gained."""
    for lost, gained, _ in rng.multinomial(500, [0.05, 0.03, 0.92], size=SETS):
        yield paired_difference(int(lost), int(gained), 500), -0.02


def divergence(rng: np.random.Generator) -> Drawn:
    """The bootstrap's interval of a mean of 300 skewed values (gamma, shape 0.5, mean 0.1), as divergences are."""
    for values in rng.gamma(0.5, 0.2, size=(SETS, 300)):
        yield by_bootstrap(lambda index, v=values: v[index].mean(axis=1), 300), 0.1


def f1(rng: np.random.Generator) -> Drawn:
    """The bootstrap's interval of a drop of entity F1 over 300 sentences: recall 0.90 and 0.85, precision 1."""
    truth = 2 * 0.85 / 1.85 - 2 * 0.90 / 1.90
    for _ in range(SETS):
        true = rng.poisson(2.0, size=300)
        theirs = rng.binomial(true, 0.90)
        counts = np.stack([rng.binomial(theirs, 0.85 / 0.90), theirs, true], axis=1)

        def fall(index: NDArray[np.int64], counts: NDArray[np.int64] = counts) -> NDArray[np.float64]:
            ours, theirs, true = np.moveaxis(counts[index].sum(axis=1), 1, 0)
            found: NDArray[np.float64] = 2 * ours / (ours + true) - 2 * theirs / (theirs + true)
            return found

        yield by_bootstrap(fall, 300), truth


def rank_correlation(rng: np.random.Generator) -> Drawn:
    """The bootstrap's interval of Spearman's correlation over 200 pairs, normal with correlation 0.8."""
    truth = 6 / np.pi * np.arcsin(0.8 / 2)  # of the ranks (Pearson 1907)
    for _ in range(SETS):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=200).T
        yield by_bootstrap(lambda index, x=x, y=y: spearman(x[index], y[index]), 200), truth


def queries(rng: np.random.Generator) -> NDArray[np.int64]:
    """Texts that belong to each of 300 queries (1 to about 10), and those that teacher and student found: (300, 3)."""
    many = 1 + rng.poisson(3.0, size=300)
    theirs = rng.binomial(many, rng.beta(4, 1, size=300))  # some queries are harder; 80 % in the mean
    return np.stack([many, theirs, rng.binomial(theirs, 0.95)], axis=1)


def recall(rng: np.random.Generator) -> Drawn:
    """The bootstrap's interval of a drop of recall from 80 to 76 %, the mean over 300 queries."""
    for _ in range(SETS):
        many, theirs, ours = queries(rng).T
        yield by_bootstrap(lambda index, fall=(ours - theirs) / many: fall[index].mean(axis=1), 300), -0.04


def recall_of_all(rng: np.random.Generator) -> Drawn:
    """The same of the recall over all texts of 300 queries together, a ratio of sums."""
    for _ in range(SETS):
        counts = queries(rng)

        def fall(index: NDArray[np.int64], counts: NDArray[np.int64] = counts) -> NDArray[np.float64]:
            many, theirs, ours = np.moveaxis(counts[index].sum(axis=1), 1, 0)
            found: NDArray[np.float64] = (ours - theirs) / many
            return found

        yield by_bootstrap(fall, 300), -0.04


def perplexity(rng: np.random.Generator) -> Drawn:
    """The bootstrap's interval of the log of a student's perplexity over its teacher's, on 300 documents.

    Lengths are lognormal (median 148 tokens, 95 % of 38 to 585), and the student loses more on long ones.
    """
    for _ in range(SETS):
        tokens = rng.lognormal(5, 0.7, size=300)
        loss = tokens * (0.1 + 0.05 * (np.log(tokens) - 5) + rng.normal(0, 0.1, size=300))
        yield (
            by_bootstrap(lambda index, loss=loss, n=tokens: loss[index].sum(axis=1) / n[index].sum(axis=1), 300),
            0.1 + 0.05 * 0.7**2,  # E[L log L] / E[L] = μ + σ² of a lognormal
        )


def by_bootstrap(of: Callable[[NDArray[np.int64]], NDArray[np.float64]], n: int) -> Interval:
    """The interval of one statistic; every set is resampled alike, as every evaluation set is."""
    return bootstrap(lambda index: of(index)[:, None], n, resamples=RESAMPLES)[0]


INTERVALS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "accuracy (Wilson)": accuracy,
    "drop of accuracy (Tango, Agresti and Min)": drop,
    "divergence (bootstrap)": divergence,
    "drop of F1 (bootstrap over sentences)": f1,
    "Spearman (bootstrap over pairs)": rank_correlation,
    "drop of recall, mean over queries (bootstrap over queries)": recall,
    "drop of recall, over all texts (bootstrap over queries)": recall_of_all,
    "ratio of perplexities (bootstrap over documents)": perplexity,
}


def coverage(simulate: Callable[[np.random.Generator], Drawn]) -> float:
    """The share of simulated sets whose interval holds the truth."""
    drawn = simulate(np.random.default_rng(0))
    return float(np.mean([interval.low <= truth <= interval.high for interval, truth in drawn]))


def false_pass() -> dict[str, float]:
    """The share of sets on which a strict gate passes what is right at its limit, by what is limited."""
    rng, gate, found = np.random.default_rng(1), Gate(parse_limit("2pp"), undecided="strict"), {}
    for n in (200, 1000, 5000):
        passed = 0
        for lost, gained, same in rng.multinomial(n, [0.05, 0.03, 0.92], size=SETS):
            student, teacher = (
                np.repeat(one, [lost, gained, same]) for one in ([False, True, True], [True, False, True])
            )
            card = Scorecard(metric="accuracy", data="simulated", **paired(student, teacher))
            passed += gate(card).passed
        found[f"drop, n = {n}"] = passed / SETS
    for n, gain in ((65, 0.0), (120, 0.03), (1000, 0.03)):
        judged = worst_slices([n] + [20_000] * 9, [0.03] + [0.0] * 9, gain, strict=True)
        found[f"worst slice, n = {n}, gains of {gain:.0%}"] = float(np.mean([check.passed for check in judged]))
    return found | {f"calibration error, n = {n}": false_pass_of_calibration(n) for n in (300, 3000)}


def false_pass_of_calibration(n: int) -> float:
    """The same of the calibration error, by logits that are 1.3 times those that the labels are drawn from."""

    def draw(n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        logits = 2 * rng.normal(size=(n, 10))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return (1.3 * logits).astype(np.float32), (shares.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)

    rng, sets = np.random.default_rng(2), SETS // 10 if QUICK else SETS
    logits, labels = draw(1_000_000)
    truth, passed = calibration(logits, logits, labels).model.ece, 0
    gate, card = Gate(parse_limit("2pp"), "strict", max_calibration_error=truth), no_change(n)
    for seed in range(sets):
        logits, labels = draw(n)
        passed += gate(card, calibration=calibration(logits, logits, labels, seed)).checks[1].passed
    return passed / sets


def false_stop() -> dict[str, float]:
    """The share of sets without any true drop on which a gate of 3 points on the worst slice fails or stops a model."""
    found = {}
    for k, n in ((10, 30), (10, 120), (40, 120), (10, 1000)):
        judged = worst_slices([n] * k, [0.0] * k, 0.03, strict=False)
        found[f"{k} slices of {n}, fails"] = float(np.mean([check.outcome == "fail" for check in judged]))
        found[f"{k} slices of {n}, does not pass by the estimates"] = float(np.mean([not one.passed for one in judged]))
    return found


def worst_slices(sizes: list[int], drops: list[float], gain: float, *, strict: bool) -> list[Check]:
    """What a limit of 3 points on the worst slice says of simulated sets, each slice with its size and true drop."""
    rng, found = np.random.default_rng(3), []
    chances = [[gain + drop, gain, 1 - 2 * gain - drop] for drop in drops]
    for _ in range(SETS):
        cells = [rng.multinomial(n, chance) for n, chance in zip(sizes, chances, strict=True)]
        student, teacher = (
            np.concatenate([np.repeat(one, cell) for cell in cells])
            for one in ([False, True, True], [True, False, True])
        )
        cut = Cut("slice", tuple(map(str, range(len(sizes)))), np.repeat(np.arange(len(sizes)), sizes))
        found.append(judge_slices(slices(student, teacher, [cut]), parse_limit("3pp"), strict=strict))
    return found


def no_change(n: int) -> Scorecard:
    """The scorecard of a model that is its teacher, on n examples."""
    right = np.ones(n, dtype=bool)
    return Scorecard(metric="accuracy", data="simulated", **paired(right, right))


def overhead() -> float:
    """Seconds of judging over seconds of predicting; median of repeats in turn."""
    sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
    from model import resnet20  # type: ignore[import-not-found]

    torch.manual_seed(0)
    names, core = tuple(map(str, range(10))), resnet20().eval()
    model = Model(core, ArrayEncoder(), ("x",), names, Checkpoint("model:resnet20"), core)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, size=(N, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, size=N)
    examples = Examples("random images", Arrays({"x": x}), y, names, "random")
    teacher, before = rng.normal(size=(2, N, 10)).astype(np.float16)
    limits = {"max_slice_drop": parse_limit("3pp"), "max_calibration_error": 0.05, "min_agreement": 0.97}
    gate, ratios = Gate(parse_limit("1pp"), **limits), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPEATS):
            started = time.perf_counter()
            predictor = TorchPredictor(model, "the model", torch.device("cpu"))
            logits = predict(predictor, examples, None, Path(folder, "logits.npy"))
            predicted = time.perf_counter()
            card = TASKS["module"].judge(logits, teacher, examples)
            TASKS["module"].judge(logits, before, examples)  # against the step before
            flips(logits, teacher, y, names)
            cuts = [by_class(y, names), in_thirds("confidence", confidence(teacher), "%")]
            cut = slices(logits.argmax(axis=1) == y, teacher.argmax(axis=1) == y, cuts)
            gate(card, slices=cut, calibration=calibration(logits, teacher, y))
            ratios.append((time.perf_counter() - predicted) / (predicted - started))
    return statistics.median(ratios)


def main() -> None:
    """Simulate, measure, print, and end with a line of JSON."""
    console = Console(width=120)
    torch.set_num_threads(1)
    found = {name: coverage(simulate) for name, simulate in track(INTERVALS.items(), "simulating")}
    figures: dict[str, Any] = {"coverage": found, "false_pass": false_pass(), "false_stop": false_stop()}
    figures["overhead"] = overhead()
    table = Table(title=f"{SETS:,} simulated sets; intervals of 95 %, {RESAMPLES} resamples", title_justify="left")
    for heading in ("what", "share, %"):
        table.add_column(heading)
    for name, share in found.items():
        table.add_row(f"holds the truth: {name}", f"{100 * share:.1f}")
    for what, share in figures["false_pass"].items():
        table.add_row(f"strict gate passes what is right at its limit: {what}", f"{100 * share:.1f}")
    for what, share in figures["false_stop"].items():
        table.add_row(f"gate on the worst slice, no true drop: {what}", f"{100 * share:.1f}")
    table.add_row(f"judging over predicting, {N:,} images by ResNet-20", f"{100 * figures['overhead']:.2f}")
    console.print(table)
    record = figures | {"quick": QUICK} | provenance()
    write_json(ROOT / "benchmarks" / "results" / f"judge{'-quick' if QUICK else ''}.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
