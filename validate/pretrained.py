"""How a task loads a transformers checkpoint, or a module of one's own."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from potstill.validate.checkpoint import (
    WEIGHTS,
    Checkpoint,
    beside,
    build_module,
    floats_of,
    open_folder,
    reading_weights,
    some,
)
from potstill.validate.encoder import Encoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Rows
from potstill.validate.finite import check_finite
from potstill.validate.low_rank import load_low_rank, recorded_ranks
from potstill.validate.model import LogitsOf, Model, OnnxModel, quiet_transformers
from potstill.validate.onnx_file import OnnxModule
from potstill.validate.quantized import restored
from potstill.validate.reshape import recorded, reshaped_class, shapes_in


class Pretrained:
    """How a task loads a transformers checkpoint, or a module of one's own by its factory.

    A factory's module takes named inputs among those of the encoder, and gives the task's outputs. Its attribute
    of the name `tool` is its own tokenizer or processor; without one it uses the teacher's. A teacher may name
    its classes in the attribute `labels`.

    Attributes:
        word: of optimum's task names.
        tool: what the preprocessing is called: `tokenizer`, `processor` or `feature_extractor`.
        probe: one raw row, fed to learn the inputs' names.
        ndim: dimensions of the outputs.
        classes: whether the last dimension is over named classes.
        wrap: a transformers model as a function to the task's outputs.
        output: what an ONNX graph calls them.
    """

    word: str
    tool: str
    probe: ClassVar[Rows]
    ndim: int = 2
    classes: bool = True
    wrap: type[LogitsOf] = LogitsOf
    output: str = "logits"

    def encoder(self, tool: Any, core: nn.Module, checkpoint: Checkpoint, **options: Any) -> Encoder:
        """The encoder around a tokenizer or processor."""
        raise NotImplementedError

    def open_tool(self, folder: str) -> Any:
        """The checkpoint's own tokenizer or processor."""
        raise NotImplementedError

    def read(self, outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Outputs to the rows that are judged; see `Model.read`."""
        return outputs

    def load(
        self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, like: Model | None = None, **options: Any
    ) -> Model:
        """Load a checkpoint with its tokenizer or processor; see `Task.load`."""
        if checkpoint.onnx:
            return self._of_onnx(checkpoint, options)
        if checkpoint.is_factory:
            return self._of_ones_own(checkpoint, labels, like, options)
        core, fresh = load_pretrained(checkpoint, self.word, labels, self.classes)
        with reading_weights(checkpoint), quiet_transformers():
            tool = self.open_tool(open_folder(checkpoint))
        encode = self.encoder(tool, core, checkpoint, **options)
        names = self._inputs(core, encode, checkpoint)
        classes = class_names(core.config) if self.classes else ()
        module = restored(self.wrap(core, names).eval(), checkpoint)
        return Model(module, encode, names, classes, checkpoint, core, fresh, self.read, self.output)

    def _of_onnx(self, checkpoint: Checkpoint, options: dict[str, Any]) -> Model:
        """An ONNX file, fed by the tokenizer or processor beside it; its classes are those of the config there."""
        from transformers import AutoConfig

        core = open_onnx(checkpoint, self.output)
        folder = str(checkpoint.beside_onnx)
        if not (checkpoint.beside_onnx / "config.json").is_file():
            raise InputError(
                f"{folder} has no config.json, which names the classes, nor is {self.word} fed without a {self.tool}; "
                "put both beside the ONNX file or give --preprocessing FOLDER, or use --task module for arrays"
            )
        with reading_weights(checkpoint), quiet_transformers():
            core.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                empty = model_class(self.word).from_config(core.config, trust_remote_code=False)
            tool = self.open_tool(folder)
        encode = at_its_length(self.encoder(tool, empty, checkpoint, **options), core)
        core.check_fed(encode(self.probe), encode.axes, f"its {self.tool}")
        classes, names = class_names(core.config) if self.classes else (), tuple(core.inputs)
        model = OnnxModel(core, encode, names, classes, checkpoint, core, read=self.read, output=core.output)
        if (width := self._width(model)) != len(classes) and self.classes:
            raise InputError(f"{checkpoint} gives {width} classes, and the config in {folder} names {len(classes)}")
        return model

    def _inputs(self, core: nn.Module, encode: Encoder, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Names of the inputs that the encoder gives and `forward` takes.

        In the encoder's order for a transformers model, in that of `forward` for a module of one's own.
        """
        given, taken = tuple(encode(self.probe)), inspect.signature(core.forward).parameters
        if not checkpoint.is_factory:
            return tuple(name for name in given if name in taken)
        foreign = [name for name, one in taken.items() if name not in given and one.default is one.empty]
        if foreign or not set(taken) & set(given):
            raise InputError(
                f"{checkpoint} takes {some(list(taken))}; expected inputs among those of its {self.tool}: "
                f"{', '.join(given)}"
            )
        return tuple(name for name in taken if name in given)

    def _of_ones_own(
        self, checkpoint: Checkpoint, labels: tuple[str, ...] | None, like: Model | None, options: dict[str, Any]
    ) -> Model:
        """A factory's module, fed by its own tokenizer or processor or by the teacher's."""
        core = build_module(checkpoint)
        tool = getattr(core, self.tool, None)
        if tool is None and like is None:
            raise InputError(
                f"the module of {checkpoint} has no attribute {self.tool!r}; a teacher for {self.word} brings its "
                "own: set it in the factory, or use --task module for arrays"
            )
        encode = like.encode if tool is None and like else self.encoder(tool, core, checkpoint, **options)
        names = self._inputs(core, encode, checkpoint)
        module = restored(core, checkpoint)
        model = Model(module, encode, names, (), checkpoint, core, read=self.read, output=self.output)
        width = self._width(model)
        if not self.classes:
            return model
        model.labels = labels or tuple(getattr(core, "labels", ())) or tuple(map(str, range(width)))
        if len(model.labels) != width:
            raise InputError(
                f"{checkpoint} gives {width} classes, and {len(model.labels)} are named; they must be the same"
            )
        return model

    def _width(self, model: Model) -> int:
        """The last dimension of what a module gives for the probe."""
        tensors = model.tensors(self.probe, torch.device("cpu"))
        inputs = [tensors[name] for name in model.input_names]
        try:
            with torch.inference_mode():
                outputs = model.module(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in model.input_names)
            raise InputError(f"{model.checkpoint} does not take {shapes}: {error}") from error
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        tokens = (inputs[0].shape[1],) if self.ndim == 3 else ()
        if not isinstance(outputs, Tensor) or outputs.ndim != self.ndim or got[:-1] != (1, *tokens):
            expected = ", ".join(["examples", *["tokens"] * (self.ndim - 2), "classes" if self.classes else "width"])
            raise InputError(f"{model.checkpoint} gave {got} for one example; expected outputs of shape ({expected})")
        return outputs.shape[-1]


def open_onnx(checkpoint: Checkpoint, output: str) -> OnnxModule:
    """The ONNX file of a checkpoint; `output` is the one to read where there are several."""
    assert checkpoint.onnx
    return OnnxModule(checkpoint.onnx, output)


def at_its_length(encode: Encoder, core: OnnxModule) -> Encoder:
    """The encoder, at the one length of texts that an ONNX file takes where it is fixed there."""
    lengths = {dim for port in core.inputs.values() for dim in port.dims[1:2] if isinstance(dim, int)}
    if not isinstance(encode, TextEncoder) or len(lengths) != 1:
        return encode
    return replace(encode, max_length=min(lengths), pad_to=min(lengths))


def model_class(word: str) -> Any:
    """The class of transformers that opens a model for a task, by optimum's word for it."""
    from optimum.exporters.tasks import TasksManager

    return TasksManager.get_model_class_for_task(word)


def check_kind(config: Any, word: str, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a kind that transformers has no model of for a task.

    Raises:
        InputError: there is none.
    """
    if type(config) not in model_class(word)._model_mapping:
        raise InputError(
            f"{checkpoint} is a {config.model_type}, and transformers has no model of that kind for {word}; give a "
            "checkpoint of a model for that task"
        )


def class_names(config: Any) -> tuple[str, ...]:
    """The class names of a transformers config, in the order of the logits."""
    return tuple(config.id2label[i] for i in range(config.num_labels))


def load_pretrained(
    checkpoint: Checkpoint, word: str, labels: tuple[str, ...] | None, classes: bool = True
) -> tuple[nn.Module, tuple[str, ...]]:
    """A transformers model in float32, and the names of the parameters that its checkpoint did not hold.

    Args:
        checkpoint: a folder or a hub name.
        word: the task's, by which optimum finds the class of the model.
        labels: of a student, which may lack a head; None for a teacher, which must not.
        classes: whether the model's head is over named classes; without, BERT's pooler is not used, and may be missing.
    """
    from transformers import AutoConfig

    where, auto_class = open_folder(checkpoint), model_class(word)
    with reading_weights(checkpoint), quiet_transformers():
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        check_kind(config, word, checkpoint)
        if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise InputError(f"{checkpoint} is made for {config.problem_type}; {word} gives each example one class")
        if labels is not None and classes:
            _give_labels(config, labels, checkpoint)
        core, info = _open(auto_class, where, config)
    missing = sorted(key for key in info["missing_keys"] if classes or not key.startswith("pooler."))
    head = [key for key in missing if not key.startswith(f"{core.base_model_prefix}.")]
    if info["mismatched_keys"] or (missing and (labels is None or missing != head)):
        raise InputError(
            f"{checkpoint} holds no trained weights for {some(missing or list(map(str, info['mismatched_keys'])))}; "
            f"a teacher must be fine-tuned for {word}"
        )
    check_finite(str(checkpoint), floats_of(core))
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
