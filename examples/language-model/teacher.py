"""A teacher to distil: a small Llama that learned Python from the source of the standard library.

    python examples/language-model/teacher.py --out runs/python-teacher --minutes 30

Writes `train.jsonl` and `eval.jsonl` (a source file a line, every twentieth judges), and `teacher/`, which
transformers opens. The source is Python's own, under the PSF licence; so is what it teaches.
"""

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LEFT_OUT = {"site-packages", "test", "tests", "encodings", "lib2to3", "idlelib", "ensurepip", "turtledemo", "idle_test"}
LENGTH, BATCH, RATE = 256, 16, 2e-3  # tokens, rows of as many, and the peak learning rate


def sources() -> Iterator[tuple[str, str]]:
    """The standard library's modules: name and text, in order; tests and tables of characters are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts) and not name.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield name.as_posix(), text


def write_corpus(folder: Path) -> list[str]:
    """Write `train.jsonl` and `eval.jsonl`; gives the texts to learn from. The hash of its name decides for a file."""
    parts: dict[str, list[str]] = {"train": [], "eval": []}
    for name, text in sources():
        judges = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        parts["eval" if judges else "train"].append(text)
    for part, texts in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return parts["train"]


def tokenizer_of(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich 2016; Radford 2019) learned from the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=2 * LENGTH
    )


def model_of(vocabulary: int, layers: int = 6) -> LlamaForCausalLM:
    """An untrained Llama, 256 wide; 6 layers and 4,096 tokens make 5.7 million weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2 * LENGTH, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def train(model: LlamaForCausalLM, tokens: torch.Tensor, seconds: float) -> float:
    """Train on one long row of tokens for a time, AdamW, a warm-up and a cosine over that time; gives the last loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    rng, start, loss = np.random.default_rng(0), time.monotonic(), math.inf
    with Progress(*Progress.get_default_columns(), "{task.fields[note]}") as bar:
        task = bar.add_task("teaching", total=seconds, note="")
        while (spent := time.monotonic() - start) < seconds:
            share = spent / seconds
            scale = min(1.0, share / 0.03 + 1e-3) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = RATE * scale
            at = rng.integers(len(tokens) - LENGTH, size=BATCH)
            rows = torch.stack([tokens[i : i + LENGTH] for i in at]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                found = model(input_ids=rows, labels=rows, use_cache=False).loss
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss = found.item()
            bar.update(task, completed=spent, note=f"loss {loss:.2f}")
    model.to("cpu").eval()
    return loss


def main() -> None:
    """Write the corpus and the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    texts = write_corpus(given.out)
    tokenizer = tokenizer_of(texts, 4096)
    tokens = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]])
    model = model_of(len(tokenizer))
    print(f"{len(texts)} files, {len(tokens):,} tokens, {sum(p.numel() for p in model.parameters()):,} weights")
    train(model, tokens, given.minutes * 60)
    model.save_pretrained(given.out / "teacher")
    tokenizer.save_pretrained(given.out / "teacher")


if __name__ == "__main__":
    main()
