"""Language models: the next token, judged by accuracy and perplexity.

Shapes: N examples, B of them in a batch, T tokens, P rows that a batch is packed into, R tokens that are predicted,
V tokens of the vocabulary, D documents.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.validate.aligned import OWN, Between
from potstill.validate.checkpoint import Checkpoint, open_folder, reading_weights
from potstill.validate.data import load_examples
from potstill.validate.encoder import Encoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples, Rows, check_not_empty
from potstill.validate.model import Gives, LogitsOf, Model, quiet_transformers
from potstill.validate.next_tokens import judge_choices, judge_tokens
from potstill.validate.onnx_file import OnnxModule
from potstill.validate.per_byte import judge_bytes
from potstill.validate.pretrained import check_kind, model_class
from potstill.validate.scorecard import Scorecard
from potstill.validate.text import OfText, positions
from potstill.validate.tokens import CHOICE, TokensEncoder, pieces_of


class NextTokens(LogitsOf):
    """A transformers model as a function to the logits of next tokens (P, T, V), without a cache."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """No mask is given: positions tell one example from the next, and no token sees a later one."""
        named = dict(zip(self.names, inputs, strict=True))
        logits: Tensor = self.model(**named, use_cache=False, return_dict=True).logits
        return logits


class TextGeneration(OfText):
    """The next token of texts, by a decoder (GPT-2, Llama, Qwen, Mamba and their kind).

    Examples are texts (`text`), which are learned and judged whole, or answers (`text`) to a `prompt`, whose own tokens
    are read and not predicted. A prompt goes in by the tokenizer's chat template, where it has one; the answer ends
    with the token that ends texts. A text of more than `max_length` tokens is cut into pieces, an answer is cut off. An
    evaluation set may also ask (`prompt`) and give `choices`, with the number of the right one (`answer`, from 0).

    Outputs (P, T, V) become rows (R, V), one for each predicted token. A student with a tokenizer of its own reads the
    same pieces in its own tokens, and is judged by bytes; see `aligned.py`.
    """

    word = "text-generation"
    features: tuple[str, ...] = ("text",)
    length_of: str | None = None  # batches are packed
    gives: Gives = "tokens"
    probe: ClassVar[Rows] = {"text": [""], "tokens": [[0, 1]]}
    ndim = 3
    classes = False
    wrap = NextTokens
    encode_by = TokensEncoder

    def encoder(  # type: ignore[override]  # a task's own options
        self, tool: Any, core: nn.Module, checkpoint: Checkpoint, max_length: int | None = None
    ) -> TextEncoder:
        """See `OfText.encoder`; by default 512 tokens, or as many as there are positions for.

        Raises:
            InputError: there are not positions for so many, or one token alone.
        """
        most, size = positions(core), _vocabulary(core)
        if max_length is not None and not 2 <= max_length <= most:
            raise InputError(
                f"data.max_length is {max_length}, and a text is read in pieces of 2 tokens to the {most} that "
                f"{checkpoint} has positions for; give a number of these"
            )
        if size is not None and tool.vocab_size > size:
            raise InputError(
                f"the tokenizer of {checkpoint} has {tool.vocab_size} tokens, and the model {size}; give the tokenizer "
                "that it was trained with, or resize_token_embeddings"
            )
        return super().encoder(tool, core, checkpoint, max_length or 512)

    def load(
        self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, like: Model | None = None, **options: Any
    ) -> Model:
        """Load with its tokenizer; one whose tokens are not those of `like` reads its own. See `Task.load`.

        Raises:
            InputError: its tokens see those after them, or it does not fit `like` though it has the same tokenizer.
        """
        model = super().load(checkpoint, labels, like, **options)
        check_causal(model)
        if not keeps_apart(model):
            model.encode = replace(_tokens(model), packs=False)
        if like and _same_tokens(_tokens(model), _tokens(like)):
            check_fits(model, like)
            model.encode = replace(_tokens(model), max_length=_tokens(like).max_length)
        elif like:
            model.encode = replace(_tokens(model), prefix=OWN)
        return model

    def own_encoder(self, checkpoint: Checkpoint, like: Model, **options: Any) -> TokensEncoder | None:
        """The encoder of a student whose tokens are not its teacher's, without its weights; None where they are."""
        from transformers import AutoConfig

        if checkpoint.is_factory:
            return None
        where = open_folder(checkpoint)
        with reading_weights(checkpoint), quiet_transformers():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
            check_kind(config, self.word, checkpoint)
            with torch.device("meta"):
                empty = model_class(self.word).from_config(config, trust_remote_code=False)
            encode = self.encoder(self.open_tool(where), empty, checkpoint, **options)
        assert isinstance(encode, TokensEncoder)
        return None if _same_tokens(encode, _tokens(like)) else replace(encode, prefix=OWN)

    def read(self, outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Outputs (P, T, V) at each token that has a next one: (R, V)."""
        return outputs.flatten(0, 1)[tensors["places"]]

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """Read `text`, and `prompt` where there is one; to judge, or `choices` and the number of the right `answer`."""
        parts = ("text", "prompt", "choices", "answer")
        asked = load_examples(source, (), columns, label=None, optional=parts)
        table: Any = asked.table
        if {"choices", "answer"} <= set(table.column_names):
            if judging:
                return asked
            if "text" not in table.column_names:
                raise InputError(
                    f"{asked.name} asks questions with choices, which judge and teach nothing; give text to learn, or "
                    "prompt and text, and such questions as data.eval"
                )
        return load_examples(source, self.features, columns, label=None, optional=("prompt",))

    def checked(
        self, examples: Examples, names: tuple[str, ...], *, encode: Encoder | None = None, judging: bool = False
    ) -> Examples:
        """The examples as pieces, with their tokens; labels (R,) are the next tokens. See `Task.checked`.

        Columns beside the source's: `tokens`, and `document`, the number of the text that a piece is of.

        Raises:
            InputError: a text holds less than two tokens.
        """
        assert isinstance(encode, TokensEncoder)
        if judging:
            check_not_empty(examples)
        return pieces_of(examples, encode)

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """By the next tokens of texts, or by the likeliest of several choices; see `next_tokens.py`.

        Where one of the models has a tokenizer of its own, by the bytes of texts; see `per_byte.py`.
        """
        if CHOICE in examples.rows([0]):
            return judge_choices(mine, teacher, examples, truncated)
        by = judge_bytes if isinstance(examples.table, Between) else judge_tokens
        return by(mine, teacher, examples, truncated)


def keeps_apart(model: Model) -> bool:
    """Whether a model sees nothing of one example in another of the same row: packed they give what each gives alone.

    A model without positions, or with a state that runs on, does not.
    """
    if "position_ids" not in model.input_names:
        return False
    device = next(model.core.parameters()).device
    with torch.inference_mode():
        alone, packed = (model.answers(model.tensors({"tokens": [[0, 1, 2]] * n}, device)) for n in (1, 2))
    return bool(torch.allclose(alone.repeat(2, 1), packed, rtol=1e-3, atol=1e-3))


def check_causal(model: Model) -> None:
    """Refuse a model whose tokens see those that come after them: it would read what it is to predict.

    Raises:
        InputError: they do, as an encoder's.
    """
    if isinstance(model.core, OnnxModule):
        return
    device = next(model.core.parameters()).device
    with torch.inference_mode():
        one, other = (model.answers(model.tensors({"tokens": [[0, 1, last, 1]]}, device))[:2] for last in (0, 2))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        kind = getattr(model.core.config, "model_type", "model")
        raise InputError(
            f"{model.checkpoint} is a {kind} whose tokens see those after them, as an encoder's do; give a decoder, "
            "such as a GPT-2 or a Llama"
        )


def check_fits(model: Model, teacher: Model) -> None:
    """Refuse a student with its teacher's tokenizer and another number of outputs, or less room for a text.

    Raises:
        InputError: it has.
    """
    ours, theirs = (_vocabulary(one.core) for one in (model, teacher))
    if ours != theirs and None not in (ours, theirs):
        raise InputError(
            f"{model.checkpoint} has {ours} outputs and {teacher.checkpoint} {theirs}, with one tokenizer; give the "
            f"student as many, by resize_token_embeddings({theirs})"
        )
    if _tokens(model).max_length < _tokens(teacher).max_length:
        raise InputError(
            f"{model.checkpoint} has positions for {_tokens(model).max_length} tokens, and texts are read in pieces of "
            f"{_tokens(teacher).max_length}; give data.max_length: {_tokens(model).max_length}"
        )


def check_tokenizer(model: Model, teacher: Model) -> None:
    """Refuse a model whose tokens are not the teacher's.

    Raises:
        InputError: it has another tokenizer, or reads texts of another length.
    """
    ours, theirs = (replace(_tokens(one), packs=True) for one in (model, teacher))
    if not ours.same_as(theirs):
        raise InputError(
            f"{model.checkpoint} has another tokenizer than {teacher.checkpoint}, so that its tokens are others; give "
            "models of one tokenizer"
        )


def _vocabulary(core: Any) -> int | None:
    """How many tokens a transformers model has; None for a module of one's own."""
    found: int | None = getattr(getattr(core, "config", None), "vocab_size", None)
    return found


def _same_tokens(one: TokensEncoder, other: TokensEncoder) -> bool:
    """Whether two encoders have one tokenizer; lengths may differ."""
    alike = replace(one, max_length=other.max_length, pad_to=other.pad_to, packs=other.packs)
    return alike.same_as(other)


def _tokens(model: Model) -> TokensEncoder:
    """A model's encoder."""
    assert isinstance(model.encode, TokensEncoder)
    return model.encode
