"""What the tasks over texts share: the checkpoint's own tokenizer, and how long an input may be."""

from typing import Any

from torch import nn

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.pretrained import Pretrained


class OfText(Pretrained):
    """How a task over texts makes its encoder."""

    tool = "tokenizer"
    encode_by: type[TextEncoder] = TextEncoder

    def open_tool(self, folder: str) -> Any:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if "backend tokenizer" not in str(error):
                raise
            raise InputError(
                f"{folder} has no tokenizer (tokenizer.json); save the model's own there with "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            ) from error

    def encoder(  # type: ignore[override]  # a task's own options
        self, tool: Any, core: nn.Module, checkpoint: Checkpoint, max_length: int = 128
    ) -> TextEncoder:
        """See `Pretrained.encoder`; `max_length`: tokens kept of an example.

        Raises:
            InputError: the tokenizer is not a fast one.
        """
        if not getattr(tool, "is_fast", False):
            raise InputError(
                f"{checkpoint} has no fast tokenizer (tokenizer.json), which counts what it cuts off; "
                "save one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        return self.encode_by(tool, min(max_length, positions(core), tool.model_max_length))


def positions(core: nn.Module) -> int:
    """Tokens that a model has positions for; RoBERTa's first ones are taken by padding."""
    most = int(getattr(getattr(core, "config", None), "max_position_embeddings", None) or 2**30)
    for name, module in core.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return most - int(module.padding_idx) - 1
    return most
