"""The stages by their word in a recipe. A new stage is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.likeness import likeness
from potstill.compress.prune import Prune
from potstill.compress.qat import Qat
from potstill.validate.task import Model

STAGES: Mapping[str, type[Any]] = {"distill": Distill, "prune": Prune, "qat": Qat}


def compared(stage: Any, student: Model, lesson: Lesson) -> dict[str, Any] | None:
    """How like the teacher's layers the student's are after a stage, as plain data; None where none can be heard."""
    training = getattr(stage, "distill", stage)  # of a stage that trains beside its own work
    found = likeness(student, lesson, training.terms(lesson, student))
    return found.to_json() if found else None


def settings_of(stage: Any) -> dict[str, Any]:
    """All settings of a stage, defaults included."""
    plain: dict[str, Any] = TypeAdapter(type(stage)).dump_python(stage, mode="json")
    return plain


def in_words(settings: dict[str, Any]) -> str:
    """The settings that say most of a stage."""
    settings = settings | settings.get("distill", {})
    words = {
        "activation": "{} × int8",
        "layers": "{} layer{s} less", "heads": "{:.0%} of heads less", "neurons": "{:.0%} of neurons less",
        "channels": "{:.0%} of channels less", "rounds": "{} round{s}", "epochs": "{:g} epoch{s}",
        "temperature": "T {:g}",
    }  # fmt: skip
    known = {name: settings[name] for name in words if settings.get(name) is not None}
    told = [words[name].format(value, s="" if value == 1 else "s") for name, value in known.items()]
    return ", ".join([*told, *(settings.get("losses") or {})])
