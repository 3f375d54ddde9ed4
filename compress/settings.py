"""What a recipe says of its student. It needs no torch, so that a recipe is checked at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from potstill.validate.checkpoint import is_factory

Count = Annotated[int, Field(ge=1)]


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _layers(value: Any) -> Any:
    """A number of layers, or the layers themselves."""
    if value is None or _is_count(value):
        return value
    if isinstance(value, list | tuple) and value and all(_is_count(i, least=0) for i in value):
        layers = tuple(value)
        if layers == tuple(sorted(set(layers))):
            return layers
    raise ValueError(f"expected a number of layers from 1, or their indices from 0, rising; given {value!r}")


def _vocabulary(value: Any) -> Any:
    """`used`, or at most so many tokens."""
    if value is None or value == "used" or _is_count(value):
        return value
    raise ValueError(f"expected 'used', or the largest number of tokens; given {value!r}")


def _rank(value: Any) -> Any:
    """A share of the full rank, or the rank itself."""
    if value is None or _is_count(value) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(f"expected a share of the full rank above 0 and below 1, or a whole rank; given {value!r}")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StudentSettings:
    """Where training starts: a cut of the teacher, or a checkpoint of its own.

    Attributes:
        layers: how many transformer layers to keep, or the indices of those to keep.
        pick: which ones, where `layers` is a number: spread `evenly` from the first to the last, the `first` ones, or
            those of most `importance` on the training examples.
        hidden: hidden size to keep, a multiple of the teacher's head size; the heads (where several share keys, whole
            groups, rounded up) and, unless `neurons` says otherwise, the feed-forward shrink in proportion.
        neurons: width of each feed-forward to keep.
        vocabulary: `used` keeps the tokens that the training examples use, a number at most so many of them.
        rank: of the two factors that stand in for each weight of the layers: a share of the full rank, or the rank.
        checkpoint: a transformers checkpoint, or `package.module:factory`.
        weights: weights file for a factory; without one it starts as the factory made it.
    """

    layers: Annotated[int | tuple[int, ...] | None, BeforeValidator(_layers)] = None
    pick: Literal["evenly", "first", "importance"] = "evenly"
    hidden: Count | None = None
    neurons: Count | None = None
    vocabulary: Annotated[Literal["used"] | int | None, BeforeValidator(_vocabulary)] = None
    rank: Annotated[float | int | None, BeforeValidator(_rank)] = None
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    weights: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a cut of nothing, a cut beside a checkpoint, and a choice of layers where none is left open."""
        cut = any((self.layers, self.hidden, self.neurons, self.vocabulary, self.rank))
        if cut == bool(self.checkpoint or self.weights):
            raise ValueError(
                "expected a cut of the teacher (layers, hidden, neurons, vocabulary, rank) or a checkpoint; "
                + ("both are given" if cut else "neither is given")
            )
        if self.weights and not is_factory(self.checkpoint or ""):
            raise ValueError("weights go with package.module:factory only")
        if self.pick != "evenly" and not isinstance(self.layers, int):
            raise ValueError(f"pick: {self.pick} chooses among layers, and layers gives no number of them")

    @property
    def reads_examples(self) -> bool:
        """Whether the cut depends on the training examples."""
        return self.pick == "importance" or any((self.hidden, self.neurons, self.vocabulary))
