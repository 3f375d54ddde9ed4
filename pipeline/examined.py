"""What is known of a judged model beyond its scorecard: its flips, its slices and its calibration."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from potstill.pipeline.cache import Cache
from potstill.pipeline.material import Material
from potstill.validate.calibration import Calibration, calibration, confidence
from potstill.validate.examples import IGNORED
from potstill.validate.files import read_json
from potstill.validate.flips import flips_from_json
from potstill.validate.metrics import most_likely
from potstill.validate.slices import Slice, in_thirds, slices


def examined(cache: Cache, material: Material, judged: Path, teacher: Path) -> dict[str, Any]:
    """The fields `flips`, `slices` and `calibration` of an entry; none of a task without classes.

    Kept beside the scorecard and made from the kept logits, so that another column to slice by judges nothing again.

    Args:
        cache: of the run.
        material: with the evaluation set.
        judged: the folder with the model's logits.
        teacher: that with the teacher's.
    """
    if not (material.cuts and (judged / "record.json").is_file()):
        return {}
    record, data = read_json(judged / "record.json"), material.recipe.data
    key = cache.key("examined", judged=record["key"], slices=data.slices, seed=material.recipe.seed)
    if not cache.done("examined", key):
        with cache.making("examined", key) as (_, found):
            found |= _examine(material, judged, teacher)
    found = read_json(cache.place("examined", key) / "record.json")
    return {
        "flips": flips_from_json(record.get("flips")),
        "slices": TypeAdapter(list[Slice]).validate_python(found["slices"]),
        "calibration": TypeAdapter(Calibration).validate_python(found["calibration"]),
    }


def _examine(material: Material, judged: Path, teacher: Path) -> dict[str, Any]:
    known = material.eval.labels != IGNORED
    labels = material.eval.labels
    mine, theirs = (np.load(folder / "logits.npy", mmap_mode="r") for folder in (judged, teacher))
    sure = in_thirds("teacher’s confidence", confidence(theirs)[known], "%")
    right, teacher_right = ((most_likely(logits) == labels)[known] for logits in (mine, theirs))
    found = slices(right, teacher_right, [*(cut.take(known) for cut in material.cuts), sure])
    measured = calibration(mine, theirs, labels, material.recipe.seed)
    return {
        "slices": TypeAdapter(list[Slice]).dump_python(found, mode="json"),
        "calibration": TypeAdapter(Calibration).dump_python(measured, mode="json"),
    }
