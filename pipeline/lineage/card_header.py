"""The YAML header of a model card, as the hub reads it.

Fields: https://huggingface.co/docs/hub/model-cards
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from potstill.pipeline.ledger import Entry
from potstill.pipeline.lineage.terms import Verdict
from potstill.validate.checkpoint import is_factory
from potstill.validate.data import split_key

METRICS = {"accuracy": "accuracy", "entity F1": "f1", "SQuAD F1": "f1", "Spearman": "spearmanr"}  # by the hub's names


def header(title: str, recipe: dict[str, Any], verdict: Verdict, steps: list[Entry]) -> str:
    """The header of a card.

    `base_model` is the model whose weights these were: the student's own checkpoint, else the teacher. Its relation is
    `quantized` where nothing was trained, else `finetune`, the nearest that the hub has: the weights that the student
    kept were trained on. A teacher that only taught stands in the text and the tags.
    """
    last, licence = steps[-1], verdict.licence
    trained = any(step.log for step in steps)
    own = (recipe.get("student") or {}).get("checkpoint")
    base = _hub_name(own or recipe["teacher"]["checkpoint"])
    card, metric = last.scorecard, METRICS.get(last.scorecard.metric)
    task = None if recipe["task"] == "module" else recipe["task"]
    on_hub = licence is None or licence.on_hub
    data = split_key(recipe["data"]["eval"])[0]
    result = EvalResult(
        task_type=task or "",
        dataset_type=_hub_name(data) or re.sub(r"[^\w.-]+", "-", Path(data).name),
        dataset_name=card.data,
        metric_type=metric or "",
        metric_value=card.value,
        metric_name=f"{card.metric}, 95 % interval {card.interval.low:.4f} to {card.interval.high:.4f}",
    )
    learned = [split_key(source)[0] for key in ("train", "unlabelled") if (source := recipe["data"].get(key))]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if trained else "quantized",
        license=None if licence is None else licence.id if on_hub else "other",
        license_name=None if on_hub or licence is None else licence.id,
        license_link=None if on_hub or licence is None else licence.source,
        datasets=[name for name in map(_hub_name, learned) if name] or None,
        metrics=[metric] if metric else None,
        pipeline_tag=task,
        model_name=title if task and metric else None,
        eval_results=[result] if task and metric else None,
        tags=["potstill", "distillation"] if trained else ["potstill"],
    ).to_yaml()


def _hub_name(source: str) -> str | None:
    """A name of the hub; None for a path or a factory."""
    local = source.startswith(("/", ".", "~")) or is_factory(source) or Path(source).exists() or source == "none"
    return None if local else source
