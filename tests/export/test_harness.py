"""A package in the Language Model Evaluation Harness, beside the checkpoint that it was made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from potstill.export.language import language_graph
from tests.conftest import stories, story_tokenizer

TASKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "bytes": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
        [{"text": text} for text in stories(6, 8)],
    ),
    "choice": (
        'output_type: multiple_choice\ndoc_to_text: "{{asked}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n",
        [
            {"asked": who, "choices": ["sees", "likes the", "finds"], "answer": i}
            for i, who in enumerate(("tom", "ann"))
        ],
    ),
    "writing": (
        'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "."\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 9, do_sample: false}\nmetric_list: [{metric: exact_match}]\n',
        [{"text": text[:8]} for text in stories(6, 8)],
    ),
}


def tasks(folder: Path) -> None:
    """Tasks of the harness over files here."""
    for name, (said, rows) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{said}")


def test_the_harness_says_of_a_package_what_it_says_of_its_checkpoint(
    story_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = pytest.importorskip("lm_eval", reason="the Language Model Evaluation Harness is not installed")
    manager_of = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks(tmp_path)
    core, tokenizer = AutoModelForCausalLM.from_pretrained(story_teacher), story_tokenizer()

    def save(folder: Path) -> None:
        core.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    package = tmp_path / "package"
    package.mkdir()
    language_graph(core, save, package / "model.onnx", [[1, 5, 9, 12]], 20)
    core.config.save_pretrained(package)
    tokenizer.save_pretrained(package)
    manager, said = manager_of(include_path=str(tmp_path), include_defaults=False), {}
    for name, options in (
        ("hf", {"pretrained": str(story_teacher), "device": "cpu", "dtype": "float32", "add_bos_token": False}),
        ("onnxruntime-genai", {"pretrained": str(package)}),
    ):
        found = harness.simple_evaluate(
            name, options, tasks=[*TASKS], task_manager=manager, batch_size=1, bootstrap_iters=0, log_samples=True
        )
        said[name] = {task: [one["resps"] for one in found["samples"][task]] for task in TASKS}
    torch, packed = said["hf"], said["onnxruntime-genai"]
    assert [one for ((one,),) in torch["bytes"]] == pytest.approx([one for ((one,),) in packed["bytes"]], abs=1e-3)
    for mine, theirs in zip(torch["choice"], packed["choice"], strict=True):
        assert [one for ((one, _),) in mine] == pytest.approx([one for ((one, _),) in theirs], abs=1e-3)
    assert [one for ((one,),) in torch["writing"]] == [one for ((one,),) in packed["writing"]]
    assert len({one for ((one,),) in torch["writing"]}) > 1
