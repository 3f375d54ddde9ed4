"""The models of a recipe: where each comes from."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from potstill.compress.api_settings import ApiTeacher
from potstill.validate.checkpoint import is_factory, onnx_file

Text = Annotated[str, Field(min_length=1)]


class CheckpointSpec(BaseModel):
    """A folder that transformers opens, a hub name, or `package.module:factory` with its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Text
    weights: Path | None = None

    @model_validator(mode="after")
    def _weights_need_a_factory(self) -> "CheckpointSpec":
        if self.weights and not is_factory(self.checkpoint):
            raise ValueError(f"weights go with package.module:factory only; the checkpoint is {self.checkpoint!r}")
        return self


class TeacherSpec(CheckpointSpec):
    """A teacher; for an ONNX file, `preprocessing` is the folder with its config and its tokenizer or processor.

    With `api`, a service writes what is learned, and the checkpoint is the student's own, to be judged against.
    """

    preprocessing: Path | None = None
    api: ApiTeacher | None = None

    @model_validator(mode="after")
    def _preprocessing_of_onnx(self) -> "TeacherSpec":
        if self.preprocessing and not onnx_file(self.checkpoint):
            raise ValueError(f"preprocessing goes with an ONNX file only; the checkpoint is {self.checkpoint!r}")
        return self


class OtherTeacherSpec(CheckpointSpec):
    """A further teacher over the same classes; the first one has the weight 1."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
