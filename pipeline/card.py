"""The model card: what a checkpoint or a package is, whose knowledge it holds, and what was measured of it.

Written from the run's record alone, so that it cannot say more than was measured.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from potstill.pipeline.ledger import Entry, gate_in_words
from potstill.validate.gate import Verdict
from potstill.validate.scorecard import Scorecard


def model_card(
    title: str, recipe: dict[str, Any], steps: list[Entry], limits: list[str], on_target: Sequence[str] = ()
) -> str:
    """A card in the hub's format.

    Args:
        title: of the model.
        recipe: as plain data.
        steps: the ledger so far, the teacher first.
        limits: sentences on what was not checked.
        on_target: sentences on where the target will run the nodes.
    """
    teacher = recipe["teacher"]["checkpoint"]
    hub_name = teacher if not teacher.startswith(("/", ".")) and ":" not in teacher else None
    header = ModelCardData(
        base_model=hub_name,
        pipeline_tag=None if recipe["task"] == "module" else recipe["task"],
        tags=["potstill", "distillation"] if any(step.log for step in steps) else ["potstill"],
    )
    data, judged = recipe["data"], steps[0].scorecard
    lines = [
        f"# {title}",
        "",
        f"This model's behaviour comes from the teacher `{_name(teacher)}`: it was made from it by Potstill, and the "
        "teacher's licence and terms, its mistakes and its biases may apply to it. Check them before you ship it.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {recipe['task']} |",
        f"| training data | {_name(data.get('train') or 'none')} |",
        *([f"| unlabelled training data | {_name(data['unlabelled'])} |"] if data.get("unlabelled") else []),
        *([f"| number formats | {steps[-1].what} |"] if steps[-1].kind == "package" else []),
        f"| judged on | {judged.examples} examples of {judged.data} |",
        "",
        "## Measured after each step",
        "",
        f"| step | {judged.metric} (95 % interval) | against the teacher | agreement | lost / gained | gate |",
        "|---|---|---|---|---|---|",
        *[_row(entry.name, entry.scorecard, entry.verdict) for entry in steps],
        "",
        *_elsewhere(steps[-1]),
        *(["## On the target", "", *[f"- {said}" for said in on_target], ""] if on_target else []),
        "## Not measured",
        "",
        *[f"- {limit}" for limit in [*limits, "Any data but that named above; other slices, languages and domains."]],
    ]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _elsewhere(last: Entry) -> list[str]:
    """The last step on other examples than those of the evaluation set, if it was judged on any."""
    if not last.shifts:
        return []
    return [
        "## On other examples",
        "",
        f"| examples | {last.scorecard.metric} (95 % interval) | to the teacher | agreement | lost / gained | gate |",
        "|---|---|---|---|---|---|",
        *[_row(f"{one.by}: {_name(one.what)}", one.scorecard, None) for one in last.shifts],
        "",
    ]


def _name(source: str) -> str:
    """The last part of a path: a card is published, and folders of a machine are nobody's business."""
    return source.rstrip("/").rpartition("/")[2]


def _row(name: str, card: Scorecard, verdict: Verdict | None) -> str:
    low, high = card.difference_interval.low * 100, card.difference_interval.high * 100
    cells = [
        name,
        f"{card.shown(card.value, 2)} ({card.shown(card.interval.low, 2)} to {card.shown(card.interval.high, 2)})"
        + "".join(f"; {name} {share * 100:.2f}" for name, share in card.beside.items()),
        f"{card.difference * 100:+.2f} points ({low:+.2f} to {high:+.2f})",
        "–" if card.agreement is None else f"{card.agreement:.2%}",
        "–" if card.lost is None else f"{card.lost} / {card.gained}",
        gate_in_words(verdict) if verdict else "–",
    ]
    return f"| {' | '.join(cells)} |"
