"""Decoding against the memory's bandwidth: a Llama that fits in no cache, with random weights, in blocks."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.export.block_weights import Blocks, decoder_in_blocks
from potstill.export.language import language_graph
from potstill.targets.local import Local
from potstill.validate.decoder import with_past
from potstill.validate.external_data import read_graph, streamed_bytes
from potstill.validate.session import open_session

WIDTH, LAYERS, VOCABULARY = 2048, 4, 32_000
Formats = tuple[tuple[Literal[4, 8], int], ...]
FORMATS: Formats = ((4, 32), (4, 128), (8, 32))  # bits and weights in a block; the first is what a package has
WRITES = {"prompt": 128, "tokens": 64, "rounds": 3}


def decoding(formats: Formats = FORMATS) -> dict[str, Any]:
    """Tokens a second of a prompt and of decoding, and the share of the bandwidth reached, by format and threads.

    Timer: around each `session.run` of plain ONNX Runtime, in the agent's own process; bandwidth in that process.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=5632, num_hidden_layers=LAYERS,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    cores, rows = psutil.cpu_count(logical=False) or 1, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = np.random.default_rng(0).integers(2, VOCABULARY, size=32).tolist()
        (folder / "float").mkdir()

        def save(checkpoint: Path) -> None:
            model.save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)

        graph = language_graph(model, save, folder / "float" / "model.onnx", [text], 20)
        for bits, block in formats:
            decoder_in_blocks(folder / "float" / "model.onnx", folder / "model.onnx", Blocks(bits, block_size=block))
            streamed = streamed_bytes(read_graph(folder / "model.onnx")) / 1e6
            for threads in sorted({1, cores}):
                one = _decoded(folder, text, threads)
                share = streamed * one["decode_tokens_per_s"] / 1e3 / one["read_gb_s"]
                kind = {"bits": bits, "block": block, "threads": threads}
                rows.append({**kind, "streamed_mb": streamed, "of_bandwidth": share, **one})
    weights = sum(p.numel() for p in model.parameters())
    return {"weights": weights, "graph": graph.by, "cores": cores, "rows": rows}


def _decoded(folder: Path, text: list[int], threads: int) -> dict[str, float]:
    """What the agent says of the file, by medians."""
    feeds = with_past(open_session(folder / "model.onnx"), {"input_ids": np.array([text], dtype=np.int64)})
    inputs = {}
    for i, (name, array) in enumerate(feeds.items()):
        array.tofile(folder / f"{i}.bin")
        inputs[name] = {"file": folder / f"{i}.bin", "dtype": array.dtype.name, "shape": array.shape}
    spec = {"path": folder / "model.onnx", "inputs": inputs, "writes": WRITES}
    reply = Local().ask({"models": [spec], "threads": threads, "warmup": 1, "runs": 3})
    written = reply["models"][0]["written"]
    first, step = float(np.median(written["prompts_ms"])), float(np.median(written["steps_ms"]))
    return {
        "first_token_ms": first,
        "prompt_tokens_per_s": 1e3 * WRITES["prompt"] / first,
        "decode_tokens_per_s": 1e3 / step,
        "read_gb_s": written["read_gb_s"],
        "past_mb_per_1k": 1e3 * written["past_mb"] / written["past_tokens"],
    }
