"""Fake quantisation: the arithmetic of ONNX's QuantizeLinear and DequantizeLinear, and where a model meets it.

Shapes: O output channels of a weight.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Activation = Literal["uint8", "int8", "uint16", "int16"]
INT32 = 2**31 - 1
TINY = 1e-12  # the least scale: a tensor of zeros has one too


@dataclass(frozen=True)
class Formats:
    """The integers, in the words of a target's static scheme.

    Attributes:
        activation: `uint8` or `uint16` with a zero point, `int8` or `int16` without one.
        reduce_range: weights from -64 to 64, so that a pair of products fits into 16 bits.
    """

    activation: Activation = "uint8"
    reduce_range: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest integer of an activation."""
        bits = 16 if self.activation.endswith("16") else 8
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.symmetric else (0, 2**bits - 1)

    @property
    def symmetric(self) -> bool:
        """Whether an activation has no zero point."""
        return self.activation.startswith("int")

    @property
    def greatest_weight(self) -> int:
        """The greatest integer of a weight."""
        return 64 if self.reduce_range else 127

    def parameters(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point for values from `low` to `high`, widened to hold zero (Jacob 2018, section 3)."""
        low, high, most = min(low, 0.0), max(high, 0.0), self.limits[1]
        if self.symmetric:
            return max(-low, high, TINY) / most, 0
        scale = max(high - low, TINY) / most
        return scale, min(most, max(0, round(-low / scale)))


@dataclass(frozen=True)
class Plan:
    """What was found out about a model's own code.

    Attributes:
        fold: convolution -> the batch norm that alone reads it; both run as one, with frozen statistics.
        through: convolutions and additions that only a ReLU reads; quantised after it.
    """

    fold: Mapping[str, str] = field(default_factory=dict)
    through: tuple[str, ...] = ()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        steps = torch.round(x / scale) + zero_point
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return (steps.clamp(low, high) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """QuantizeLinear and DequantizeLinear of ONNX, in float32: (clamp(round(x / s) + z) − z) · s, half to even.

    torch's own `fake_quantize_*` multiplies by 1 / s and so differs in ties. The gradient passes straight through
    where nothing was clamped and is zero elsewhere (Bengio 2013; Jacob 2018, section 3).

    Args:
        x: any shape.
        scale: s > 0, of a shape that broadcasts to x.
        zero_point: z, a whole number in float32, shaped as `scale`.
        low: the least integer.
        high: the greatest integer.
    """
    rounded: Tensor = _Rounded.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    return rounded


def folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight (O, …) and bias (O,) of a convolution that does its batch norm too (Jacob 2018, section 3.2)."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * factor if norm.bias is None else shift * factor + norm.bias
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), shift


def weight_scale(weight: Tensor, bias: Tensor | None, input_scale: Tensor, most: int) -> Tensor:
    """Scale (O,) of a weight (O, …): the largest of each channel is `most`; an int32 bias must fit beside it."""
    with torch.no_grad():
        scale = (weight.detach().flatten(1).abs().amax(dim=1) / most).clamp(min=TINY)
        return scale if bias is None else torch.maximum(scale, bias.abs() / (input_scale * (INT32 // 2)))


class Known(NamedTuple):
    """A tensor of which more is known: whose site it comes from, and how.

    `quantised`: just rounded. `grid`: a part or a maximum of such a tensor, so rounding again changes nothing.
    `pending`: to be rounded after the ReLU that comes next.
    """

    tensor: Tensor  # held, so that its id stays its own
    site: str
    kind: Literal["quantised", "grid", "pending"]


class Watching(TorchFunctionMode):
    """Steps in at a model's convolutions, linear layers, batch norms, ReLUs and additions, in one forward.

    This base changes no number; subclasses say what happens at a site (`quantise`) and to weights (`weights`).
    """

    keeps_grid: ClassVar[frozenset[str]] = frozenset(
        {"max_pool1d", "max_pool2d", "_max_pool1d", "_max_pool2d", "flatten", "reshape", "view", "contiguous", "pad"}
        | {"relu", "relu_", "__getitem__"}
    )
    relus: ClassVar[frozenset[str]] = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
    additions: ClassVar[frozenset[str]] = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        self._known: dict[int, Known] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor, str]] = {}
        self._calls: Counter[str] = Counter()

    def quantise(self, site: str, x: Tensor) -> Tensor:
        """What becomes of a tensor at a site."""
        return x

    def weights(
        self, name: str, site: str, weight: Tensor, bias: Tensor | None, *, linear: bool, whole_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to compute with.

        Args:
            name: of the layer.
            site: of its input.
            weight: (O, …).
            bias: (O,).
            linear: whether it is a linear layer's.
            whole_bias: whether the bias is to be an integer too.
        """
        return weight, bias

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of a linear layer, of what `weights` gave."""
        return functional.linear(x, weight, bias)

    def noted(self, function: str, known: Known, args: Any) -> None:
        """A function is called on a tensor of which more is known."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of torch that the model calls comes here."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        for value in [*args, *kwargs.values()]:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if id(tensor) in self._known:
                    self.noted(name, self._known[id(tensor)], args)
        if name in ("conv1d", "conv2d", "linear"):
            return self._weighted(func, name, *args, **kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, *args, **kwargs)
        if name in self.additions and not kwargs:
            return self._addition(func, *args)
        known = self._known.get(id(args[0])) if args else None
        out = func(*args, **kwargs)
        if known and known.kind == "pending" and name in self.relus:
            return self._rounded(known.site, out)
        if out is not None and args and out is args[0]:  # changed in place: nothing is known of it any more
            self._known.pop(id(out), None)
            self._inputs.pop(id(out), None)
        if known and known.kind != "pending" and name in self.keeps_grid and _no_new_values(name, args, kwargs):
            self._known[id(out)] = Known(out, known.site, "grid")
        return out

    def _weighted(
        self,
        func: Any,
        kind: str,
        input: Tensor,  # noqa: A002 - torch's own name
        weight: Tensor,
        bias: Any = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        name = self._names.get(id(weight), "").removesuffix(".weight")
        if not name:
            return func(input, weight, bias, *rest, **more)
        self._calls[name] += 1
        if self._calls[name] > 1:
            name = f"{name}#{self._calls[name]}"
        x, site = self._input(f"{name}.input", input)
        if kind == "linear":
            weight, bias = self.weights(name, site, weight, bias, linear=True, whole_bias=x.ndim == 2)
            return self.linear(x, weight, bias)
        if name in self.plan.fold:
            weight, bias = folded(weight, bias, self.model.get_submodule(self.plan.fold[name]))
        weight, bias = self.weights(name, site, weight, bias, linear=False, whole_bias=True)
        return self._output(name, func(x, weight, bias, *rest, **more))

    def _batch_norm(
        self,
        func: Any,
        input: Tensor,  # noqa: A002 - torch's own name
        running_mean: Any,
        running_var: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        known, norm = self._known.get(id(input)), self.norm(running_mean)
        if known and norm and self.plan.fold.get(known.site) == norm:
            return input  # the convolution has done it
        if running_mean is not None:  # its statistics are frozen
            rest, more = (*rest[:2], *((False,) if len(rest) > 2 else ()), *rest[3:]), {**more}
            more |= {"training": False} if "training" in more else {}
        return func(input, running_mean, running_var, *rest, **more)

    def norm(self, running_mean: Any) -> str:
        """The name of a batch norm, by its running mean."""
        return self._names.get(id(running_mean), "").removesuffix(".running_mean")

    def _addition(self, func: Any, *args: Any) -> Any:
        pair = args[:2]
        if (
            len(args) == 2
            and all(isinstance(one, Tensor) and one.ndim == 4 for one in pair)
            and pair[0].shape == pair[1].shape
            and any(id(one) in self._known for one in pair)
        ):
            self._calls["add"] += 1
            name = f"add#{self._calls['add']}"
            left, right = (self._input(f"{name}.{side}", one)[0] for side, one in zip(("a", "b"), pair, strict=True))
            return self._output(name, torch.add(left, right))
        return func(*args)

    def _input(self, site: str, x: Tensor) -> tuple[Tensor, str]:
        """A tensor rounded to integers, and whose site it has; a tensor that several layers read is rounded once."""
        known = self._known.get(id(x))
        if known and known.kind == "quantised":
            return x, known.site
        if id(x) not in self._inputs:
            site = known.site if known else site
            self._inputs[id(x)] = (x, self.quantise(site, x), site)
        return self._inputs[id(x)][1:]

    def _output(self, site: str, out: Tensor) -> Tensor:
        if site not in self.plan.through:
            return self._rounded(site, out)
        self._known[id(out)] = Known(out, site, "pending")
        return out

    def _rounded(self, site: str, out: Tensor) -> Tensor:
        rounded = self.quantise(site, out)
        self._known[id(rounded)] = Known(rounded, site, "quantised")
        return rounded


def _no_new_values(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether padding adds zeros only."""
    return name != "pad" or (args[3] if len(args) > 3 else kwargs.get("value")) in (None, 0)
