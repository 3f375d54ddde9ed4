"""How alike the layers of a student and of its teacher are.

Shapes: N examples, B of them in a batch, D width of a layer, S and L layers, T tokens, C channels, H × W pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from potstill.compress.layer_losses import LAYERS
from potstill.compress.layers import blocks, hooked, maps
from potstill.compress.lesson import Lesson
from potstill.compress.pupil import pairs_of
from potstill.compress.terms import Term
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.predictor import best_device
from potstill.validate.task import Model

MOST_EXAMPLES = 256
BATCH = 16
CONSTANT = 1e-6  # of a layer's size: what varies less than this over the examples is rounding


@dataclass(frozen=True)
class Likeness:
    """The linear CKA of each layer of a student with each layer of its teacher.

    Attributes:
        student: names of its layers' modules, in the order in which they run (S).
        teacher: likewise (L).
        cka: from 0 to 1, shape (S, L); None where a layer gives the same for all examples.
        matched: pairs (row, column) that a loss of the training matched.
        examples: N, on which both were compared.
        data: name of these examples.
    """

    student: list[str]
    teacher: list[str]
    cka: list[list[float | None]]
    matched: list[tuple[int, int]]
    examples: int
    data: str

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        plain: dict[str, Any] = TypeAdapter(Likeness).dump_python(self, mode="json")
        return plain


def likeness_from_json(value: Any) -> Likeness | None:
    """The likeness that `to_json` gave, if there is one."""
    return TypeAdapter(Likeness | None).validate_python(value)


def likeness(student: Model, lesson: Lesson, terms: Sequence[Term] = ()) -> Likeness | None:
    """Compare the layers on at most 256 held-out training examples, spread evenly; both models end on the CPU.

    The layers are a transformer's blocks, each the mean over real tokens of its hidden state, or a convolutional
    network's last feature map of each resolution, the mean over its pixels; and whatever layers `terms` match.

    Args:
        student: as trained.
        lesson: its teacher, the first where there are several, and the held-out examples.
        terms: of the loss that trained it.

    Returns:
        None where a model has no layers that can be read.
    """
    held_out, device = lesson.held_out, best_device()
    layered = [term for term in terms if term.name in LAYERS]
    count = min(MOST_EXAMPLES, len(held_out))
    indices: list[int] = np.linspace(0, len(held_out) - 1, count).round().astype(int).tolist()
    models = {"student": student, "teacher": lesson.teacher}
    for model in models.values():
        model.module.to(device).eval()
    try:
        samples = {who: model.tensors(held_out.rows(indices[:1]), device) for who, model in models.items()}
        both = samples["student"], samples["teacher"]
        pairs = [pair for term in layered for pair in pairs_of(term, student, lesson.teacher, both)]
        wanted = {who: _wanted(model, samples[who]) | {getattr(p, who) for p in pairs} for who, model in models.items()}
        layers = {who: _layers(model, wanted[who], held_out, indices, device) for who, model in models.items()}
    finally:
        for model in models.values():
            model.module.to("cpu")
    if not (layers["student"] and layers["teacher"]):
        return None
    rows, columns = list(layers["student"]), list(layers["teacher"])
    found = cka(list(layers["student"].values()), list(layers["teacher"].values()))
    return Likeness(
        student=rows,
        teacher=columns,
        cka=[[None if np.isnan(value) else float(value) for value in row] for row in found],
        matched=sorted({(rows.index(pair.student), columns.index(pair.teacher)) for pair in pairs}),
        examples=count,
        data=held_out.name,
    )


def cka(ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Linear centred kernel alignment of layers (N, D), in float64: (S, L).

    ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) for centred X and Y, with Frobenius norms (Kornblith, Norouzi, Lee and Hinton 2019,
    "Similarity of neural network representations revisited", section 3), here by the N × N kernels XXᵀ and YYᵀ, which
    gives the same. 1 for layers that differ by a rotation and a scale; biased upwards where D is not small against N.
    NaN for a layer that gives the same for all examples.
    """
    return np.stack([_kernel(x) for x in ours]) @ np.stack([_kernel(y) for y in theirs]).T


def _kernel(layer: NDArray[Any]) -> NDArray[np.float64]:
    """XXᵀ of a centred layer, as a vector (N · N,) of length 1."""
    x = layer.astype(np.float64)
    centred = x - x.mean(axis=0)
    if np.linalg.norm(centred) <= CONSTANT * np.linalg.norm(x):
        return np.full(len(x) ** 2, np.nan)
    kernel = (centred @ centred.T).ravel()
    unit: NDArray[np.float64] = kernel / np.linalg.norm(kernel)
    return unit


def _wanted(model: Model, tensors: Mapping[str, Tensor]) -> set[str]:
    """The modules to compare."""
    try:
        return set(blocks(model.core))
    except InputError:  # no transformer
        return set(maps(model, tensors))


def _layers(
    model: Model, names: Iterable[str], examples: Examples, indices: Sequence[int], device: torch.device
) -> dict[str, NDArray[np.float32]]:
    """Each layer's mean state of each example (N, D), in the order in which they run; none where one is no state."""
    heard: dict[str, Tensor | None] = {}

    def hear(name: str, _inputs: Any, output: Any) -> None:
        heard[name] = _mean(output[0] if isinstance(output, tuple) else output, tensors.get("attention_mask"))

    found: dict[str, list[NDArray[np.float32]]] = {}
    modules = {name: model.core.get_submodule(name) for name in sorted(names)}
    with hooked(modules, hear):
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            tensors = model.tensors(examples.rows(batch), device)
            heard.clear()
            with torch.inference_mode():
                model.module(*(tensors[name] for name in model.input_names))
            states = {name: state for name, state in heard.items() if state is not None and len(state) == len(batch)}
            if len(states) < len(modules):
                return {}
            for name, state in states.items():
                found.setdefault(name, []).append(state.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _mean(state: Any, mask: Tensor | None) -> Tensor | None:
    """The mean state of each example (B, D); None of what is no state.

    Of (B, T, D) over real tokens, or over all where the mask (B, T) is of other tokens; of (B, C, H, W) over pixels.
    """
    if not isinstance(state, Tensor) or state.ndim not in (2, 3, 4):
        return None
    if state.ndim == 4:
        return state.mean(dim=(2, 3))
    if state.ndim == 3 and mask is not None and mask.shape == state.shape[:2]:
        return (state * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return state.mean(dim=1) if state.ndim == 3 else state
