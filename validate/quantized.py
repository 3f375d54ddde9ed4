"""A model with fake quantisation in it: it computes in float32 what ONNX Runtime will compute in integers.

Shapes: B examples in a batch, C classes, S sites (activations that are quantised).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from potstill.validate.checkpoint import RECORD, Checkpoint, reading_weights
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import INT32, Formats, Plan, Watching, fake_quantize, weight_scale
from potstill.validate.files import read_json, write_json

RANGES = "quantization.safetensors"


class FakeQuantized(nn.Module):
    """A model whose convolutions and linear layers see integers only.

    It runs the model's own code and steps in where numbers are to be rounded, so the weights of `inner` stay float
    and keep their names. Ranges are per tensor for activations; weights are symmetric int8 per output channel, their
    scale following the weights as they train. Products of two activations and embeddings stay float.

    Attributes:
        inner: the float model, `forward(*inputs) -> logits (B, C)`.
        formats: the integers.
        plan: which batch norms are folded and where a ReLU comes first.
        sites: names of the S activations that are quantised.
        scales: float32 (S,).
        zero_points: whole numbers in float32 (S,).
    """

    scales: Tensor
    zero_points: Tensor

    def __init__(
        self, inner: nn.Module, formats: Formats, plan: Plan, parameters: Mapping[str, tuple[float, int]]
    ) -> None:
        super().__init__()
        self.inner, self.formats, self.plan, self.sites = inner, formats, plan, tuple(parameters)
        self.register_buffer("scales", torch.tensor([scale for scale, _ in parameters.values()]))
        self.register_buffer("zero_points", torch.tensor([float(zero) for _, zero in parameters.values()]))
        self._index = {site: i for i, site in enumerate(self.sites)}
        self._constants: _Constants | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits (B, C), always in float32; inside `as_qdq`, for the ONNX exporter."""
        mode = _Writing(self, self._constants) if self._constants else _Rounding(self)
        with torch.autocast(inputs[0].device.type, enabled=False), mode:
            logits: Tensor = self.inner(*inputs)
        return logits

    def at(self, site: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a site.

        Raises:
            InputError: calibration never came there.
        """
        if site not in self._index:
            raise InputError(
                f"the model quantises {site!r}, which calibration did not meet: its code took another path; "
                "give training examples of every kind"
            )
        return self.scales[self._index[site]], self.zero_points[self._index[site]]

    @contextmanager
    def as_qdq(self, inputs: tuple[Tensor, ...]) -> Iterator[None]:
        """Inside, `forward` is for `torch.onnx.export` alone: integer weights, QuantizeLinear and DequantizeLinear.

        Args:
            inputs: of an example, to go through the model once and keep what the graph is to hold.
        """
        constants = _Constants(self.formats)
        with torch.no_grad(), _Rounding(self, constants):
            self.inner(*inputs)
        self._constants = constants
        try:
            yield
        finally:
            self._constants = None

    def save(self, folder: Path) -> None:
        """Write scales and zero points to `quantization.safetensors`, and what they are of to `potstill.json`."""
        from safetensors.torch import save_file

        save_file({"scales": self.scales.cpu(), "zero_points": self.zero_points.cpu()}, str(folder / RANGES))
        record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
        about = {"formats": _plain(self.formats), "plan": _plain(self.plan), "sites": list(self.sites)}
        write_json(folder / RECORD, record | {"quantization": about})


def restored(inner: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A model that was just loaded, in eval mode, with the fake quantisation that its checkpoint's folder records.

    Raises:
        InputError: the record is there and its numbers are not, or they do not fit.
    """
    folder = checkpoint.weights.parent if checkpoint.weights else checkpoint.folder
    if folder is None or not (folder / RECORD).is_file():
        return inner
    about = read_json(folder / RECORD).get("quantization")
    if about is None:
        return inner
    from safetensors.torch import load_file

    with reading_weights(checkpoint):
        tensors = load_file(folder / RANGES)
    try:
        formats = TypeAdapter(Formats).validate_python(about["formats"])
        plan = TypeAdapter(Plan).validate_python(about["plan"])
        sites = TypeAdapter(list[str]).validate_python(about["sites"])
        scales, zeros = tensors["scales"], tensors["zero_points"]
    except (KeyError, ValidationError) as error:
        raise InputError(f"{folder / RECORD} holds no whole record of a quantised model: {error}") from error
    if not len(sites) == len(scales) == len(zeros) or not (torch.isfinite(scales) & (scales > 0)).all():
        raise InputError(
            f"{folder / RANGES} does not fit {RECORD}: {len(scales)} scales and {len(zeros)} zero points for "
            f"{len(sites)} tensors; all scales must be above 0"
        )
    parameters = {site: (float(s), int(z)) for site, s, z in zip(sites, scales, zeros, strict=True)}
    return FakeQuantized(inner, formats, plan, parameters).eval()


def _plain(value: Formats | Plan) -> dict[str, Any]:
    plain: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return plain


class _Constants(nn.Module):
    """Integers and scales that the graph is to hold, by name."""

    def __init__(self, formats: Formats) -> None:
        super().__init__()
        self._activation = torch.uint8 if formats.activation == "uint8" else torch.int8

    def keep(self, name: str, steps: Tensor, scale: Tensor) -> None:
        """Remember the integers and scales of a weight or bias, with the zero points that ONNX asks for."""
        self._keep(name, steps=steps, scale=scale, zero=torch.zeros_like(scale).to(steps.dtype))

    def keep_site(self, site: str, scale: Tensor, zero_point: Tensor) -> None:
        """Remember an activation's scale and zero point."""
        self._keep(site, scale=scale, zero=zero_point.to(self._activation))

    def _keep(self, name: str, **tensors: Tensor) -> None:
        for part, tensor in tensors.items():
            self.register_buffer(f"{name}:{part}".replace(".", "/"), tensor.detach().clone().contiguous())

    def get(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scale and zero point of a weight or bias."""
        steps, scale, zero = (self._get(name, part) for part in ("steps", "scale", "zero"))
        return steps, scale, zero

    def get_site(self, site: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an activation."""
        return self._get(site, "scale"), self._get(site, "zero")

    def _get(self, name: str, part: str) -> Tensor:
        return self.get_buffer(f"{name}:{part}".replace(".", "/"))


class _Rounding(Watching):
    """Rounds as ONNX Runtime will; given `constants`, also keeps there what a graph is to hold."""

    def __init__(self, owner: FakeQuantized, constants: _Constants | None = None) -> None:
        super().__init__(owner.inner, owner.plan)
        self.owner, self.constants = owner, constants

    def quantise(self, site: str, x: Tensor) -> Tensor:
        """The tensor, rounded."""
        scale, zero_point = self.owner.at(site)
        if self.constants is not None:
            self.constants.keep_site(site, scale, zero_point)
        return fake_quantize(x, scale, zero_point, *self.owner.formats.limits)

    def weights(
        self, name: str, site: str, weight: Tensor, bias: Tensor | None, *, linear: bool, whole_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, rounded."""
        most, input_scale = self.owner.formats.greatest_weight, self.owner.at(site)[0]
        scale = weight_scale(weight, bias if whole_bias else None, input_scale, most)
        wide, bias_scale = scale.view(-1, *[1] * (weight.ndim - 1)), input_scale * scale
        if self.constants is not None:
            steps = torch.round(weight / wide).to(torch.int8)
            self.constants.keep(f"{name}.weight", steps.T if linear else steps, scale)
            if bias is not None and whole_bias:
                self.constants.keep(f"{name}.bias", torch.round(bias / bias_scale).to(torch.int32), bias_scale)
        if bias is not None and whole_bias:
            bias = fake_quantize(bias, bias_scale, torch.zeros_like(scale), -INT32, INT32)
        return fake_quantize(weight, wide, torch.zeros_like(wide), -most, most), bias


class _Writing(Watching):
    """Writes QuantizeLinear and DequantizeLinear of the constants that were kept."""

    def __init__(self, owner: FakeQuantized, constants: _Constants) -> None:
        super().__init__(owner.inner, owner.plan)
        self.constants = constants

    def quantise(self, site: str, x: Tensor) -> Tensor:
        """The tensor, through a pair of nodes."""
        scale, zero = self.constants.get_site(site)
        steps = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=zero.dtype, shape=x.shape)
        return _dequantized(steps, scale, zero)

    def weights(
        self, name: str, site: str, weight: Tensor, bias: Tensor | None, *, linear: bool, whole_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight (a linear layer's transposed, as ONNX multiplies) and bias, from integers."""
        if bias is not None and whole_bias:
            bias = _dequantized(*self.constants.get(f"{name}.bias"), 0)
        return _dequantized(*self.constants.get(f"{name}.weight"), 1 if linear else 0), bias

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One Gemm for rows, else MatMul and Add."""
        if x.ndim == 2 and bias is not None:
            return torch.addmm(bias, x, weight)
        product = torch.matmul(x, weight)
        return product if bias is None else product + bias


def _dequantized(steps: Tensor, scale: Tensor, zero: Tensor, axis: int | None = None) -> Tensor:
    attributes: Any = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (steps, scale, zero), attributes, dtype=torch.float32, shape=steps.shape
    )
