"""Texts to a language model's tokens: cut into pieces, and packed so that little of a batch is padding.

Shapes: N examples, B of them in a batch, T tokens, P rows that a batch is packed into, R tokens that are predicted.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from potstill.validate.aligned import END, OWN, Spelled, ends_in_bytes, in_one_piece, pieces
from potstill.validate.encoder import Inputs, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples, Rows
from potstill.validate.files import sha256_json

AT_ONCE = 1000  # texts tokenised at a time
USEFUL = 0.95  # of the tokens of a packed batch, at least
CHOICE = "choice"  # the column that numbers the answers of one question


@dataclass
class TokensEncoder(TextEncoder):
    """Texts, or pieces of them that `TextGeneration.checked` cut, as rows of tokens.

    Arrays: `input_ids` and `position_ids` (P, T) int64, and `places` (R,) int64: where in P · T a token stands whose
    next one is predicted, the first example's before the second's.

    Examples are packed: P rows hold B examples one after the other, so that at most 5 % is padding. Positions start at
    0 in each, by which transformers keeps attention within it. Without `packs`, for a model that takes no positions,
    each has a row of its own. What follows it there is seen by none of its tokens.

    Attributes:
        packs: see above.
        prefix: of the columns that it reads: `own_` for a student whose tokenizer is not the teacher's.
        beside: the encoder of such a student, whose tokens `pieces_of` gives beside these.
    """

    packs: bool = True
    prefix: str = ""
    beside: Optional["TokensEncoder"] = None

    def __call__(self, rows: Rows) -> Inputs:
        """The arrays of some examples."""
        column = f"{self.prefix}tokens"
        pieces = rows[column] if column in rows else self.tokenizer(list(rows["text"]))["input_ids"]
        pieces = [np.asarray(piece, dtype=np.int64) for piece in pieces]
        row_of, start, count = self._packed([len(piece) for piece in pieces])
        width = self.pad_to or max(at + len(piece) for at, piece in zip(start, pieces, strict=True))
        ids = np.zeros((count, width), dtype=np.int64)
        ends = np.zeros(count, dtype=np.int64)
        np.maximum.at(ends, row_of, [at + len(piece) for at, piece in zip(start, pieces, strict=True)])
        positions, places = np.tile(np.arange(width), (count, 1)), []
        for row, end in enumerate(ends.tolist()):
            positions[row, end:] -= end  # padding is as one more example
        for row, at, piece in zip(row_of, start, pieces, strict=True):
            end = at + len(piece)
            ids[row, at:end] = piece
            positions[row, at:end] = np.arange(len(piece))
            places.append(row * width + at + np.arange(len(piece) - 1))
        return {"input_ids": ids, "position_ids": positions, "places": np.concatenate(places)}

    def _packed(self, lengths: Sequence[int]) -> tuple[list[int], list[int], int]:
        """The row of each piece, where it starts there, and the number of rows: as many as leave `USEFUL` tokens."""
        if not self.packs:
            return list(range(len(lengths))), [0] * len(lengths), len(lengths)
        count = -(-sum(lengths) // self.max_length)
        while True:
            row_of, start = shared_out(lengths, count)
            width = max(at + length for at, length in zip(start, lengths, strict=True))
            if sum(lengths) >= USEFUL * width * count:
                return row_of, start, count
            count -= 1  # one row has nothing to fill up

    def whole(self, text: str) -> list[tuple[str, int, list[int], int]]:
        """A text in pieces: what each says, the bytes that are predicted, its tokens, and that the first is read."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        tokens, places = encoded["input_ids"], encoded["offset_mapping"]
        cuts = range(0, max(1, len(tokens)), self.max_length)
        cut = [(tokens[at : at + self.max_length], places[at : at + self.max_length]) for at in cuts]
        return [(*_said(text, where), some, 1) for some, where in cut if len(some) > 1 or len(cut) == 1]

    def answer(self, prompt: str, text: str, ended: bool = True) -> tuple[str, int, list[int], int]:
        """A prompt and its answer as they are read and written in turn; what is beyond `max_length` is cut off.

        `ended`: with the token that ends texts. Gives the answer, its bytes, the tokens, and how many are only read.
        """
        spelled = self.spelled(text, prompt, ended)
        if len(spelled.tokens) > self.max_length:
            self.truncated += 1
        kept, size = spelled.tokens[: self.max_length], len(text.encode())
        return text, min(size, int(spelled.ends[len(kept) - 1])), kept, spelled.read

    def spelled(self, text: str, prompt: str | None = None, ended: bool = True) -> Spelled:
        """A text, or the answer to a prompt, in tokens with their places; the answer `ended` as texts end."""
        before, end = self._asked(prompt) if prompt is not None else [], self.tokenizer.eos_token_id
        encoded = self.tokenizer(
            text, add_special_tokens=prompt is None, return_offsets_mapping=True, return_special_tokens_mask=True,
            verbose=False,
        )  # fmt: skip
        tokens, special = before + encoded["input_ids"], encoded["special_tokens_mask"]
        ends = [0] * len(before) + ends_in_bytes(text, [0, *(end for _, end in encoded["offset_mapping"])])[1:].tolist()
        for i in range(len(special) - 1, 0, -1):  # what is put after a text
            if not special[i]:
                break
            ends[len(before) + i] = END
        if prompt is not None and ended:
            if end is None:
                raise InputError(
                    "the tokenizer names no token that ends texts, so that no answer to a prompt has an end; set "
                    "eos_token in its tokenizer_config.json"
                )
            tokens, ends = [*tokens, end], [*ends, END]
        read = 1 if prompt is None else len(before)
        return Spelled(tokens, np.asarray(ends, dtype=np.int64), read, self.max_length)

    def _asked(self, prompt: str) -> list[int]:
        """A prompt as the model is to read it, up to where the answer begins."""
        if self.tokenizer.chat_template:
            said = [{"role": "user", "content": prompt}]
            asked = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(asked, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def identity(self) -> Any:
        """All that decides the tokens."""
        own = *super()._plan(), self.tokenizer.chat_template
        return (own, self.beside.identity()) if self.beside else own

    def _plan(self) -> tuple[Any, ...]:
        return *super()._plan(), self.packs


def pieces_of(examples: Examples, encode: TokensEncoder) -> Examples:
    """Examples as pieces of at most `max_length` tokens; see `TextGeneration.checked`.

    With `encode.beside` in the tokens of both models, see `aligned.py`; labels and offsets are those of the first.

    Raises:
        InputError: a text holds less than two tokens, or the two models share no boundary in any.
    """
    import datasets

    table: Any = examples.table
    datasets.disable_progress_bars()
    try:
        rows = table.map(
            lambda rows, index: _cut(rows, index, encode, examples.name), batched=True, with_indices=True,
            batch_size=AT_ONCE, remove_columns=table.column_names, load_from_cache_file=False,
            new_fingerprint=sha256_json([examples.digest, encode.identity()])[:32],
        )  # fmt: skip
    finally:
        datasets.enable_progress_bars()
    found = Examples(examples.name, rows, np.zeros(0, dtype=np.int64), None, examples.digest, None)
    if encode.beside:
        found = replace(found, digest=sha256_json([examples.digest, encode.beside.identity()]))
        if not sum(map(sum, rows["spans"])) and "choices" not in table.column_names:
            raise InputError(
                f"in no text of {examples.name} do the tokens of teacher and student end at the same places; give "
                "models whose tokenizers keep the text as it is"
            )
    return with_next_tokens(found)


def _said(text: str, places: Sequence[tuple[int, int]]) -> tuple[str, int]:
    """What tokens at some places of a text say, and the bytes of it after the first token."""
    if not places:
        return "", 0
    end = max(last for _, last in places)
    return text[places[0][0] : end], len(text[places[0][1] : end].encode())


def with_next_tokens(examples: Examples) -> Examples:
    """Pieces, all of a table, with the next tokens as labels (R,) and the offsets of each piece's."""
    import pyarrow.compute as pc

    table: Any = examples.table
    tokens = table.data.column("tokens")
    lengths = pc.list_value_length(tokens).to_numpy().astype(np.int64)
    ids = pc.list_flatten(tokens).to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(ids)) - np.repeat(starts, lengths)  # of each token in its piece
    read = np.repeat(np.asarray(table.data.column("read")), lengths)
    labels = np.where(place < read, IGNORED, ids)[place > 0]
    return replace(examples, labels=labels, offsets=np.concatenate([[0], np.cumsum(lengths - 1)]))


def _cut(rows: Rows, index: Sequence[int], encode: TokensEncoder, name: str) -> dict[str, list[Any]]:
    """Pieces of texts, or of prompts with their answers: `read` tokens of each are not predicted."""
    found: dict[str, list[Any]] = {}
    prompts = rows.get("prompt", [None] * len(index))
    if "choices" in rows:
        return _choices(rows, index, encode, name)
    for i, text, prompt in zip(index, rows["text"], prompts, strict=True):
        cut = _pieces(text, prompt, encode)
        if any(len(cut[0][column]) < 2 for column in ("tokens", OWN + "tokens") if column in cut[0]):
            raise InputError(f"{name} has no token to predict in row {i + 1}: {text[:40]!r}; leave such texts out")
        for piece in cut:
            for column, value in (piece | {"document": i}).items():
                found.setdefault(column, []).append(value)
    return found


def _pieces(text: str, prompt: str | None, encode: TokensEncoder, ended: bool = True) -> list[dict[str, Any]]:
    """A text, or the answer to a prompt, as rows of a table; of two models where there is one `beside`."""
    if encode.beside:
        both = [one.spelled(text, prompt, ended) for one in (encode, encode.beside)]
        if prompt is not None:  # an answer is never cut in two
            encode.truncated += sum(len(one.tokens) > one.most for one in both[:1])
            return [in_one_piece(text, *both)]
        found = list(pieces(text, *both))
        encode.truncated += any(cut for _, cut in found)
        return [piece for piece, _ in found]
    columns = ("text", "bytes", "tokens", "read")
    cut = [encode.answer(prompt, text, ended)] if prompt is not None else encode.whole(text)
    return [dict(zip(columns, piece, strict=True)) for piece in cut]


def _choices(rows: Rows, index: Sequence[int], encode: TokensEncoder, name: str) -> dict[str, list[Any]]:
    """Each choice after its question, as an example of its own."""
    found: dict[str, list[Any]] = {}
    prompts = rows.get("prompt", [""] * len(index))
    for i, choices, answer, prompt in zip(index, rows["choices"], rows["answer"], prompts, strict=True):
        if not 0 <= answer < len(choices) or len(choices) < 2:
            raise InputError(
                f"{name} has {len(choices)} choices and the answer {answer} in row {i + 1}; expected two choices or "
                "more, and the number of the right one, from 0"
            )
        for number, text in enumerate(choices):
            (piece,) = _pieces(text, prompt, encode, ended=False)
            sides = [side for side in ("", OWN) if f"{side}tokens" in piece]
            if any(len(piece[f"{side}tokens"]) <= piece[f"{side}read"] for side in sides):
                raise InputError(
                    f"choice {number} in row {i + 1} of {name} has no token to predict after its prompt; give a larger "
                    "data.max_length, or leave such questions out"
                )
            of = {"document": i, CHOICE: number, "answer": answer, "bytes": len(text.encode())}
            for column, value in (piece | of).items():
                found.setdefault(column, []).append(value)
    return found


def shared_out(lengths: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """The row of each piece, and where it starts there: the longest first, each into the row with the most room.

    Graham 1969, "Bounds on multiprocessing timing anomalies" (LPT): the longest row is at most 4/3 of the best.
    """
    filled = [(0, row) for row in range(count)]
    row_of, start = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        start[i], row_of[i] = filled[0]
        heapq.heapreplace(filled, (start[i] + lengths[i], row_of[i]))
    return row_of, start
