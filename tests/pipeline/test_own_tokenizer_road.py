"""A run whose student has a tokenizer of its own, and one whose student lost a part of the teacher's vocabulary."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.pipeline.cli import call
from tests.byte_tokenizers import byte_tokenizer, save_small
from tests.conftest import stories, story_tokenizer

TARGET = "laptop-x86-vnni"


def walked(folder: Path, recipe: str, code: int = 0) -> dict[str, Any]:
    (folder / "recipe.yaml").write_text(recipe)
    assert call(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == code
    ledger: dict[str, Any] = {}
    if (folder / "out" / "ledger.json").is_file():
        ledger = json.loads((folder / "out" / "ledger.json").read_text())
    return ledger


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("student"), byte_tokenizer(stories(80, 1), 290), 128)


def test_a_student_that_spells_what_the_teacher_says_in_words(
    story_teacher: Path, story_files: dict[str, Path], student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = walked(
        tmp_path,
        f"""
task: text-generation
teacher: {story_teacher}
data: {{train: {story_files["train"]}, eval: {story_files["eval"]}, shifted: {story_files["train"]}}}
student: {{checkpoint: {student}}}
stages: [{{distill: {{epochs: 2, learning_rate: 1e-2, batch_size: 8, losses: {{hard: 1, uld: 0.2}}}}}}]
gate: {{max_drop: 90pp, max_perplexity_rise: 900%}}
""",
    )
    cards = [entry["scorecard"] for entry in ledger["entries"]]
    assert [card["metric"] for card in cards] == ["probability of a byte"] * 3
    assert [card["agreement"] for card in cards] == [None] * 3
    bits = [card["perplexity"]["bits_per_byte"] for card in cards]
    assert bits[0] < bits[2] < bits[1]
    assert len({card["perplexity"]["tokens"] for card in cards}) == 1
    step = ledger["entries"][2]["step"]
    assert step["teacher_value"] == pytest.approx(cards[1]["value"])
    assert step["perplexity"]["tokens"] == cards[2]["perplexity"]["tokens"]
    assert ledger["entries"][2]["shifts"][0]["scorecard"]["metric"] == "probability of a byte"
    assert any(
        "The student has a tokenizer of its own: it is judged by the probab" in one for one in ledger["warnings"]
    )
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"{bits[2]:.3f} bits a byte" in report
    assert "None" not in report.split("<body>")[1]
    capsys.readouterr()


def test_a_limit_on_tokens_is_refused_before_anything_is_trained(
    story_teacher: Path, story_files: dict[str, Path], student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = f"""
task: text-generation
teacher: {story_teacher}
data: {{train: {story_files["train"]}, eval: {story_files["eval"]}}}
student: {{checkpoint: {student}}}
stages: [distill]
gate: {{max_drop: 90pp, min_agreement: 90%}}
"""
    walked(tmp_path, recipe, 2)
    assert "gate.min_agreement: probability of a byte has none; leave it out" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not list((tmp_path / "out" / "stages").glob("1-student*"))


def cut(story_teacher: Path, eval_file: Path, folder: Path, more: str = "") -> dict[str, Any]:
    """The ledger of a run that cuts the vocabulary to the words of some stories."""
    texts = [text for text in stories(600, 2) if "ann" not in text and "old" not in text]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return walked(
        folder,
        f"""
task: text-generation
teacher: {story_teacher}
data: {{train: {folder / "few.jsonl"}, eval: {eval_file}}}
student: {{vocabulary: used, layers: 3}}
stages: [{{distill: {{epochs: 5, learning_rate: 3e-3, batch_size: 4}}}}]
{more}""",
    )


def test_a_vocabulary_is_cut(story_teacher: Path, story_files: dict[str, Path], tmp_path: Path) -> None:
    """What the teacher gives to the words that are gone is told: by its own softmax, over all predicted words."""
    ledger = cut(story_teacher, story_files["eval"], tmp_path)
    told = next(one for one in ledger["warnings"] if one.startswith("The student has 12 of the teacher's tokens"))
    core, tokenizer = AutoModelForCausalLM.from_pretrained(story_teacher).eval(), story_tokenizer()
    gone, left = tokenizer.convert_tokens_to_ids(["ann", "likes", "old"]), []
    for line in story_files["eval"].read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            left += core(input_ids=ids).logits[0, :-1].softmax(1)[:, gone].sum(1).tolist()
    found = re.search(r"on eval.jsonl the teacher gives ([\d.]+)% of its probability to the others", told)
    assert found
    assert float(found[1]) == pytest.approx(100 * np.mean(left), abs=0.02)
    assert any("The student's vocabulary lacks " in one for one in ledger["warnings"])
    config = json.loads((tmp_path / "out" / "student" / "config.json").read_text())
    assert config["vocab_size"] == 12


@pytest.mark.slow
def test_a_cut_vocabulary_is_packed(story_teacher: Path, story_files: dict[str, Path], tmp_path: Path) -> None:
    from potstill.export.genai import generate
    from potstill.validate.decoder import greedy
    from potstill.validate.session import open_session

    more = f"targets: [{TARGET}]\nsearch: {{time: 0}}\nprofile: {{runs: 2}}"
    ledger = cut(story_teacher, story_files["eval"], tmp_path, more)
    package = tmp_path / "out" / "packages" / TARGET
    config = json.loads((package / "genai_config.json").read_text())["model"]
    tokenizer = json.loads((package / "tokenizer.json").read_text())
    assert config["vocab_size"] == len(tokenizer["model"]["vocab"]) == 12
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    prompt = [1, tokenizer["model"]["vocab"]["tom"]]
    assert generate(package, prompt, 10) == greedy(open_session(package / "model.onnx"), prompt, 10, ends=[2])
    cards = [entry["scorecard"] for entry in ledger["entries"]]
    assert cards[3]["perplexity"]["ratio"] == pytest.approx(cards[2]["perplexity"]["ratio"], rel=0.2)
