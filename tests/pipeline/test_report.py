import math
import re
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.compress.likeness import Likeness
from potstill.pipeline.exhibits import Exhibit
from potstill.pipeline.ledger import Entry, Ledger
from potstill.pipeline.report import headline, unchecked, write_report
from potstill.targets.measurement import Comparison, Measurement, Operator, Timing, Where
from potstill.validate.calibration import calibration, confidence
from potstill.validate.errors import InputError
from potstill.validate.flips import ClassFlips, Flip, Flips
from potstill.validate.gate import Gate, Verdict, parse_limit
from potstill.validate.leaks import Leak
from potstill.validate.metrics import paired_difference, proportion
from potstill.validate.scorecard import Scorecard
from potstill.validate.slices import by_class, by_column, in_thirds, slices

N, TEACHER = 872, 805
WHERE = Where("Linux", "x86_64", "AMD EPYC 7B13 64-Core Processor", 16)
VERSIONS = {"onnxruntime": "1.31.1", "torch": "2.13.0", "transformers": "5.20.0"}
OPERATORS = [
    ("DynamicQuantizeMatMul", 36, 0.412), ("MatMulIntegerToFloat", 12, 0.187), ("Attention", 6, 0.121),
    ("LayerNormalization", 13, 0.068), ("BiasGelu", 6, 0.055), ("Gather", 4, 0.031), ("Softmax", 6, 0.024),
    ("SkipLayerNormalization", 12, 0.021), ("Reshape", 24, 0.009), ("Transpose", 18, 0.008), ("Cast", 3, 0.002),
]  # fmt: skip


def card(lost: int, gained: int, same: int | None = None, kl: float = 0.081, truncated: int = 0) -> Scorecard:
    right, agreed = TEACHER - lost + gained, N - lost - gained if same is None else same
    return Scorecard(
        metric="accuracy", examples=N, data="sst2/validation", value=right / N, interval=proportion(right, N),
        teacher_value=TEACHER / N, difference=(gained - lost) / N,
        difference_interval=paired_difference(lost, gained, N), agreement=agreed / N,
        agreement_interval=proportion(agreed, N), lost=lost, gained=gained, mcnemar_p=0.2, kl_nats=kl,
        truncated=truncated,
    )  # fmt: skip


def judged(scorecard: Scorecard, limit: str = "3pp") -> Verdict:
    return Gate(parse_limit(limit))(scorecard)


def training_log() -> list[dict[str, float]]:
    log: list[dict[str, float]] = []
    for step in range(50, 2001, 50):
        soft = 1.9 * math.exp(-step / 420) + 0.22 + 0.03 * math.sin(step / 37)
        hard = 0.7 * math.exp(-step / 500) + 0.2 + 0.02 * math.sin(step / 23)
        log.append({"step": step, "epoch": step / 500, "loss": 0.7 * soft + 0.3 * hard, "kl": soft, "hard": hard})
        if step % 400 == 0:
            held = 0.7 * (1.8 * math.exp(-step / 420) + 0.3) + 0.12 + max(0, step - 1200) / 9000
            log.append({"step": step, "eval_loss": held, "eval_runtime": 3.1})
    ends = {"step": 2000.0, "taught_rows": 17_000.0, "kept_rows": 51_000.0}
    return [*log, {"step": 2000, "train_loss": 0.61, "train_runtime": 700.0}, ends]


def alike(student: int = 3, teacher: int = 6) -> Likeness:
    cka: list[list[float | None]] = [
        [round(1 - abs(2 * i + 1 - j) / 20, 2) for j in range(teacher)] for i in range(student)
    ]
    cka[0][2] = None
    names = [[f"distilbert.transformer.layer.{i}" for i in range(count)] for count in (student, teacher)]
    return Likeness(*names, cka, [(i, 2 * i + 1) for i in range(student)], 256, "sst2/train (held out)")


def flipped(lost: int, gained: int) -> Flips:
    worst = [Flip(3 * i + 1, "negative", 0.91, "positive", 0.99 - 0.01 * i) for i in range(min(lost, 12))]
    return Flips(worst, lost, gained, [ClassFlips("negative", 428, lost, gained)] if lost + gained else [])


@cache
def examined(seed: int = 0, lost: float = 0.03) -> dict[str, Any]:
    """Slices, and calibration, of answers that are drawn: the class `negative` loses more."""
    rng = np.random.default_rng(seed)
    labels, who = (
        rng.integers(2, size=N),
        [("critic", "reader", None)[i] for i in rng.choice(3, N, p=[0.6, 0.395, 0.005])],
    )
    theirs = (rng.normal(size=(N, 2)) + 3 * np.eye(2)[labels]).astype(np.float32)
    mine = theirs.copy()
    flips = rng.random(N) < np.where(labels == 0, 4 * lost, 0)
    mine[flips] = theirs[flips][:, ::-1]
    right, teacher_right = (logits.argmax(axis=1) == labels for logits in (mine, theirs))
    sure = in_thirds("teacher’s confidence", confidence(theirs), "%")
    cuts = [by_class(labels, ["negative", "positive"]), by_column("who", who), sure]
    return {"slices": slices(right, teacher_right, cuts), "calibration": calibration(1.6 * mine, theirs, labels)}


def measurement(name: str, ms: float, **changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "kind": "measured", "package": name, "where": WHERE, "providers": ["CPUExecutionProvider"],
        "missing_providers": [], "provider_nodes": {"CPUExecutionProvider": 214}, "threads": 1, "warmup": 10,
        "runs": 200, "load_ms": 148.3, "page_cache_dropped": True, "first_run_ms": ms * 2.1, "min_ms": ms * 0.96,
        "median_ms": ms, "p90_ms": ms * 1.07, "peak_memory_mb": 92.4, "baseline_mb": 61.8,
        "memory_method": "VmHWM of /proc/self/status", "file_mb": 23.1,
        "inputs": {"input_ids": "int64 1×23", "attention_mask": "int64 1×23"},
        "operators": [Operator(op, "CPUExecutionProvider", count, share) for op, count, share in OPERATORS],
        "unattributed_share": 0.062, "versions": VERSIONS,
    }  # fmt: skip
    fields |= {"device": "local", "p99_ms": 6.0, "noise": 0.01, "weights_mb": 22.0, "activations_mb": 1.5}
    fields |= {"nodes": [], "throughput": {}, "sensors": {}, "energy_mj": None}
    return Measurement(**(fields | changes))


def entry(name: str, kind: Any, what: str, scorecard: Scorecard, size: float, **more: Any) -> Entry:
    fields: dict[str, Any] = {"verdict": None, "parameters": 22_713_216, "seconds": 312.0, "folder": name}
    return Entry(name=name, kind=kind, what=what, scorecard=scorecard, size_bytes=int(size * 1e6), **(fields | more))


def package(name: str, lost: int, gained: int, size: float, **more: Any) -> Entry:
    scorecard = card(lost, gained, kl=0.1)
    fields = {
        "verdict": judged(scorecard),
        "as_target": True,
        "note": f"This machine's CPU ({WHERE.cpu}) has the instruction sets of {name}.",
        "seconds": 21.4,
        "measurement": measurement(name, 4.1),
        "flips": flipped(lost, gained),
        **examined(lost, 0.04),
    }
    return entry(name, "package", "dynamic int8 weights, per channel", scorecard, size, **(fields | more))


def teacher() -> Entry:
    return entry("teacher", "teacher", "distilbert-base-uncased-finetuned-sst-2-english", card(0, 0, kl=0.0), 267.8,
                 parameters=66_955_010, seconds=14.2)  # fmt: skip


def start() -> Entry:
    return entry("start", "start", "3 of 6 layers, hidden 384, before any training", card(420, 24, kl=1.4), 91.0)


def distill(lost: int = 19, gained: int = 14, **more: Any) -> Entry:
    scorecard = card(lost, gained, truncated=12)
    fields = {"verdict": judged(scorecard), "log": training_log(), "seconds": 1840.0, "likeness": alike(),
              "flips": flipped(lost, gained), **examined()}  # fmt: skip
    return entry("distill", "stage", "3 of 6 layers, temperature 2", scorecard, 91.0, **(fields | more))


def compared(times: dict[str, float]) -> Comparison:
    first = next(iter(times.values()))
    rows = [
        Timing(name, ["CPUExecutionProvider"], [], ms, ms / first, ms / first * 0.97, ms / first * 1.04)
        for name, ms in times.items()
    ]
    return Comparison("measured", "local", WHERE, 1, 10, 200, rows, VERSIONS)


def ledger(entries: list[Entry], comparison: Comparison | None = None, limit: str | None = "3pp") -> Ledger:
    recipe: dict[str, Any] = {
        "task": "text-classification",
        "teacher": {"checkpoint": "distilbert-base-uncased-finetuned-sst-2-english"},
        "data": {"train": "sst2:train", "eval": "sst2:validation", "max_length": 64},
        "student": {"layers": 3, "hidden": 384},
        "stages": [{"distill": {"epochs": 4, "temperature": 2.0, "learning_rate": 5e-05}}],
        "targets": [one.name for one in entries if one.kind == "package"],
        "seed": 7,
    }
    if limit:
        recipe["gate"] = {"max_drop": limit}
    machine = {"processor": WHERE.cpu, "cores": "16", "accelerator": "none"}
    return Ledger(recipe, entries, machine, VERSIONS, comparison)


def passing() -> Ledger:
    packages = [package("laptop-x86-vnni", 21, 15, 23.1), package("laptop-x86-avx2", 22, 15, 23.2),
                package("browser-wasm", 20, 15, 23.1)]  # fmt: skip
    times = {"teacher": 24.31, "laptop-x86-vnni": 4.10, "laptop-x86-avx2": 4.77, "browser-wasm": 4.42}
    return ledger([teacher(), start(), distill(), *packages], compared(times))


def mixed() -> Ledger:
    far = "phone-arm64-dotprod is for arm64 and this machine is x86_64."
    slow = measurement("phone-iphone-coreml-neural-engine-16", 11.2, missing_providers=["CoreMLExecutionProvider"],
                       page_cache_dropped=False, peak_memory_mb=None, operators=[],
                       unattributed_share=None)  # fmt: skip
    packages = [
        package("laptop-x86-vnni", 21, 15, 23.1),
        package("phone-arm64-dotprod", 36, 20, 23.4, as_target=False, note=far),
        package("phone-iphone-coreml-neural-engine-16", 88, 9, 45.6, as_target=False, measurement=slow,
                note="phone-iphone runs on coreml with [], not on a CPU provider."),
    ]  # fmt: skip
    times = {"teacher": 24.31, "laptop-x86-vnni": 4.1, "phone-arm64-dotprod": 4.6, packages[2].name: 11.2}
    return ledger([teacher(), start(), distill(), *packages], compared(times))


def eight() -> Ledger:
    packages = [package(f"target-number-{i}-of-eight", 20 + i, 15, 23.1 + 0.05 * i, measurement=None,
                        as_target=[True, None, False][i % 3]) for i in range(8)]  # fmt: skip
    times = {"teacher": 24.31} | {one.name: 4.1 + 0.1 * i for i, one in enumerate(packages[:7])}
    return ledger([teacher(), start(), distill(), *packages], compared(times))


def refused() -> Ledger:
    return ledger([teacher(), start(), distill(58, 13)])


VARIANTS = {
    "passing": passing, "mixed": mixed, "eight": eight, "refused": refused,
    "no_packages": lambda: ledger([teacher(), start(), distill()]),
    "one_entry": lambda: ledger([teacher()], limit=None),
    "no_gate": lambda: ledger([teacher(), start(), distill(verdict=None)], limit=None),
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(of: Ledger, folder: Path, title: str = "Sentiment for phones", examples: Any = None) -> str:
    write_report(of, folder / "report.html", title=title, examples=examples)
    return (folder / "report.html").read_text(encoding="utf-8")


@cache
def page_of(variant: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return render(VARIANTS[variant](), Path(folder))


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_is_whole_and_alone(variant: str) -> None:
    text = page_of(variant)
    page = Page(text)
    assert page.open == []
    assert "://" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(value.startswith("#") for value in page.values("href", "src", "xlink:href"))
    assert [name for name, count in Counter(page.values("id")).items() if count > 1] == []
    ids = set(page.values("id"))
    assert {value[1:] for value in page.values("href")} | set(re.findall(r"url\(#([^)]+)\)", text)) <= ids
    assert "#010a" not in text
    assert not re.search(r"\bnan\b|\binf\b|None", page.text)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_drawing_is_told(variant: str) -> None:
    text = page_of(variant)
    for tag in re.findall(r"<svg[^>]*>", text):
        assert ('role="img"' in tag and re.search(r'aria-label="[^"]{20,}"', tag)) or 'aria-hidden="true"' in tag


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_entry_and_its_numbers_stand_in_the_page(variant: str) -> None:
    of, shown = VARIANTS[variant](), Page(page_of(variant)).text
    for one in of.entries:
        scorecard = one.scorecard
        wanted = [one.name, one.what, f"{scorecard.value:.1%}", f"[{scorecard.interval.low:.1%}, "]
        if one.kind != "teacher":
            wanted += [
                f"{scorecard.agreement:.1%}",
                f"{scorecard.lost} / {scorecard.gained}",
                f"{scorecard.kl_nats:.3f}",
            ]
        if one.verdict:
            wanted.append(one.verdict.reason)
        if one.measurement:
            wanted += [f"{one.measurement.median_ms:.2f} ms", f"{one.measurement.p90_ms:.2f}"]
        assert [word for word in wanted if word not in shown] == []
    assert f"{N} examples of sst2/validation" in shown
    assert headline(of) in shown


def test_same_ledger_gives_the_same_page(tmp_path: Path) -> None:
    assert render(mixed(), tmp_path) == page_of("mixed")


def test_users_text_is_escaped(tmp_path: Path) -> None:
    bad = '<script>alert("1")</script> $x^2$'
    one = package(bad, 20, 15, 23.1, note=bad, measurement=measurement(bad, 4.1, inputs={bad: bad}))
    stage = replace(distill(), name=bad, what=bad)
    of = ledger([teacher(), start(), stage, one], compared({"teacher": 9.0, bad: 4.1}))
    page = Page(render(of, tmp_path, title=bad))
    assert "script" not in page.tags
    assert bad in page.text


def test_headline_when_all_pass() -> None:
    assert headline(passing()) == (
        "All 3 packages passed: at most 0.8 points below the teacher, 11.5× to 11.6× smaller, 5.1× to 5.9× faster than "
        "the teacher’s own ONNX on this machine."
    )


def test_headline_says_what_the_estimate_decided() -> None:
    of = ledger([teacher(), distill(), package("a", 21, 15, 23.1), package("b", 36, 20, 23.1)])
    assert headline(of).endswith(" smaller (1 of 2 undecided; decided by the estimate).")


def test_headline_of_one_package() -> None:
    of = ledger(
        [teacher(), distill(), package("browser-wasm", 21, 15, 535.6)], compared({"teacher": 2.0, "browser-wasm": 4.0})
    )
    assert headline(of) == (
        "The package passed: 0.7 points below the teacher, 2.0× larger, 2.0× slower than the teacher’s own ONNX on "
        "this machine."
    )


def test_headline_without_times() -> None:
    of = ledger([teacher(), package("a", 10, 15, 26.78), package("b", 10, 10, 26.78)])
    assert headline(of) == "All 2 packages passed: none below the teacher, 10.0× smaller."


def test_headline_of_packages_that_failed() -> None:
    told = headline(mixed())
    assert told.startswith("2 of 3 passed: phone-iphone-coreml-neural-engine-16 lost 9.1 points, the limit is 3")


def test_headline_of_a_stopped_run() -> None:
    assert headline(refused()) == "Stopped: distill lost 5.2 points, the limit is 3."
    in_shares = distill(58, 13, verdict=judged(card(58, 13), "2%"))
    assert headline(ledger([teacher(), in_shares], limit="2%")) == (
        "Stopped: distill lost 5.2 points, the limit is 1.8 (2% of the teacher’s value)."
    )


def test_headline_tells_a_near_miss_apart() -> None:
    near = distill(41, 14, verdict=judged(card(41, 14), "3.08pp"))
    assert headline(ledger([teacher(), near], limit="3.08pp")) == (
        "Stopped: distill lost 3.10 points, the limit is 3.08 (undecided; decided by the estimate)."
    )


def test_headline_without_packages_gate_or_stages() -> None:
    assert headline(VARIANTS["no_packages"]()) == (
        "distill passed: 0.6 points below the teacher, 2.9× smaller. No package was made."
    )
    assert headline(VARIANTS["no_gate"]()) == (
        "distill was judged by no gate: 0.6 points below the teacher, 2.9× smaller. No package was made."
    )
    assert headline(VARIANTS["one_entry"]()).startswith("No stage has finished: only the starting point was judged;")


def test_what_was_not_checked_is_told() -> None:
    told = " ".join(unchecked(mixed()))
    assert "phone-iphone-coreml-neural-engine-16: CoreMLExecutionProvider was asked for and is missing here." in told
    assert "phone-arm64-dotprod: judged on this machine, which does not compute as the target does." in told
    assert "distill: 12 of 872 examples were cut to the longest input." in told
    assert "more examples would decide it" in told
    of = mixed()
    of.recipe["targets"].append("phone-iphone")
    assert "phone-iphone: no package was made." in unchecked(of)


def test_missing_provider_is_loud(tmp_path: Path) -> None:
    assert "Not run by CoreMLExecutionProvider." in Page(render(mixed(), tmp_path)).text


def test_no_entries_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no entries"):
        write_report(ledger([]), tmp_path / "report.html", title="x")
    assert not (tmp_path / "report.html").exists()


def test_lost_examples_are_shown(tmp_path: Path) -> None:
    bad, picture = '<b onclick="x">so good</b>', "data:image/png;base64,iVBORw0KGgo="
    text = render(passing(), tmp_path, examples={1: Exhibit((bad,), ()), 4: Exhibit((), (picture,))})
    page = Page(text)
    assert "b" not in [tag for tag, name, _ in page.attributes if name == "onclick"]
    assert f"{bad} says positive at 99.0%, right is negative , teacher at 91.0%; row 1" in page.text
    assert page.values("src") == [picture] * 4  # of the stage and of three packages
    assert "row 34" in page.text  # the twelfth
    assert "row 37" not in page.text
    assert "lost 19, gained 14 of 872" in page.text
    assert "negative 428 19 14" in page.text


def test_many_classes_are_cut_and_counted(tmp_path: Path) -> None:
    many = Flips([], 0, 30, [ClassFlips(f"kind{i}", 9, 0, 1) for i in range(30)])
    shown = Page(render(ledger([teacher(), distill(flips=many)]), tmp_path)).text
    assert "kind11 9 0 1" in shown
    assert "kind12" not in shown
    assert "18 more classes have flips." in shown


def test_where_nothing_is_known_of_examples_and_layers_nothing_is_said(tmp_path: Path) -> None:
    bare = distill(flips=None, likeness=None, slices=None, calibration=None, log=[{"step": 1.0, "parameters": 9.0}])
    shown = Page(render(ledger([teacher(), bare]), tmp_path)).text
    assert "the student lost" not in shown
    assert "layer by layer" not in shown
    assert "Losses over time" not in shown
    assert "how sure the models are" not in shown


def test_the_report_says_how_often_the_teacher_ran(tmp_path: Path) -> None:
    ran = "the teacher ran for 17,000 examples, and for 51,000 its outputs were read from disk."
    assert ran in Page(render(passing(), tmp_path)).text
    rounds = [*training_log(), *training_log()]  # of a stage that trains twice
    assert "the teacher ran for 34,000" in Page(render(ledger([teacher(), distill(log=rounds)]), tmp_path)).text
    unread = [*training_log()[:-1], {"step": 2000.0, "taught_rows": 0.0, "kept_rows": 0.0}]
    assert "the teacher ran" not in Page(render(ledger([teacher(), distill(log=unread)]), tmp_path)).text


def test_a_ledger_with_likeness_and_flips_is_plain_data() -> None:
    plain = passing().to_json()["entries"][2]
    assert plain["likeness"]["matched"] == [[0, 1], [1, 3], [2, 5]]
    assert plain["flips"]["worst"][1]["row"] == 4


def test_a_leaked_evaluation_set_is_loud(tmp_path: Path) -> None:
    of = mixed()
    assert "has leaked" not in render(of, tmp_path)
    rest = replace(card(10, 2), examples=830, value=0.9, difference=-0.012)
    of.leaks = [Leak("train", N, [3], [(3, 8), (17, 5233)], "so alike"), Leak("calibrate", N, [], None)]
    of.entries = [replace(entry, unleaked=rest) if i < 2 else entry for i, entry in enumerate(of.entries)]
    shown = Page(render(of, tmp_path)).text
    told = (
        "Without the 2 evaluation examples that are exact or near duplicates of data.train, accuracy on the other 830: "
    )
    ends = ", ".join(f"{100 * one:.1f}" for one in (rest.difference_interval.low, rest.difference_interval.high))
    assert f"{told}teacher 90.0%, {of.entries[1].name} 90.0% (−1.2 pp [{ends}]).".replace("-", "−") in shown
    assert "Near duplicates of evaluation examples in data.calibrate were not looked for" in " ".join(unchecked(of))
