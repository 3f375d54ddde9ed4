"""A smaller vocabulary: the tokens that the examples use, and all that spell any other word.

Shapes: V tokens before the cut, K after it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.task import Model, quiet_transformers
from potstill.validate.tokens import TokensEncoder

AT_ONCE = 1024  # examples encoded in one call
_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """What is left of a vocabulary.

    Attributes:
        encode: the encoder whose tokenizer knows these tokens alone.
        kept: their ids (K,) in the teacher, rising; the k-th of them has the id k now.
    """

    encode: Encoder
    kept: list[int]

    def renumber(self, config: Any) -> None:
        """Give a config, or the settings of `generate`, the new ids in place; of lists those that stay."""
        new = {old: k for k, old in enumerate(self.kept)}
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and type(value) is int:
                setattr(config, name, new.get(value, value))
            elif name.endswith(("_token_id", "suppress_tokens")) and isinstance(value, list):
                setattr(config, name, [new[one] for one in value if one in new])
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(self.kept)


def cut_vocabulary(model: Model, examples: Examples, most: int | Literal["used"]) -> Vocabulary:
    """The tokens that stay, and an encoder of these.

    Args:
        model: whose tokenizer is cut; it stays as it is itself.
        examples: whose texts say which tokens are used.
        most: the largest K, or `used`; see `tokens_to_keep`.

    Raises:
        InputError: there is no fast tokenizer, it is of another kind, or what must stay is more than `most`.
    """
    counts = token_counts(model, examples)
    encode: Any = model.encode
    core: Any = model.core
    kept = tokens_to_keep(encode.tokenizer, counts, most, core.config, getattr(core, "generation_config", None))
    return Vocabulary(cut_encoder(encode, kept), kept)


def places_in(student: Model, teacher: Model) -> list[int] | None:
    """Of each of a student's tokens (K,) the id that its teacher has for it; None where these are not the same tokens.

    They are where the tokenizers differ by their vocabularies alone, and the teacher knows all that the student does.
    """
    ours, theirs = (getattr(model.encode, "tokenizer", None) for model in (student, teacher))
    if not all(getattr(one, "backend_tokenizer", None) for one in (ours, theirs)):
        return None
    plain = [_plain(one) for one in (ours, theirs)]
    if _without_tokens(plain[0]) != _without_tokens(plain[1]):
        return None
    known = theirs.get_vocab()  # type: ignore[union-attr]
    size, most = (int(model.core.config.vocab_size) for model in (student, teacher))  # type: ignore[union-attr, arg-type]
    mine = {i: token for token, i in ours.get_vocab().items() if i < size}  # type: ignore[union-attr]
    places = [known.get(mine.get(i), most) for i in range(size)]
    return places if max(places) < most else None


def first_pieces(student: Model, teacher: Model, places: Sequence[int]) -> list[int]:
    """Of each of the teacher's tokens (V,) the student's: the same one, or the first that it spells it with.

    K, one beyond the student's, where the teacher's embedding has rows for no token.

    Args:
        student: its tokens are some of the teacher's.
        teacher: V tokens.
        places: of the student's tokens (K,) in the teacher, see `places_in`.
    """
    ours, theirs = (model.encode.tokenizer for model in (student, teacher))  # type: ignore[attr-defined]
    spell, size = ours.backend_tokenizer.model.tokenize, int(teacher.core.config.vocab_size)  # type: ignore[union-attr, arg-type]
    found = [len(places)] * size
    for token, i in theirs.get_vocab().items():
        if i < size and (pieces := spell(token)):
            found[i] = pieces[0].id
    for k, i in enumerate(places):
        found[i] = k
    return found


def _without_tokens(plain: dict[str, Any]) -> dict[str, Any]:
    """What is in tokenizer.json, but for the tokens themselves."""
    model = {name: value for name, value in plain["model"].items() if name not in ("vocab", "merges", "unk_id")}
    return {name: plain[name] for name in ("normalizer", "pre_tokenizer", "decoder")} | {"model": model}


def token_counts(model: Model, examples: Examples) -> NDArray[np.int64]:
    """How often the examples, as the model reads them, use each token: (V,), special tokens among them.

    So are those that pad a batch, but not of a language model.

    Raises:
        InputError: the model has no fast tokenizer.
    """
    encode: Any = model.encode
    config: Any = model.core.config
    if getattr(getattr(encode, "tokenizer", None), "backend_tokenizer", None) is None:
        raise InputError("vocabulary= cuts what a model's fast tokenizer gives, and the teacher has none")
    counts = np.zeros(config.vocab_size, dtype=np.int64)
    truncated = encode.truncated
    for start in range(0, len(examples), AT_ONCE):
        rows = examples.rows(range(start, min(start + AT_ONCE, len(examples))))
        if isinstance(encode, TokensEncoder):  # its batches are packed
            ids = np.concatenate([np.asarray(one, dtype=np.int64) for one in rows[f"{encode.prefix}tokens"]])
        else:
            ids = encode(rows)["input_ids"].ravel()
        counts += np.bincount(ids, minlength=len(counts))
    encode.truncated = truncated
    return counts


def unknown_tokens(model: Model, examples: Examples) -> int:
    """How many tokens of the examples the model's tokenizer does not know."""
    encode: Any = model.encode
    unknown = encode.tokenizer.unk_token_id
    return 0 if unknown is None else int(token_counts(model, examples)[unknown])


def tokens_to_keep(
    tokenizer: Any, counts: NDArray[np.int64], most: int | Literal["used"], config: Any, generation: Any = None
) -> list[int]:
    """Ids (K,), rising, of the tokens that stay.

    Special and added tokens, single characters and bytes always stay, so that every word that could be spelled still
    can. Of the others those with a count, the most frequent first; for BPE each with the tokens that merge into it.
    A text whose tokens all stay is cut into the same tokens as before, since only pieces that were not chosen have
    gone; but a word that was unknown as a whole may come to be spelled.

    Args:
        tokenizer: a fast tokenizer of transformers.
        counts: of each token (V,).
        most: the largest K, or `used` for all with a count.
        config: of the model; the tokens that it names stay, and, where nothing is generated, those before its padding
            token, from whose id RoBERTa counts its positions.
        generation: settings of `generate`, whose tokens stay, too; None for a model that writes nothing.

    Raises:
        InputError: what must stay is more than `most`, or the tokenizer is of another kind.
    """
    plain = _plain(tokenizer)
    ids = _ids(plain["model"])
    kept = {i for token, i in ids.items() if _is_letter(token, plain["model"])}
    kept |= {entry["id"] for entry in plain["added_tokens"]} | {*tokenizer.all_special_ids}
    kept |= _named_tokens(config, len(counts))
    if generation is None:
        kept |= {*range(getattr(config, "pad_token_id", None) or 0)}
    else:
        kept |= _named_tokens(generation, len(counts))
    if (unknown := plain["model"].get("unk_token")) in ids:
        kept.add(ids[unknown])
    if plain["model"].get("unk_id") is not None:
        kept.add(plain["model"]["unk_id"])
    room = len(counts) if most == "used" else most
    if len(kept) > room:
        raise InputError(
            f"vocabulary={most}: special tokens, single characters and bytes stay, and they alone are {len(kept)}; "
            "give at least as many"
        )
    parts = _Merges(plain["model"], ids)
    for i in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist():
        more = ({i} | parts.of(i)) - kept
        if len(kept) + len(more) > room:
            break
        kept |= more
    return sorted(i for i in kept if i < len(counts))


def cut_encoder(encode: Encoder, kept: list[int]) -> Encoder:
    """The same encoder whose tokenizer knows only some tokens; the k-th of `kept` gets the id k.

    Raises:
        InputError: the tokenizer is of another kind than WordPiece, BPE, Unigram or whole words.
    """
    from transformers import AutoTokenizer

    reader: Any = encode
    new = {old: k for k, old in enumerate(kept)}
    plain = _plain(reader.tokenizer)
    plain["model"] = _cut_model(plain["model"], new)
    plain["added_tokens"] = [{**entry, "id": new[entry["id"]]} for entry in plain["added_tokens"] if entry["id"] in new]
    if plain["post_processor"]:
        plain["post_processor"] = _cut_processor(plain["post_processor"], new)
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        reader.tokenizer.save_pretrained(folder)
        for path in folder.iterdir():  # the vocabulary in older forms
            if path.is_file() and path.name not in (_FILE, _SETTINGS, "special_tokens_map.json", "chat_template.jinja"):
                path.unlink()
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # by the old ids; tokenizer.json holds them too
        (folder / _SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        (folder / _FILE).write_text(json.dumps(plain), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    cut: Encoder = replace(reader, tokenizer=tokenizer, truncated=0)
    return cut


def _named_tokens(config: Any, size: int) -> set[int]:
    """The ids of tokens that a config names, of a vocabulary of some size; several may end texts."""
    named = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    ids = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return {one for one in ids if type(one) is int and 0 <= one < size}


def _plain(tokenizer: Any) -> dict[str, Any]:
    """What is in tokenizer.json."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    plain: dict[str, Any] = json.loads(backend.to_str())
    return plain


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Token to id."""
    if model["type"] == "Unigram":
        return {piece: i for i, (piece, _score) in enumerate(model["vocab"])}
    if model["type"] not in ("WordPiece", "BPE", "WordLevel"):
        raise InputError(f"vocabulary= cuts WordPiece, BPE and Unigram tokenizers, and this one is {model['type']}")
    return dict(model["vocab"])


def _affixes(model: Mapping[str, Any]) -> tuple[str, str]:
    """What marks a token inside a word at its start, and at a word's end."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _is_letter(token: str, model: Mapping[str, Any]) -> bool:
    """Whether a token is a single character, or a byte such as `<0x0A>`."""
    prefix, suffix = _affixes(model)
    bare = token.removeprefix(prefix).removesuffix(suffix)
    return len(bare or token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))


class _Merges:
    """The merges of a BPE model; of other kinds none."""

    def __init__(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        self._ids, self._tokens = ids, {i: token for token, i in ids.items()}
        self._rank = {tuple(pair): rank for rank, pair in enumerate(model.get("merges", []))}
        self._prefix, self._suffix = _affixes(model)

    def of(self, i: int) -> set[int]:
        """Ids of the tokens that a token is merged from, as BPE (Sennrich 2016) merges it: lowest rank first."""
        if not self._rank or i not in self._tokens:
            return set()
        symbols, found = self._letters(self._tokens[i]), set[str]()
        while len(symbols) > 1:
            found.update(symbols)
            ranks = [self._rank.get(pair, len(self._rank)) for pair in pairwise(symbols)]
            at = int(np.argmin(ranks))
            if ranks[at] == len(self._rank):
                break
            symbols[at : at + 2] = [self.joined(symbols[at], symbols[at + 1])]
        return {self._ids[symbol] for symbol in found if symbol in self._ids}

    def joined(self, left: str, right: str) -> str:
        """What two tokens merge into."""
        return left + right.removeprefix(self._prefix)

    def _letters(self, token: str) -> list[str]:
        bare = token.removeprefix(self._prefix).removesuffix(self._suffix)
        inside = bool(self._prefix) and token.startswith(self._prefix)
        letters = [(self._prefix if k or inside else "") + letter for k, letter in enumerate(bare)]
        if letters and self._suffix and token.endswith(self._suffix):
            letters[-1] += self._suffix
        return letters


def _cut_model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer's model with the kept tokens, their new ids, and the merges among them."""
    if model["type"] == "Unigram":
        vocab = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        return {**model, "vocab": vocab, "unk_id": new.get(model["unk_id"])}
    ids = {token: new[i] for token, i in _ids(model).items() if i in new}
    if model["type"] != "BPE":
        return {**model, "vocab": ids}
    join = _Merges(model, ids).joined
    merges = [pair for pair in model["merges"] if pair[0] in ids and pair[1] in ids and join(*pair) in ids]
    return {**model, "vocab": ids, "merges": merges}


def _cut_processor(part: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """What adds the special tokens, with their new ids."""
    match part["type"]:
        case "TemplateProcessing":
            special = {
                name: {**entry, "ids": [new[i] for i in entry["ids"]]} for name, entry in part["special_tokens"].items()
            }
            return {**part, "special_tokens": special}
        case "BertProcessing" | "RobertaProcessing":
            return {**part, **{end: [part[end][0], new[part[end][1]]] for end in ("sep", "cls")}}
        case "Sequence":
            return {**part, "processors": [_cut_processor(inner, new) for inner in part["processors"]]}
    return part
