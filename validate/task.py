"""A task: how its model is loaded, fed, read and saved.

Shapes: B examples in a batch, C classes.
A new task is one class here and one line in `TASKS`.
"""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.validate.checkpoint import (
    RECORD,
    WEIGHTS,
    Checkpoint,
    beside,
    build_module,
    open_folder,
    reading_weights,
    some,
)
from potstill.validate.data import Rows
from potstill.validate.encoder import ArrayEncoder, Encoder, ImageEncoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import write_json
from potstill.validate.low_rank import KEY as LOW_RANK
from potstill.validate.low_rank import load_low_rank, ranks_of, recorded_ranks
from potstill.validate.quantized import FakeQuantized, restored
from potstill.validate.reshape import record_of, recorded, reshaped_class, shapes_in


def as_they_are(outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The outputs themselves: one row for each example."""
    return outputs


@dataclass
class Model:
    """A loaded checkpoint, ready to be fed.

    Attributes:
        module: `forward(*inputs) -> logits`, inputs in the order of `input_names`, logits (B, C); with fake
            quantisation in it after quantisation-aware training.
        encode: raw rows to named inputs.
        input_names: the inputs' names in the order of `forward`.
        labels: class names, in the order of the logits.
        checkpoint: where it came from.
        core: the module that is saved: the transformers model, or the user's own.
        fresh: parameters that the checkpoint did not hold, so that they start untrained.
        read: outputs of `module` and the encoded rows to the rows that are judged (R, C); R is B for a task
            with one class for each example.
    """

    module: nn.Module
    encode: Encoder
    input_names: tuple[str, ...]
    labels: tuple[str, ...]
    checkpoint: Checkpoint
    core: nn.Module
    fresh: tuple[str, ...] = field(default=())
    read: Callable[[Tensor, Mapping[str, Tensor]], Tensor] = as_they_are

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


class LogitsOf(nn.Module):
    """A transformers model as a plain function of positional inputs to logits (B, C)."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True).logits
        return logits


class Task(Protocol):
    """What the road asks of a task."""

    word: str  # its name in a recipe
    features: tuple[str, ...]  # the feature columns it reads
    length_of: str | None  # the column whose text length groups batches, if one does

    @property
    def load(self) -> Callable[..., Model]:
        """`load(checkpoint, labels=None, **options)`; with `labels`, as a student whose head may be untrained.

        Raises:
            InputError: it cannot be read, or is no model for this task.
            Unreachable: a hub name that the hub did not give.
        """
        ...


class TextClassification:
    """One text, one class."""

    word = "text-classification"
    features: tuple[str, ...] = ("text",)
    length_of: str | None = "text"

    def load(self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, max_length: int = 128) -> Model:
        """Load with its tokenizer; see `Task.load`. `max_length`: tokens kept of an example."""
        from transformers import AutoTokenizer

        core, fresh = _load_classifier(checkpoint, self.word, labels)
        with reading_weights(checkpoint):
            tokenizer = AutoTokenizer.from_pretrained(open_folder(checkpoint), trust_remote_code=False)
        if not tokenizer.is_fast:
            raise InputError(
                f"{checkpoint} has no fast tokenizer (tokenizer.json), which counts what it cuts off; "
                "save one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        longest = min(max_length, _positions(core), tokenizer.model_max_length)
        encode = TextEncoder(tokenizer, longest)
        taken = inspect.signature(core.forward).parameters
        names = tuple(name for name in encode({"text": ["a"]}) if name in taken)
        module = restored(LogitsOf(core, names).eval(), checkpoint)
        return Model(module, encode, names, class_names(core.config), checkpoint, core, fresh)


class ImageClassification:
    """One image, one class."""

    word = "image-classification"
    features: tuple[str, ...] = ("image",)
    length_of: str | None = None

    def load(self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None) -> Model:
        """Load with its image processor; see `Task.load`."""
        from transformers import AutoImageProcessor

        core, fresh = _load_classifier(checkpoint, self.word, labels)
        with reading_weights(checkpoint), quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(open_folder(checkpoint), trust_remote_code=False)
        names = ("pixel_values",)
        encode = ImageEncoder(processor)
        module = restored(LogitsOf(core, names).eval(), checkpoint)
        return Model(module, encode, names, class_names(core.config), checkpoint, core, fresh)


class ModuleClassification:
    """Any `nn.Module` from one array to logits; classes are numbered."""

    word = "module"
    features: tuple[str, ...] = ("x",)
    length_of: str | None = None

    def load(self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, example: Rows | None = None) -> Model:
        """Build by the factory; `example` is fed once to learn the number of classes. See `Task.load`."""
        if not checkpoint.is_factory:
            open_folder(checkpoint)  # says how to name a factory, when the folder knows it
            raise InputError(f"the task 'module' takes package.module:factory, and was given {checkpoint}")
        if example is None:
            raise InputError("the task 'module' needs an example to learn the number of classes")
        core, encode = build_module(checkpoint), ArrayEncoder()
        found = tuple(map(str, range(_logits_width(core, encode(example)["x"], checkpoint))))
        labels = labels or found
        if len(found) != len(labels):
            raise InputError(
                f"{checkpoint} gives {len(found)} classes, the teacher has {len(labels)}; they must be the same"
            )
        return Model(restored(core, checkpoint), encode, ("x",), labels, checkpoint, core)


def _logits_width(core: nn.Module, x: NDArray[Any], checkpoint: Checkpoint) -> int:
    """C of the logits (B, C) that a module gives for `x`."""
    try:
        with torch.inference_mode():
            logits = core(torch.from_numpy(x))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{checkpoint} does not take x of shape {x.shape} and type {x.dtype}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{checkpoint} gave {got} for x of shape {x.shape}; expected logits of shape ({len(x)}, classes)"
        )
    return logits.shape[1]


TASKS: Mapping[str, Task] = {
    task.word: task for task in (TextClassification(), ImageClassification(), ModuleClassification())
}


def _positions(core: nn.Module) -> int:
    """Tokens that a model has positions for; RoBERTa's first ones are taken by padding."""
    most = int(getattr(core.config, "max_position_embeddings", None) or 2**30)
    for name, module in core.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return most - int(module.padding_idx) - 1
    return most


def class_names(config: Any) -> tuple[str, ...]:
    """The class names of a transformers config, in the order of the logits."""
    return tuple(config.id2label[i] for i in range(config.num_labels))


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


def _load_classifier(
    checkpoint: Checkpoint, word: str, labels: tuple[str, ...] | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A transformers classifier in float32, and the names of the parameters that its checkpoint did not hold."""
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    if checkpoint.is_factory:
        raise InputError(
            f"the task {word!r} takes a transformers checkpoint, and was given the factory "
            f"{checkpoint}; use --task module"
        )
    where = open_folder(checkpoint)
    auto_class = TasksManager.get_model_class_for_task(word)
    with reading_weights(checkpoint), quiet_transformers():
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise InputError(f"{checkpoint} is made for {config.problem_type}; {word} gives each example one class")
        if labels is not None:
            _give_labels(config, labels, checkpoint)
        core, info = _open(auto_class, where, config)
    missing = sorted(info["missing_keys"])
    head = [key for key in missing if not key.startswith(f"{core.base_model_prefix}.")]
    if info["mismatched_keys"] or (missing and (labels is None or missing != head)):
        raise InputError(
            f"{checkpoint} holds no trained weights for {some(missing or list(map(str, info['mismatched_keys'])))}; "
            f"a teacher must be fine-tuned for {word}"
        )
    return core.eval(), tuple(missing)


def _open(auto_class: Any, where: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """A transformers model in float32, with what its loader tells; reshaped as the folder's record says."""
    if ranks := recorded_ranks(where):
        core, missing = load_low_rank(auto_class, config, Path(where), ranks)
        return core, {"missing_keys": missing, "mismatched_keys": []}
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    attributes = recorded(beside(Path(where) / WEIGHTS))
    if attributes is None:
        opened: tuple[Any, dict[str, Any]] = auto_class.from_pretrained(where, **settings)
        return opened
    with torch.device("meta"):
        kind = type(auto_class.from_config(config, trust_remote_code=False))
    shapes = shapes_in(Path(where).glob("*.safetensors"))
    del settings["trust_remote_code"]  # a word of the auto classes only
    core, info = reshaped_class(kind, shapes, attributes).from_pretrained(where, **settings)
    core.__class__ = kind
    return core, info


def _give_labels(config: Any, labels: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """Give a student's config the teacher's classes, unless it names other ones of its own.

    Raises:
        InputError: the checkpoint is fine-tuned for other classes.
    """
    own = class_names(config)
    if own == labels:
        return
    if not all(name == f"LABEL_{i}" for i, name in enumerate(own)):
        raise InputError(
            f"{checkpoint} is fine-tuned for the classes {', '.join(own)}, "
            f"the teacher for {', '.join(labels)}; they must be the same, in the same order"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


logging.getLogger("torch.onnx").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
