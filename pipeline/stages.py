"""The stages by their word in a recipe. A new stage is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.likeness import likeness
from potstill.validate.task import Model

STAGES: Mapping[str, type[Any]] = {"distill": Distill}


def learn(stage: Any, student: Model, lesson: Lesson) -> dict[str, Any]:
    """Train `student` by a stage, then compare its layers with the teacher's.

    Returns:
        `log` and `likeness`, as plain data.

    Raises:
        InputError: as the stage.
    """
    log = stage(student, lesson)
    training = getattr(stage, "distill", stage)  # of a stage that trains beside its own work
    found = likeness(student, lesson, training.terms(lesson))
    return {"log": log, "likeness": found and found.to_json()}
