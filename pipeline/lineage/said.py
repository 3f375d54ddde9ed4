"""What a recipe says of licences and terms itself, and who decided."""

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from potstill.pipeline.lineage.licences import licence_named, service_named
from potstill.validate.errors import InputError

Text = Annotated[str, Field(min_length=1)]
DECIDED_BY = "POTSTILL_DECIDED_BY"  # who decides on unknown licences where a recipe names nobody


class LicencesSpec(BaseModel):
    """What a recipe says of licences: an SPDX id, an id of the hub's, or `own` for what one made oneself.

    Attributes:
        teacher: of the teacher; with an API, of the model behind it.
        other_teachers: of the further teachers, one for each, in their order.
        student: of the checkpoint that the student starts from.
        data: of all examples that are learned from; `train`, `unlabelled` and `prompts` say otherwise for one set.
        api: terms of the service, by their id in the table; `own-server` for a server of one's own.
        made: the licence that is given to what is made, where its sources leave that open.
        use: whether what is made is for commercial use.
        competes: whether it competes with the owner of the service or model that taught it.
        decided_by: who decided where the table does not know, or against what a folder says.
        decision: why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: Text | None = None
    other_teachers: tuple[Text, ...] = ()
    student: Text | None = None
    data: Text | None = None
    train: Text | None = None
    unlabelled: Text | None = None
    prompts: Text | None = None
    api: Text | None = None
    made: Text | None = None
    use: Literal["commercial", "non-commercial"] | None = None
    competes: bool | None = None
    decided_by: Text | None = None
    decision: Text | None = None

    @field_validator("teacher", "student", "data", "train", "unlabelled", "prompts", "made", "other_teachers", "api")
    @classmethod
    def _known(cls, value: str | tuple[str, ...] | None, info: ValidationInfo) -> str | tuple[str, ...] | None:
        """Refuse a name that nobody knows."""
        look = service_named if info.field_name == "api" else licence_named
        for name in (value,) if isinstance(value, str) else value or ():
            try:
                look(name, "given")
            except InputError as error:
                raise ValueError(str(error).removeprefix("given: ")) from None
        return value

    @field_validator("decision")
    @classmethod
    def _by_somebody(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Refuse a decision by nobody."""
        if value and not info.data.get("decided_by"):
            raise ValueError("a decision is somebody's: give decided_by too")
        return value

    @property
    def decider(self) -> str | None:
        """Who decides where the table does not know: the recipe's, else the environment's."""
        return self.decided_by or os.environ.get(DECIDED_BY, "").strip() or None

    def of(self, role: str, index: int = 0) -> str | None:
        """What is said of one source."""
        if role == "other_teachers":
            return self.other_teachers[index] if index < len(self.other_teachers) else None
        own: str | None = getattr(self, role)
        return own or (self.data if role in ("train", "unlabelled", "prompts") else None)
