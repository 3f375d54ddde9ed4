"""The student in training: its losses, and the projections that only training needs.

Shapes: R rows (examples; words for tagging), C classes, B examples, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from potstill.compress.layer_losses import LAYERS, Heads
from potstill.compress.layers import Ears, Pair, Point, State, check_plain_attention, layer_pairs, map_pairs, maps
from potstill.compress.losses import SOFT
from potstill.compress.terms import Term
from potstill.validate.errors import InputError
from potstill.validate.task import Model

Tensors = Mapping[str, Tensor]


@dataclass
class Taught:
    """What the teacher says of a batch.

    Attributes:
        outputs: logits (R, C) or embeddings (R, D); None when no loss reads them.
        states: its layers, by what is read and where.
        mask: 1 where it had a token (B, T); None when no loss reads tokens.
        rows: the student's rows (R,) that the outputs are beside; None where they are beside all of them.
    """

    outputs: Tensor | None
    states: Mapping[Point, State] = field(default_factory=dict)
    mask: Tensor | None = None
    rows: Tensor | None = None


class Pupil(nn.Module):
    """A student whose `forward` gives the parts of its loss.

    Projections are learned where a matched layer has another width than the teacher's; they are trained and resumed
    with the student and are no part of it.
    """

    def __init__(self, student: Model, teacher: Model, terms: Sequence[Term], samples: tuple[Tensors, Tensors]) -> None:
        """Match layers and make projections.

        Args:
            student: whose module is trained.
            teacher: whose layers are matched.
            terms: of the loss.
            samples: the same few examples encoded for the student and for the teacher, to learn shapes from.

        Raises:
            InputError: layers that cannot be matched.
        """
        super().__init__()
        self.module = student.module
        self._student, self._terms = student, list(terms)
        layered = [term for term in terms if term.name in LAYERS]
        self.pairs = {term.name: pairs_of(term, student, teacher, samples) for term in layered}
        self._ears = Ears(student.core, [point for point, _ in self._points()])
        try:
            self.projections = self._project(student, teacher, samples)
        except InputError:
            self.close()
            raise

    def teacher_points(self) -> list[Point]:
        """The teacher's layers that the losses read."""
        return [point for _, point in self._points()]

    def _points(self) -> list[tuple[Point, Point]]:
        """The student's and the teacher's points of all pairs, in order."""
        return [
            ((LAYERS[name].reads, pair.student), (LAYERS[name].reads, pair.teacher))
            for name, pairs in self.pairs.items()
            for pair in pairs
        ]

    def _project(self, student: Model, teacher: Model, samples: tuple[Tensors, Tensors]) -> nn.ModuleDict:
        """Linear layers, or 1 × 1 convolutions, from the student's width to the teacher's where they differ."""
        projections = nn.ModuleDict()
        if not self.pairs:
            return projections
        ears = Ears(teacher.core, self.teacher_points())
        try:
            with torch.no_grad(), self._ears, ears:
                student.answers(samples[0])
                teacher.answers(samples[1])
        finally:
            ears.close()
        ours, theirs = self._ears.states(), ears.states()
        for term in self._terms:
            for i, pair in enumerate(self.pairs.get(term.name, [])):
                reads = LAYERS[term.name].reads
                made = _projection(term, ours[reads, pair.student], theirs[reads, pair.teacher])
                if made is not None:
                    projections[f"{term.name}-{i}"] = made
        return projections

    def forward(self, tensors: Tensors, taught: Taught, labels: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        """The parts of the loss by name, not weighted.

        Args:
            tensors: encoded examples.
            taught: by the teacher, of the same examples.
            labels: classes (R,).
            keep: rows to learn from, bool (R,); None for all.
        """
        with self._ears:
            outputs, theirs = self._student.answers(tensors), taught.outputs
        states = of_tokens(self._ears.states(), tensors)
        beside, of_beside = (one if taught.rows is None else one[taught.rows] for one in (outputs, labels))
        if keep is not None:
            outputs, labels = outputs[keep], labels[keep]
            if taught.rows is None:
                beside, of_beside, theirs = outputs, labels, None if theirs is None else theirs[keep]
        parts = {}
        for term in self._terms:
            if term.name in LAYERS:
                parts[term.name] = self._of_layers(term, states, taught, tensors)
            elif term.name in SOFT:
                parts[term.name] = term.function(beside, theirs, *([of_beside] if term.needs_labels else []))
            else:
                parts[term.name] = term.function(outputs, labels)
        return parts

    def weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The loss: the weighted sum of its parts."""
        return torch.stack([term.weight * parts[term.name] for term in self._terms]).sum()

    def _of_layers(self, term: Term, states: Mapping[Point, State], taught: Taught, tensors: Tensors) -> Tensor:
        """A layer loss, mean over the pairs that it matches."""
        reads, found = LAYERS[term.name].reads, []
        for i, pair in enumerate(self.pairs[term.name]):
            ours, theirs = states[reads, pair.student], taught.states[reads, pair.teacher]
            if f"{term.name}-{i}" in self.projections:
                ours = self.projections[f"{term.name}-{i}"](ours)
            mask = None if isinstance(ours, Tensor) and reads == "map" else _mask(term, ours, theirs, tensors, taught)
            found.append(term.function(ours, theirs, mask))
        return torch.stack(found).mean()

    def close(self) -> None:
        """Remove the hooks from the student."""
        self._ears.close()


def of_tokens(states: Mapping[Point, State], tensors: Tensors) -> Mapping[Point, State]:
    """Of a language model the hidden states (P, T, D) of the R tokens that have a next one, (1, R, D).

    So a model that packs its examples and one that gives each a row of its own (a Mamba) are compared token by token.
    """
    if "places" not in tensors:
        return states
    return {
        point: state.flatten(0, 1)[tensors["places"]][None] if isinstance(state, Tensor) else state
        for point, state in states.items()
    }


def pairs_of(term: Term, student: Model, teacher: Model, samples: tuple[Tensors, Tensors]) -> list[Pair]:
    """The layers that a term matches.

    Raises:
        InputError: layers that are not there.
    """
    kind = LAYERS[term.name]
    if term.name == "pkd" and "places" in samples[0]:
        raise InputError("pkd matches first tokens, which in a language model have read nothing else; use hidden")
    if kind.reads != "map":
        pairs = layer_pairs(student.core, teacher.core, term.layers, kind.last, term.name)
        if term.name == "attention":
            for pair in pairs:
                check_plain_attention(student.core, pair.student)
                check_plain_attention(teacher.core, pair.teacher)
        return pairs
    if term.layers:
        return [Pair(str(ours), str(theirs)) for ours, theirs in term.layers.items()]
    ours, theirs = maps(student, samples[0]), maps(teacher, samples[1])
    without = [who for who, found in (("student", ours), ("teacher", theirs)) if not found]
    if without:
        raise InputError(
            f"{term.name} matches feature maps, and there are none in the {' or the '.join(without)}; "
            "for a transformer use hidden, attention or relations"
        )
    return map_pairs(ours, theirs)


def _projection(term: Term, ours: State, theirs: State) -> nn.Module | None:
    """What brings a student's state to the teacher's width; None where nothing is needed.

    Raises:
        InputError: states that cannot be compared.
    """
    if isinstance(ours, Heads) or isinstance(theirs, Heads):
        assert isinstance(ours, Heads)
        assert isinstance(theirs, Heads)
        _check_heads(term, ours, theirs)
        return None
    if LAYERS[term.name].reads == "hidden" and (ours.ndim, theirs.ndim) != (3, 3):
        raise InputError(
            f"{term.name} compares states of tokens, (batch, tokens, width); the student's layer gives "
            f"{tuple(ours.shape)} and the teacher's {tuple(theirs.shape)}; for feature maps use features or "
            "attention_transfer"
        )
    on_map = LAYERS[term.name].reads == "map"
    before, after = (state.shape[1 if on_map else 2] for state in (ours, theirs))
    if before == after or not LAYERS[term.name].projected:
        return None
    return nn.Conv2d(before, after, 1, bias=False) if on_map else nn.Linear(before, after)


def _check_heads(term: Term, ours: Heads, theirs: Heads) -> None:
    """Refuse heads that cannot be compared.

    Raises:
        InputError: other numbers of heads, or relation heads that do not divide a width.
    """
    if term.name == "attention":
        if ours.heads != theirs.heads:
            raise InputError(
                f"attention compares head with head; the student has {ours.heads} and the teacher {theirs.heads}; "
                "use relations, which cuts both anew"
            )
        return
    heads = int(term.settings.get("heads") or theirs.heads)
    widths = ours.query.shape[2], theirs.query.shape[2]
    if any(width % heads for width in widths):
        raise InputError(
            f"{term.name}.heads: {heads} must divide the student's width {widths[0]} and the teacher's {widths[1]}"
        )


def _mask(term: Term, ours: State, theirs: State, tensors: Tensors, taught: Taught) -> Tensor:
    """1 where there is a token (B, T).

    Raises:
        InputError: teacher and student cut the text into other tokens.
    """
    a, b = (state.query if isinstance(state, Heads) else state for state in (ours, theirs))
    mask = tensors.get("attention_mask")
    if mask is None:
        mask = torch.ones(a.shape[:2], dtype=torch.int64, device=a.device)
    alike = taught.mask is None or taught.mask is mask or torch.equal(mask, taught.mask)
    same = alike and a.shape[:2] == b.shape[:2] == mask.shape
    if not same:
        raise InputError(
            f"{term.name} compares token with token, and teacher and student cut the examples into other tokens "
            f"({tuple(b.shape[:2])} and {tuple(a.shape[:2])}); use losses on outputs, such as kl"
        )
    return mask
