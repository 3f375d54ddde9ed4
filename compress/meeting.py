"""What a teacher says, for a student with a tokenizer of its own: at the marks that both share, in tokens that it has.

Shapes: R rows of the teacher, M marks of a batch, V tokens of the teacher, K of the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.compress.layer_losses import LAYERS
from potstill.compress.lesson import Lesson
from potstill.compress.losses import SOFT
from potstill.compress.pupil import Taught
from potstill.compress.terms import Term
from potstill.compress.vocabulary import first_pieces, places_in
from potstill.validate.aligned import prefix_of
from potstill.validate.errors import InputError
from potstill.validate.task import Model


@dataclass(frozen=True)
class Meeting:
    """Brings the teacher's rows beside the student's.

    Attributes:
        own: whether the student has a tokenizer of its own; nothing is changed where it has not.
        columns: of each of the student's tokens (K,) the id that the teacher has for it; None where it has none for
            some.
        begins: of each of the teacher's tokens (V,) the student's that it is, or begins with; see `first_pieces`.
    """

    own: bool = False
    columns: Tensor | None = None
    begins: Tensor | None = None

    def __call__(self, taught: Taught, met: tuple[Tensor, Tensor] | None) -> Taught:
        """The teacher's outputs (R, V) as (M, K), or (M, V), with the student's rows that they are beside.

        What the teacher gives to a token that the student has not counts for the one that the student spells it with
        first, so that no probability is lost.

        `met`: rows of the student and of the teacher (M,), see `aligned.met`.
        """
        if met is None or taught.outputs is None:
            return taught
        ours, theirs = (rows.to(taught.outputs.device) for rows in met)
        outputs = taught.outputs[theirs]
        if self.columns is not None and self.begins is not None:
            shares = outputs.float().softmax(dim=1)
            summed = shares.new_zeros(len(shares), len(self.columns) + 1)  # the last for what is no token at all
            summed.index_add_(1, self.begins.to(shares.device), shares)
            outputs = summed[:, :-1].clamp(min=torch.finfo(summed.dtype).tiny).log()
        return replace(taught, outputs=outputs, rows=ours)


AS_IT_IS = Meeting()


def meeting_of(student: Model, teacher: Model) -> Meeting:
    """How a student meets its teacher."""
    if not prefix_of(student.encode):
        return AS_IT_IS
    places = places_in(student, teacher)
    if places is None:
        return Meeting(True)
    return Meeting(True, torch.tensor(places), torch.tensor(first_pieces(student, teacher, places)))


def check_losses(terms: Sequence[Term], student: Model, lesson: Lesson, on_policy: float) -> None:
    """Refuse losses that compare what a student with a tokenizer of its own and its teacher have not in common.

    Raises:
        InputError: a loss does not fit the student's tokens, or the task.
    """
    names = [term.name for term in terms]
    if "uld" in names and lesson.task.gives != "tokens":
        raise InputError(
            f"uld is for language models with different tokenizers; the task is {lesson.task.word}; use kl"
        )
    meeting = meeting_of(student, lesson.teacher)
    if not meeting.own:
        return
    whose = f"{student.checkpoint} has another tokenizer than {lesson.teacher.checkpoint}"
    if on_policy:
        raise InputError(f"on_policy writes in the student's tokens, and {whose}; leave it out")
    for name in names:
        if name in LAYERS:
            raise InputError(f"{name} compares token with token, and {whose}; use losses on outputs")
        if name in SOFT and name != "uld" and meeting.columns is None:
            raise InputError(
                f"{name} compares the probabilities of the same tokens, and {whose}; use uld, or hard alone"
            )
