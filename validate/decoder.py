"""A decoder's ONNX graph that takes its past as inputs and gives it back as outputs.

Names are those of ONNX Runtime GenAI: `input_ids` (B, T) and, where the graph has them, `attention_mask` (B, P + T) and
`position_ids` (B, T); `past_key_values.*` in and `present.*` out, keys and values (B, heads, P, width) or a state of
one size; `logits` (B, T, V). A graph whose T is 1 is run token by token.

Shapes: B sequences, T tokens of each, P tokens before them, V tokens of the vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.encoder import Inputs

PAST, PRESENT, IDS, MASK, POSITIONS = "past_key_values.", "present.", "input_ids", "attention_mask", "position_ids"
STEPS = 64
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def takes_past(inputs: Iterable[Any]) -> bool:
    """Whether the inputs of a graph or a session are a decoder's."""
    return any(one.name.startswith(PAST) for one in inputs)


def empty_past(session: Any, batch: int = 1) -> Inputs:
    """The past before the first token, by name: free axes after the batch's are 0 long, a state is all zeros."""
    found = dict[str, NDArray[Any]]()
    for one in session.get_inputs():
        if one.name.startswith(PAST):
            rest = [size if isinstance(size, int) else 0 for size in one.shape[1:]]
            found[one.name] = np.zeros([batch, *rest], dtype=_TYPES[one.type])
    return found


def with_past(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Inputs:
    """The inputs that a graph takes: those given; an empty past, and the mask and positions of whole sequences.

    Args:
        session: of ONNX Runtime.
        inputs: by name, `input_ids` (B, T) among them where the graph has a past. What it does not take is left out.
    """
    ids, found = inputs.get(IDS), dict[str, NDArray[Any]]()
    if ids is not None:
        found = empty_past(session, len(ids))
    if found and ids is not None:
        found[MASK] = np.ones_like(ids, dtype=np.int64)
        found[POSITIONS] = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape)
    found |= inputs
    return {one.name: found[one.name] for one in session.get_inputs()}


class Decoder:
    """Sequences read by a graph piece by piece.

    Attributes:
        past: what the graph keeps of the tokens so far, by the names of its inputs.
        seen: how many there were.
        stepwise: whether it takes one token at a time.
    """

    def __init__(self, session: Any, batch: int = 1) -> None:
        self._session = session
        self._outputs = [one.name for one in session.get_outputs()]
        (ids,) = (one for one in session.get_inputs() if one.name == IDS)
        self.stepwise = ids.shape[1] == 1
        self.past, self.seen = empty_past(session, batch), 0

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (B, T, V) of further tokens (B, T)."""
        if self.stepwise:
            return np.concatenate([self._read(ids[:, i : i + 1]) for i in range(ids.shape[1])], axis=1)
        return self._read(ids)

    def feeds(self, ids: NDArray[np.int64]) -> Inputs:
        """What the graph is given to read further tokens (B, T) at once."""
        end = self.seen + ids.shape[1]
        mask = np.ones((len(ids), end), dtype=np.int64)
        positions = np.broadcast_to(np.arange(self.seen, end, dtype=np.int64), ids.shape)
        return with_past(self._session, {IDS: ids, MASK: mask, POSITIONS: positions, **self.past})

    def _read(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found = dict(zip(self._outputs, self._session.run(None, self.feeds(ids)), strict=True))
        self.past = {name: found[name.replace(PAST, PRESENT)] for name in self.past}
        self.seen += ids.shape[1]
        return np.asarray(found["logits"], dtype=np.float32)


def runs_of(session: Any, text: Sequence[int]) -> list[Inputs]:
    """The inputs of the runs that read a text: of one; of the first `STEPS` for a graph that reads token by token."""
    ids, decoder, found = np.asarray([text], dtype=np.int64), Decoder(session), list[Inputs]()
    if not decoder.stepwise:
        return [decoder.feeds(ids)]
    for i in range(min(STEPS, ids.shape[1])):
        found.append(decoder.feeds(ids[:, i : i + 1]))
        decoder(ids[:, i : i + 1])
    return found


def greedy(session: Any, prompt: Sequence[int], tokens: int, ends: Sequence[int] = ()) -> list[int]:
    """The most likely continuation, token by token, by plain ONNX Runtime.

    Args:
        session: of a decoder's graph.
        prompt: token ids, one at least.
        tokens: how many to add at most.
        ends: ids after which nothing comes; the last token may be one.
    """
    decoder, found = Decoder(session), list[int]()
    logits = decoder(np.asarray([prompt], dtype=np.int64))
    while len(found) < tokens:
        found.append(int(logits[0, -1].argmax()))
        if found[-1] in ends or len(found) == tokens:
            break
        logits = decoder(np.asarray([found[-1:]], dtype=np.int64))
    return found
