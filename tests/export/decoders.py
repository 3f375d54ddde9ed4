"""Small language models with their graphs, as the tests of language packages share them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import story_tokenizer

WORDS = 24
TEXTS = [[1, 5, 7, 3, 9, 4, 11, 8, 6], [1, 4, 4, 8, 12, 3], [1, *range(3, 13)], [1, 6]]


def model(kind: str, **more: Any) -> Any:
    """An untrained model of a kind whose answers differ from token to token."""
    import transformers

    sizes = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
    config = {
        "llama": lambda: transformers.LlamaConfig(**{**sizes, **llama, **more}),
        "gpt2": lambda: transformers.GPT2Config(**sizes, n_embd=32, n_layer=1, n_head=2, n_positions=128),
        "mamba": lambda: transformers.MambaConfig(**sizes, hidden_size=32, num_hidden_layers=1, state_size=8),
        "rwkv": lambda: transformers.RwkvConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2),
    }[kind]()
    torch.manual_seed(0)
    core = AutoModelForCausalLM.from_config(config).eval()
    if kind == "mamba":  # its own start is so small that all tokens are alike
        with torch.no_grad():
            for parameter in core.parameters():
                parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    with torch.no_grad():
        core.get_output_embeddings().weight[2] = 0  # so that no text ends early
    return core


def saver(core: Any) -> Callable[[Path], None]:
    """What writes a model's checkpoint."""

    def save(folder: Path) -> None:
        core.save_pretrained(folder)
        story_tokenizer().save_pretrained(folder)

    return save


def continued(core: Any, prompt: list[int], tokens: int) -> list[int]:
    """What torch writes, by transformers' own loop."""
    given = torch.tensor([prompt])
    made = core.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return [int(one) for one in made[0, len(prompt) :]]
