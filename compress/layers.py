"""Which layers are matched, and how their states are taken while a model runs.

Shapes: B examples, T tokens, D width, C channels, H × W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.compress.layer_losses import Heads
from potstill.validate.errors import InputError, did_you_mean
from potstill.validate.task import Model

QUERY, KEY, VALUE = ("query", "q_proj", "q_lin"), ("key", "k_proj", "k_lin"), ("value", "v_proj", "v_lin")
Reads = Literal["hidden", "heads", "map"]
State = Tensor | Heads
Point = tuple[Reads, str]  # what is read, and of which module


def blocks(core: nn.Module) -> dict[str, nn.Module]:
    """The transformer layers of a model by name, in order: its largest `ModuleList` of modules of one class.

    Raises:
        InputError: it has none.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in core.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found:
        raise InputError(
            f"{type(core).__name__} has no stack of layers to match; for a convolutional network use the losses "
            "features or attention_transfer"
        )
    _, name, stack = max(found, key=lambda entry: entry[0])
    return {f"{name}.{i}": block for i, block in enumerate(stack)}


def maps(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last feature map (B, C, H, W) of each resolution, by the module that gives it; largest first."""
    last: dict[tuple[int, ...], tuple[str, Tensor]] = {}

    def keep(name: str, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            last[tuple(output.shape[2:])] = name, output

    with torch.no_grad(), hooked({name: module for name, module in model.core.named_modules() if name}, keep):
        model.answers(tensors)
    return {name: output for _, (name, output) in sorted(last.items(), reverse=True)}


@contextmanager
def hooked(modules: Mapping[str, nn.Module], note: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Inside `with`, `note(name, inputs, output)` is called whenever one of the modules has run."""

    def hook(name: str, _module: nn.Module, inputs: Any, output: Any) -> None:
        note(name, inputs, output)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the layer of the teacher that it is to resemble, by the names of their modules."""

    student: str
    teacher: str


def layer_pairs(
    student: nn.Module, teacher: nn.Module, given: Mapping[Any, Any] | None, last: bool, loss: str
) -> list[Pair]:
    """Pairs of transformer layers.

    Args:
        student: with S layers.
        teacher: with L layers.
        given: student's to teacher's layers by number, from 0. By default the student's layer i of S is matched
            with layer (i + 1) · L / S − 1, rounded up, the last with the last (Jiao 2020, "TinyBERT", uniform
            strategy).
        last: match the last layers alone, when nothing is given (Wang 2020, "MiniLM").
        loss: whose setting it is, for messages.

    Raises:
        InputError: a number outside the layers.
    """
    ours, theirs = list(blocks(student)), list(blocks(teacher))
    if given is None:
        spread = {i: -(-(i + 1) * len(theirs) // len(ours)) - 1 for i in range(len(ours))}
        given = {len(ours) - 1: len(theirs) - 1} if last else spread
    for numbers, names, who in ((given.keys(), ours, "student"), (given.values(), theirs, "teacher")):
        wrong = [n for n in numbers if type(n) is not int or not 0 <= n < len(names)]
        if wrong:
            raise InputError(f"{loss}.layers: the {who} has layers 0 to {len(names) - 1}, and {wrong[0]!r} was given")
    return [Pair(ours[i], theirs[j]) for i, j in given.items()]


def map_pairs(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[Pair]:
    """Pairs of feature maps of the same resolution; where none is the same, the smallest of both."""
    by_size = {tuple(x.shape[2:]): name for name, x in theirs.items()}
    found = [Pair(name, by_size[tuple(x.shape[2:])]) for name, x in ours.items() if tuple(x.shape[2:]) in by_size]
    return found or [Pair(list(ours)[-1], list(theirs)[-1])]


class Ears:
    """Forward hooks that keep the states of some layers of a model while it runs inside `with`.

    Outside they keep nothing: gradient checkpointing runs layers again in the backward pass, whose states would
    hold all the memory that it saves.
    """

    def __init__(self, core: nn.Module, points: Sequence[Point]) -> None:
        self._kept, self._open = dict[str, Tensor](), False
        self._points = list(dict.fromkeys(points))
        self._handles: list[Any] = []
        modules = dict(core.named_modules())
        for _, name in self._points:
            if name not in modules:
                raise InputError(
                    f"{type(core).__name__} has no module {name!r}{did_you_mean(name, [n for n in modules if n])}"
                )
        self._qkv = {name: _attention_of(core, name) for reads, name in self._points if reads == "heads"}
        heard = [name for reads, name in self._points if reads != "heads"]
        for name in dict.fromkeys([*heard, *(inner for entry in self._qkv.values() for inner in entry[:3])]):
            self._listen(modules[name], name)

    def _listen(self, module: nn.Module, name: str) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._open:
                self._kept[name] = output[0] if isinstance(output, tuple) else output

        self._handles.append(module.register_forward_hook(hook))

    def __enter__(self) -> None:
        self._open = True

    def __exit__(self, *exc: object) -> None:
        self._open = False

    def states(self) -> dict[Point, State]:
        """What the last run gave, by what is read and where: tensors, or `Heads` for `heads`. Then it is forgotten."""
        kept, heard = self._kept, dict[Point, State]()
        for reads, name in self._points:
            if reads == "heads":
                query, key, value, heads = self._qkv[name]
                heard[reads, name] = Heads(kept[query], kept[key], kept[value], heads)
            else:
                heard[reads, name] = kept[name]
        self._kept.clear()
        return heard

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _attention_of(core: Any, block: str) -> tuple[str, str, str, int]:
    """Names of the query, key and value layers inside a block, and how many heads they hold.

    Raises:
        InputError: the block has not exactly three such layers, of one width.
    """
    inside = [
        (name, module)
        for name, module in core.named_modules()
        if name.startswith(f"{block}.") and isinstance(module, nn.Linear)
    ]
    found = [[pair for pair in inside if pair[0].rpartition(".")[2] in words] for words in (QUERY, KEY, VALUE)]
    widths = {module.out_features for pairs in found for _, module in pairs}
    if any(len(pairs) != 1 for pairs in found) or len(widths) != 1:
        raise InputError(
            f"{type(core).__name__} has not one query, key and value layer of the same width in {block}; "
            "match hidden states instead (hidden)"
        )
    query, key, value = (pairs[0][0] for pairs in found)
    head_size = core.config.hidden_size // core.config.num_attention_heads
    return query, key, value, widths.pop() // head_size


def check_plain_attention(core: nn.Module, block: str) -> None:
    """Refuse attention that is not softmax(q · kᵀ / √d) of the queries and keys that `Heads` holds.

    Raises:
        InputError: it is causal, or its positions are rotary.
    """
    modules = dict(core.named_modules())
    causal = any(getattr(module, "is_causal", False) for name, module in modules.items() if name.startswith(block))
    if causal or any("Rotary" in type(module).__name__ for module in modules.values()):
        raise InputError(
            f"attention of {type(core).__name__} cannot be computed from its queries and keys alone: it turns queries "
            "and keys by their place or hides later tokens; use relations"
        )
