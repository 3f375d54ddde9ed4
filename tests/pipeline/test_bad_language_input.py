"""What a language model's recipe gets wrong, each told in one sentence with exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.pipeline.cli import call
from tests.byte_tokenizers import byte_tokenizer, save_small
from tests.conftest import stories, story_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 15}


def rows(folder: Path, *found: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found * 5))
    return str(folder / "rows.jsonl")


def saved(folder: Path, kind: str, **more: Any) -> str:
    """A small untrained model of a kind, with the stories' tokenizer."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL, **more)
    names = {"Bert": "BertLMHeadModel", "T5": "T5ForConditionalGeneration", "Llama": "LlamaForCausalLM"}
    getattr(transformers, names[kind])(config).save_pretrained(folder / kind)
    story_tokenizer().save_pretrained(folder / kind)
    return str(folder / kind)


def without(teacher: Path, folder: Path, *names: str) -> str:
    """The teacher's folder without some files."""
    copy = shutil.copytree(teacher, folder / "copy")
    for name in names:
        (copy / name).unlink(missing_ok=True)
    return str(copy)


def endless(teacher: Path, folder: Path) -> str:
    """A teacher whose tokenizer has no token that ends texts."""
    copy = Path(without(teacher, folder))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(copy)


CASES: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "column": (
        lambda f, t: {"data": {"train": rows(f, {"story": "tom"})}},
        "rows.jsonl has no column 'text'; known: story; say which columns to use",
    ),
    "empty": (
        lambda f, t: {"data": {"train": rows(f, {"text": "tom"}, {"text": ""})}},
        "rows.jsonl has no token to predict in row 2: ''; leave such texts out",
    ),
    "choices": (
        lambda f, t: {"data": {"train": rows(f, {"prompt": "a", "choices": ["b", "c"], "answer": 0})}},
        "rows.jsonl asks questions with choices, which judge and teach nothing; give text to learn",
    ),
    "end": (
        lambda f, t: {"teacher": endless(t, f), "data": {"train": rows(f, {"prompt": "tom", "text": "sees"})}},
        "the tokenizer names no token that ends texts, so that no answer to a prompt has an end; set eos_token",
    ),
    "tokenizer": (
        lambda f, t: {"teacher": without(t, f, "tokenizer.json", "tokenizer_config.json")},
        "copy has no tokenizer (tokenizer.json); save the model's own there with",
    ),
    "sequence to sequence": (
        lambda f, t: {"teacher": saved(f, "T5", d_model=16, d_kv=8, num_layers=1, num_heads=2)},
        "T5 is a t5, and transformers has no model of that kind for text-generation; give a checkpoint of a model for",
    ),
    "sequence to sequence student": (
        lambda f, t: {"student": {"checkpoint": saved(f, "T5", d_model=16, d_kv=8, num_layers=1, num_heads=2)}},
        "T5 is a t5, and transformers has no model of that kind for text-generation",
    ),
    "encoder": (
        lambda f, t: {"teacher": saved(f, "Bert")},
        "Bert is a bert whose tokens see those after them, as an encoder's do; give a decoder, such as a GPT-2 or a Ll",
    ),
    "encoder student": (
        lambda f, t: {"student": {"checkpoint": saved(f, "Bert")}},
        "Bert is a bert whose tokens see those after them",
    ),
    "length": (
        lambda f, t: {"data": {"max_length": 65}},
        "data.max_length is 65, and a text is read in pieces of 2 tokens to the 64 that",
    ),
    "one token": (lambda f, t: {"data": {"max_length": 1}}, "data.max_length is 1, and a text is read in pieces of 2"),
    "short student": (
        lambda f, t: {"student": {"checkpoint": saved(f, "Llama", max_position_embeddings=32)}},
        "Llama has positions for 32 tokens, and texts are read in pieces of 64; give data.max_length: 32",
    ),
    "vocabulary": (
        lambda f, t: {"student": {"checkpoint": saved(f, "Llama", max_position_embeddings=64)}, "more": 17},
        "llama 15, with one tokenizer; give the student as many, by resize_token_embeddings(15)",
    ),
    "few tokens": (
        lambda f, t: {
            "student": {"checkpoint": str(save_small(f / "s", byte_tokenizer(stories(9, 1), 280)))},
            "more": 99,
        },
        "tokens, and the model 99; give the tokenizer that it was trained with, or resize_token_embeddings",
    ),
    "views": (
        lambda f, t: {"stages": [{"distill": {"augment": ["flip"]}}]},
        "augment works on image arrays x, which the task 'text-generation' does not read",
    ),
    "kept tokens": (
        lambda f, t: {"student": {"vocabulary": 2}},
        "vocabulary=2: special tokens, single characters and bytes stay, and they alone are",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_told_in_a_sentence(
    case: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = CASES[case]
    recipe: dict[str, Any] = {
        "task": "text-generation", "teacher": str(story_teacher), "student": {"layers": 2},
        "stages": [{"distill": {"epochs": 1}}],
    }  # fmt: skip
    given = change(tmp_path, story_teacher)
    files = {"train": str(story_files["train"]), "eval": str(story_files["eval"])}
    recipe |= given | {"data": files | given.get("data", {})}
    if size := recipe.pop("more", None):
        from transformers import AutoModelForCausalLM

        folder = recipe["student"]["checkpoint"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(size)
        model.save_pretrained(folder)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    capsys.readouterr()
    assert call(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said, said
    assert "fault of ours" not in said
