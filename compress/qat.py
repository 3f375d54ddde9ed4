"""Quantisation-aware training: the student learns in the integers that it will ship in.

Shapes: B examples in a batch, C classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats, Known, Plan, Watching
from potstill.validate.progress import track
from potstill.validate.quantized import FakeQuantized
from potstill.validate.task import Model

BATCH = 16  # examples at once while ranges are measured
RATES = {"module": 2e-4, "transformers": 1e-5}  # a tenth of what distillation takes by default


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Qat:
    """Train a student on through fake quantisation, so that its integers keep what its floats know.

    Batch norms are folded into their convolutions, with frozen statistics; activation ranges are measured once on
    training examples (minimum and maximum); weights are symmetric int8 per output channel. Then the student learns
    from the teacher as in `distill`, its gradient passing straight through the rounding (Jacob 2018, "Quantization and
    training of neural networks for efficient integer-arithmetic-only inference"; Bengio 2013). The arithmetic is that
    of ONNX's QuantizeLinear and DequantizeLinear. A package for a target whose static scheme has these formats holds
    these very integers; for another target it is made from the float weights.

    Attributes:
        distill: the training. Without a `learning_rate`, a tenth of distillation's own.
        activation: `uint8` with a zero point (x86, and ARM without dot products), or `int8` without one (ARM with).
        reduce_range: weights of 7 bits, for x86 without VNNI.
        calibrate: training examples that the ranges are measured on.
    """

    distill: Distill = Distill(epochs=1)
    activation: Literal["uint8", "int8"] = "uint8"
    reduce_range: bool = False
    calibrate: int = 256

    def __post_init__(self) -> None:
        """Refuse to calibrate on nothing."""
        if self.calibrate < 1:
            raise ValueError(f"calibrate must be at least 1, and is {self.calibrate}")

    def __call__(self, student: Model, lesson: Lesson) -> list[dict[str, float]]:
        """Put fake quantisation into `student` and train it in place.

        Returns:
            The log of the training.

        Raises:
            InputError: there is nothing to quantise, or the training fails.
        """
        student.module = quantized(
            student.in_float(), lesson, Formats(self.activation, self.reduce_range), self.calibrate
        )
        return self.training(student)(student, lesson)

    def training(self, student: Model) -> Distill:
        """The training with its learning rate."""
        rate = RATES["module" if student.checkpoint.is_factory else "transformers"]
        return self.distill if self.distill.learning_rate else replace(self.distill, learning_rate=rate)


def quantized(student: Model, lesson: Lesson, formats: Formats, calibrate: int) -> FakeQuantized:
    """The student's module with fake quantisation, its ranges measured on `calibrate` training examples.

    Raises:
        InputError: it has no convolution and no linear layer that can be quantised.
    """
    order = torch.randperm(len(lesson.train), generator=torch.Generator().manual_seed(lesson.seed))
    chosen = order[:calibrate].tolist()
    module, cpu = student.module.cpu().eval(), torch.device("cpu")

    def batches() -> Iterator[list[Tensor]]:
        with track("calibrating", len(chosen)) as advance:
            for start in range(0, len(chosen), BATCH):
                index = chosen[start : start + BATCH]
                yield student.batch(lesson.train.rows(index), cpu)
                advance(len(index), "")

    plan = find_plan(module, student.batch(lesson.train.rows(chosen[:2]), cpu), formats)
    ranges: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for inputs in batches():
            with _Measuring(module, plan, ranges):
                module(*inputs)
    if not ranges:
        raise InputError(f"{student.checkpoint} has no convolution and no linear layer that can be quantised")
    parameters = {site: formats.parameters(low, high) for site, (low, high) in ranges.items()}
    return FakeQuantized(module, formats, plan, parameters).eval()


def find_plan(module: nn.Module, inputs: list[Tensor], formats: Formats) -> Plan:
    """Which batch norms fold into their convolutions, and which values a ReLU alone reads.

    Seen by running the model's code: once for the batch norms, once more with these folded. With int8 activations,
    which have no zero point to clip at, values are rounded before a ReLU as well.
    """
    plan = Plan()
    for look_for in ("fold", "through") if formats.activation == "uint8" else ("fold",):
        with torch.no_grad(), _Reading(module, plan) as reading:
            module(*inputs)
        plan = replace(plan, fold=reading.fold) if look_for == "fold" else replace(plan, through=reading.through)
    return plan


class _Reading(Watching):
    """Notes which functions read the outputs of convolutions and additions."""

    free = frozenset({"__get__", "dim", "size", "numel", "stride", "is_floating_point"})  # look, but read no value

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan)
        self._readers: dict[str, list[str]] = {}
        self._norms: dict[str, str] = {}

    def noted(self, function: str, known: Known, args: Any) -> None:
        """One more reader of a value."""
        if function in self.free or known.kind != "quantised":
            return
        if function == "batch_norm":
            self._norms[known.site] = self.norm(args[1])
            if self._norms[known.site] == self.plan.fold.get(known.site):
                return
        self._readers.setdefault(known.site, []).append(function)

    @property
    def fold(self) -> dict[str, str]:
        """Convolution -> the batch norm that alone reads it."""
        return {site: norm for site, norm in self._norms.items() if norm and self._readers[site] == ["batch_norm"]}

    @property
    def through(self) -> tuple[str, ...]:
        """Values that only a ReLU reads."""
        return tuple(site for site, names in self._readers.items() if len(names) == 1 and names[0] in self.relus)


class _Measuring(Watching):
    """Widens the range of each site by what comes by."""

    def __init__(self, model: nn.Module, plan: Plan, ranges: dict[str, tuple[float, float]]) -> None:
        super().__init__(model, plan)
        self._ranges = ranges

    def quantise(self, site: str, x: Tensor) -> Tensor:
        """The tensor as it is."""
        low, high = (float(value) for value in torch.aminmax(x))
        before = self._ranges.get(site, (low, high))
        self._ranges[site] = (min(low, before[0]), max(high, before[1]))
        return x
