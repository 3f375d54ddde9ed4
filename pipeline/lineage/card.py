"""The model card: what a checkpoint or a package is, whose knowledge it holds, and what was measured of it.

Written from the run's record alone, so that it cannot say more than was measured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from potstill.pipeline.ledger import Entry, gate_in_words
from potstill.pipeline.lineage.card_header import header
from potstill.pipeline.lineage.origins import PRIVATE, short
from potstill.pipeline.lineage.reading import private
from potstill.pipeline.lineage.terms import NO_LAWYER, Verdict
from potstill.pipeline.slice_words import gaps_in_words, named
from potstill.validate.gate import Verdict as Gated
from potstill.validate.scorecard import Scorecard
from potstill.validate.slices import SURE, Slice
from potstill.validate.units import counted, signed

NO_LOSS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "taught_rows", "kept_rows", "total_flos")
MOST = 5  # slices that are named of a kind


@dataclass(frozen=True)
class About:
    """What a card is written of, beside the ledger.

    Attributes:
        recipe: as plain data.
        verdict: on the licences.
        data: what each set of examples is: its name, hash and length.
    """

    recipe: dict[str, Any]
    verdict: Verdict
    data: dict[str, dict[str, Any]]


def model_card(title: str, about: About, steps: list[Entry], limits: list[str], on_target: Sequence[str] = ()) -> str:
    """A card in the hub's format.

    Args:
        title: of the model; a licence may put a word before it.
        about: the recipe, the verdict on licences, the data.
        steps: the ledger so far, the teacher first.
        limits: sentences on what was not checked.
        on_target: sentences on where the target will run the nodes.
    """
    recipe, verdict, judged, last = about.recipe, about.verdict, steps[0].scorecard, steps[-1]
    title = f"{verdict.prefix} {title}" if verdict.prefix else title
    lines = [
        f"# {title}",
        "",
        *[line for credit in verdict.credits for line in (f"**{credit}**", "")],
        f"This model's behaviour comes from {_whose(recipe)}: it was made from it by Potstill, and the "
        "teacher's licence and terms, its mistakes and its biases may apply to it.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {recipe['task']} |",
        *_data(about),
        *([f"| number formats | {last.what} |"] if last.kind == "package" else []),
        f"| judged on | {counted(judged.examples, 'example')} of {judged.data} |",
        "",
        *_passed_on(recipe, steps),
        "## Measured after each step",
        "",
        f"| step | {judged.metric} (95 % interval) | against the teacher | agreement | lost / gained | gate |",
        "|---|---|---|---|---|---|",
        *[_row(entry.name, entry.scorecard, entry.verdict) for entry in steps],
        "",
        *_elsewhere(last),
        *_slices(last),
        *(["## On the target", "", *[f"- {said}" for said in on_target], ""] if on_target else []),
        "## Not measured",
        "",
        *[f"- {limit}" for limit in [*limits, *_not_asked(recipe, last)]],
        "",
        *_licences(verdict),
        *_golden(recipe, last),
    ]
    return str(ModelCard(f"---\n{header(title, recipe, verdict, steps)}\n---\n\n" + "\n".join(lines) + "\n"))


def _whose(recipe: dict[str, Any]) -> str:
    """The teacher, by the last part of its path: folders of a machine are nobody's business."""
    teacher = recipe["teacher"]
    if api := teacher.get("api"):
        host = re.sub(r"^https?://|/.*$", "", api["api"])
        return f"the teacher `{api['model']}`, which answers at {PRIVATE if private(host) else host}"
    others = [f"`{short(one['checkpoint'])}`" for one in recipe.get("other_teachers") or []]
    return f"the teacher `{short(teacher['checkpoint'])}`" + (f", and from {', '.join(others)}" if others else "")


def _data(about: About) -> list[str]:
    """A row for each set of examples that was learned from or calibrated on."""
    names = {"train": "training data", "unlabelled": "unlabelled training data", "calibrate": "calibration data"}
    rows = []
    for key, what in names.items():
        source = about.recipe["data"].get(key)
        found = about.data.get(key) if source or (key == "train" and about.recipe["data"].get("prompts")) else None
        if found:
            digest = f"{counted(found['examples'], 'example')}, sha256 {found['sha256'][:12]}…"
            rows.append(f"| {what} | {short(source) if source else found['name']} ({digest}) |")
    if not any("training data" in row for row in rows):
        rows.insert(0, "| training data | none |")
    return rows


def _passed_on(recipe: dict[str, Any], steps: list[Entry]) -> list[str]:
    """How the knowledge was passed on, by what each stage's log says that it did."""
    told = []
    if student := next((step for step in steps if step.name == "student"), None):
        own = recipe["student"].get("checkpoint")
        told.append(f"The student began as {short(own) if own else f'a part of the teacher: {student.what}'}.")
    if api := recipe["teacher"].get("api"):
        told.append(f"`{api['model']}` wrote texts to given prompts; they were cleaned, and the student learned them.")
    for entry in steps:
        if entry.kind != "stage" or not entry.log:
            continue
        losses = sorted({name for row in entry.log for name in row} - {*NO_LOSS})
        losses = [name for name in losses if not name.startswith(("eval_", "train_"))]
        taught, kept = (int(entry.log[-1].get(name, 0)) for name in ("taught_rows", "kept_rows"))
        rows = f" The teacher ran for {counted(taught, 'row')}" if taught or kept else ""
        rows += f", and its kept outputs stood in for {kept:,}." if kept else "." if rows else ""
        by = f" by the losses {', '.join(losses)}" if losses else ""
        steps_done = int(max(row.get("step", 0) for row in entry.log))
        told.append(f"{entry.name}: {entry.what}; trained for {steps_done:,} steps{by}.{rows}")
    if not any(step.kind == "stage" for step in steps):
        told.append("Nothing was trained: the weights are those of the checkpoint, in other number formats.")
    return ["## How the knowledge was passed on", "", *[f"- {one}" for one in told], ""]


def _slices(last: Entry) -> list[str]:
    """The judge's findings on slices, good and bad, and where the teacher itself is weak."""
    if not last.slices:
        return []
    worse = [one for one in last.slices if one.worse]
    better = [one for one in last.slices if one.p_holm is not None and one.p_holm < SURE and one.difference > 0]
    told = [f"Worse than the teacher on {_slice(one)}." for one in worse[:MOST]]
    told += [f"Better than the teacher on {_slice(one)}." for one in better[:MOST]]
    if more := len(worse[MOST:]) + len(better[MOST:]):
        told.append(f"{more} more of these stand in the run's report.")
    if not worse and not better:
        told.append("On no slice worse or better than the teacher by more than chance explains.")
    told.append(gaps_in_words(last.slices))
    tested = [one for one in last.slices if one.p is not None]
    if tested:
        weak = min(tested, key=lambda one: one.teacher_accuracy)
        told.append(f"The teacher's own weakest slice, and what became of it: {_slice(weak)}.")
    return ["## Where it is worse, and where better", "", *[f"- {one}" for one in told], ""]


def _slice(one: Slice) -> str:
    low, high = one.interval.low * 100, one.interval.high * 100
    return (
        f"{named(one)} ({counted(one.examples, 'example')}): {one.accuracy * 100:.1f}% against "
        f"{one.teacher_accuracy * 100:.1f}%, {signed(one.difference * 100)} points [{signed(low)}, {signed(high)}]"
    )


def _not_asked(recipe: dict[str, Any], last: Entry) -> list[str]:
    """What nobody asked to be tested, and what no test of this kind can tell."""
    data, told = recipe["data"], []
    if not last.shifts:
        told.append("Examples of other origin than the evaluation set's, and such that are made harder.")
    if last.slices and not data.get("slices"):
        told.append("Slices by anything but class, length and the teacher's confidence: no column was named.")
    elif not last.slices:
        told.append("Slices: they are of tasks with one class for each example.")
    return [*told, "Any data but that named above; other slices, languages and domains."]


def _licences(verdict: Verdict) -> list[str]:
    """What the licences of its sources ask for, and what was done."""
    whole = {"allowed if": "Allowed if what stands below is done"}.get(verdict.level, verdict.level.capitalize())
    why = f": {verdict.decision}" if verdict.decision else ""
    by = f" Decided by {verdict.decided_by}{why}." if verdict.decided_by else ""
    lines = ["## Licences and terms", "", f"{whole}.{by} {NO_LAWYER}", ""]
    if verdict.findings:
        lines += [
            "| source | licence or terms | found in | verdict | why, and what must be done |",
            "|---|---|---|---|---|",
        ]
    for one in verdict.findings:
        what = f"[{one.licence}]({one.source})" if one.source and "://" in one.source else one.licence or "–"
        read = f", read {one.read}" if one.read else ""
        told = "; ".join([*one.why, *one.must])
        lines.append(f"| {one.role} {one.name} | {what}{read} | {one.where} | {one.level} | {told} |")
    done = [f"`{name}` lies beside this card." for name in verdict.texts]
    lines += [
        "",
        *[f"- Done: {one}" for one in done],
        *[f"- Left to whoever publishes it: {one}." for one in verdict.left],
    ]
    return lines if lines[-1] else lines[:-1]


def _golden(recipe: dict[str, Any], last: Entry) -> list[str]:
    """What a package passes on of the data itself."""
    if last.kind != "package":
        return []
    source = next(recipe["data"][key] for key in ("calibrate", "train", "eval") if recipe["data"].get(key))
    told = f"`golden/` holds inputs from {short(source)}; whether they may be passed on is for their licence to say"
    return [f"- Left to whoever publishes it: {told}."]


def _elsewhere(last: Entry) -> list[str]:
    """The last step on other examples than those of the evaluation set, if it was judged on any."""
    if not last.shifts:
        return []
    return [
        "## On other examples",
        "",
        f"| examples | {last.scorecard.metric} (95 % interval) | to the teacher | agreement | lost / gained | gate |",
        "|---|---|---|---|---|---|",
        *[_row(f"{one.by}: {Path(one.what).name}", one.scorecard, None) for one in last.shifts],
        "",
    ]


def _row(name: str, card: Scorecard, verdict: Gated | None) -> str:
    low, high = card.difference_interval.low * 100, card.difference_interval.high * 100
    cells = [
        name,
        f"{card.shown(card.value, 2)} ({card.shown(card.interval.low, 2)} to {card.shown(card.interval.high, 2)})"
        + "".join(f"; {words}" for words in card.also()),
        f"{card.difference * 100:+.2f} points ({low:+.2f} to {high:+.2f})",
        "–" if card.agreement is None else f"{card.agreement:.2%}",
        "–" if card.lost is None else f"{card.lost} / {card.gained}",
        gate_in_words(verdict) if verdict else "–",
    ]
    return f"| {' | '.join(cells)} |"
