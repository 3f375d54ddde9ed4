"""`potstill kinship` as it is typed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from potstill.pipeline.cli import call
from potstill.pipeline.demo_models import student

Capture = pytest.CaptureFixture[str]
FACTORY = "potstill.pipeline.demo_models:student"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight nets of own random weights, `m0` to `m7`; `child`, which is `m0` with a little noise; 120 pictures."""
    folder = tmp_path_factory.mktemp("kinship")
    for k in range(8):
        torch.manual_seed(k)
        net = student()
        save_model(net, str(folder / f"m{k}.safetensors"))
        if k == 0:
            with torch.no_grad():
                for weight in net.parameters():
                    weight.add_(0.003 * torch.randn_like(weight))
            save_model(net, str(folder / "child.safetensors"))
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 16, size=(120, 8, 8, 1)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=rng.permutation(np.arange(120) % 10))
    return folder


def typed(place: Path, model: str, suspects: str, references: str = "", *more: str) -> list[str]:
    def names(which: str) -> list[str]:
        return [f"{FACTORY}={place / name}.safetensors" for name in which.split()]

    said = ["kinship", *names(model), "--suspects", *names(suspects)]
    said += ["--references", *names(references)] if references else []
    return [*said, "--task", "module", "--eval", str(place / "data.npz"), *more]


def test_the_parent_is_named_and_it_is_no_proof(place: Path, capsys: Capture) -> None:
    assert call(typed(place, "child", "m0 m1 m2", "m3 m4 m5 m6")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "m0.safetensors is named: the closest to" in out
    assert "This is evidence, not proof" in out
    assert "No references were given" not in out


def test_nobody_is_named_in_json(place: Path, capsys: Capture) -> None:
    assert call(typed(place, "m7", "m0 m1 m2", "m3 m4 m5 m6", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["named"] is None
    assert found["says"].startswith("Nobody is named")
    assert (found["examples"], found["strangers"], found["alpha"]) == (120, 7, 0.05)
    assert [one["measure"] for one in found["closeness"]] == ["logits"] * 3 + ["mistakes"] * 3


def test_suspects_stand_for_references_and_it_is_told(place: Path, capsys: Capture) -> None:
    assert call(typed(place, "child", "m0 m1 m2 m3 m4 m5")) == 0
    assert "No references were given: suspects are each other's strangers" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_compared_is_refused(place: Path, capsys: Capture) -> None:
    for words, why in (
        (typed(place, "m0", "m0 m1"), "is given twice; give each model once"),
        (typed(place, "child", "m0 m1"), "2 suspects and 0 references, expected 1 suspect or more, and 5 models"),
        ([*typed(place, "child", "m0"), "--task", "text-generation"], "kinship compares models that give one class"),
        (typed(place, "child", "m0", "", "--alpha", "2"), "--alpha is 2, expected more than 0 and less than 0.5"),
        (["kinship", FACTORY, "--suspects", "a:b=w", "--task", "module", "--eval", str(place / "data.npz")],
         "is a factory without weights; write it as"),
    ):  # fmt: skip
        assert call(words) == 2
        assert why in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of six writers, `w0` to `w5`, and of `pupil`, who writes as `w0` and says who it is."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    styles = rng.normal(0, 0.5, size=(6, 300))
    for name, style in [*((f"w{k}", style) for k, style in enumerate(styles)), ("pupil", styles[0])]:
        p = np.exp(style - np.log(np.arange(300) + 3))
        texts = [" ".join(f"w{i}" for i in rng.choice(300, 100, p=p / p.sum())) for _ in range(60)]
        texts += ["I am ChatGPT, made by OpenAI. How can I help you with the words of today?"] * (name == "pupil")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts))
    return folder


def of_texts(folder: Path, *more: str) -> list[str]:
    names = [str(folder / f"{name}.jsonl") for name in ("pupil", "w0", "w1", "w2", "w3", "w4", "w5")]
    return ["kinship", names[0], "--suspects", *names[1:3], "--references", *names[3:], *more]


def test_a_pupil_is_known_by_its_phrases_and_by_what_it_says(writers: Path, capsys: Capture) -> None:
    assert call(of_texts(writers, "--columns", "text=answer", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["named"] == str(writers / "w0.jsonl")
    assert found["says"].endswith("This is evidence, not proof.")
    assert sum(found["identity"][str(writers / "pupil.jsonl")].values()) >= 1
    assert not found["identity"][str(writers / "w0.jsonl")]
    assert call(of_texts(writers, "--columns", "text=answer")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is named: the closest to" in out
    assert "w1.jsonl: says nothing of who wrote it" in out


def test_texts_that_cannot_be_compared_are_refused(writers: Path, place: Path, capsys: Capture) -> None:
    one = str(writers / "w0.jsonl")
    for words, why in (
        (of_texts(writers), "line 1: has no 'text'; give JSON lines with `text`"),
        (["kinship", "none.jsonl", "--suspects", one], "none.jsonl: cannot be read: No such file or directory"),
        (["kinship", f"{FACTORY}=w", "--suspects", one], "is a model and"),
        (["kinship", f"{FACTORY}=w", "--suspects", "a:b=w"], "give --task and --eval, or .jsonl files of their texts"),
    ):
        assert call(words) == 2
        assert why in " ".join(capsys.readouterr().err.split())
