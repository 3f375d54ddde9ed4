"""A model as the road sees it: how it is fed, read and saved; and what all tasks share.

Shapes: N examples, B of them in a batch, R rows that are judged (N where each example has one class), C classes.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.validate.checkpoint import RECORD, WEIGHTS, Checkpoint
from potstill.validate.data import load_examples
from potstill.validate.encoder import Encoder
from potstill.validate.examples import Examples, Rows, check_evaluation_set
from potstill.validate.files import write_json
from potstill.validate.low_rank import KEY as LOW_RANK
from potstill.validate.low_rank import ranks_of
from potstill.validate.onnx_file import OnnxModule
from potstill.validate.quantized import FakeQuantized
from potstill.validate.reshape import record_of
from potstill.validate.scorecard import Scorecard, judge

MASKED = -1e4  # the logit of what cannot be the answer; finite in float16 too
Read = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
Gives = Literal["class", "classes", "vector", "span", "tokens"]  # of one example: a class, one for each word, …


def as_they_are(outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The outputs themselves: one row for each example."""
    return outputs


@dataclass
class Model:
    """A loaded checkpoint, ready to be fed.

    Attributes:
        module: `forward(*inputs) -> outputs`, inputs in the order of `input_names`; the outputs are the task's:
            logits (B, C), or as the task says. With fake quantisation in it after quantisation-aware training.
        encode: raw rows to named inputs.
        input_names: the inputs' names in the order of `forward`.
        labels: class names, in the order of the logits; none for a task without classes.
        checkpoint: where it came from.
        core: the module that is saved: the transformers model, or the user's own.
        fresh: parameters that the checkpoint did not hold, so that they start untrained.
        read: outputs of `module` and the encoded rows to the rows that are judged (R, C); R is B for a task
            with one class for each example.
        output: what an ONNX graph calls the output of `module`.
    """

    module: nn.Module
    encode: Encoder
    input_names: tuple[str, ...]
    labels: tuple[str, ...]
    checkpoint: Checkpoint
    core: nn.Module
    fresh: tuple[str, ...] = field(default=())
    read: Read = as_they_are
    output: str = "logits"

    def save(self, folder: Path) -> None:
        """Write the checkpoint: what `from_pretrained` opens, or `model.safetensors` for a factory.

        A model with shapes or ranks of its own opens with Potstill alone; see `reshape.py` and `low_rank.py`.
        """
        core: Any = self.core
        record = record_of(core) | ({LOW_RANK: ranks} if (ranks := ranks_of(core)) else {})
        if hasattr(core, "save_pretrained"):
            with quiet_transformers():  # shapes are recorded by the model's own names, so these are to be in the file
                core.save_pretrained(folder, **({"save_original_format": False} if record else {}))
        else:
            from safetensors.torch import save_model

            save_model(self.core, str(folder / WEIGHTS))
            record |= {"factory": self.checkpoint.source}
        if record:
            write_json(folder / RECORD, record)
        if isinstance(self.module, FakeQuantized):
            self.module.save(folder)
        self.encode.save(folder)

    def in_float(self) -> "Model":
        """The same weights without fake quantisation."""
        return replace(self, module=self.module.inner) if isinstance(self.module, FakeQuantized) else self

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.core.parameters())

    def tensors(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """Encoded rows: the inputs of `forward`, and what `read` needs beside them."""
        return {name: torch.from_numpy(array).to(device) for name, array in self.encode(rows).items()}

    def batch(self, rows: Rows, device: torch.device) -> list[Tensor]:
        """Encoded rows as tensors in the order of `forward`."""
        tensors = self.tensors(rows, device)
        return [tensors[name] for name in self.input_names]

    def answers(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the model says of encoded rows: logits (R, C), one row for each thing that is judged."""
        outputs: Tensor = self.module(*(tensors[name] for name in self.input_names))
        return self.read(outputs, tensors)


class OnnxModel(Model):
    """An ONNX file as a model: it can be fed, read and packaged, and not trained, cut or saved."""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        assert isinstance(self.core, OnnxModule)
        return self.core.weights


class LogitsOf(nn.Module):
    """A transformers model as a plain function of positional inputs to one output: logits (B, …, C)."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the task needs of the model's outputs."""
        named = dict(zip(self.names, inputs, strict=True))
        return self.pick(self.model(**named, return_dict=True), named)

    def pick(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """One tensor out of a transformers model's outputs: here the logits (B, …, C)."""
        logits: Tensor = outputs.logits
        return logits


class Task(Protocol):
    """What the road asks of a task."""

    word: str  # its name in a recipe
    features: tuple[str, ...]  # the feature columns that it learns from
    length_of: str | None  # the column whose length groups batches, if one does
    gives: Gives  # what the model says of one example

    @property
    def load(self) -> Callable[..., Model]:
        """`load(checkpoint, labels=None, like=None, **options)`.

        With `labels`, as a student whose head may be untrained; with `like`, a loaded teacher, whose encoder a
        factory's module uses when it brings none.

        Raises:
            InputError: it cannot be read, or is no model for this task.
            Unreachable: a hub name that the hub did not give.
        """
        ...

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """Read examples to learn from or to judge on; see `load_examples`."""
        ...

    def checked(
        self, examples: Examples, names: tuple[str, ...], *, encode: Encoder | None = None, judging: bool = False
    ) -> Examples:
        """The examples with labels as indices into `names`, the classes of a model; `encode` is what feeds it.

        Raises:
            InputError: the labels are not the model's, or nothing can be judged on such examples.
        """
        ...

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """The scorecard of a model's rows (R, C) against its teacher's, as `predict` kept them: float16, on disk.

        `encode` is what fed them both, for a task whose rows say where in the input the answer is.

        Raises:
            InputError: the rows are not over the same examples and classes.
        """
        ...


class OneClass:
    """How a task with one class for each example reads and judges examples."""

    features: tuple[str, ...]
    gives: Gives = "class"

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """See `Task.examples`."""
        return load_examples(source, self.features, columns, labelled=labelled)

    def checked(
        self, examples: Examples, names: tuple[str, ...], *, encode: Encoder | None = None, judging: bool = False
    ) -> Examples:
        """See `Task.checked`."""
        examples = examples.with_labels(names)
        if judging:
            check_evaluation_set(examples)
        return examples

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """Accuracy over the examples that have a label; see `Task.judge`."""
        return judge(mine, teacher, examples.labels, examples.name, truncated)


class quiet_transformers:  # noqa: N801 - reads as a statement
    """No progress bars, load reports or advice from transformers inside."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._level = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self._level)
        self._warnings.__exit__(*exc)  # type: ignore[arg-type]


logging.getLogger("torch.onnx").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
