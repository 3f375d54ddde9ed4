"""Real checkpoints through the road, when they are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from potstill.pipeline import cli
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import load_examples
from potstill.validate.predictor import TorchPredictor, best_device
from potstill.validate.task import TASKS
from tests.predicted import predicted

pytestmark = pytest.mark.data
ROOT = Path(__file__).resolve().parents[2]


def test_the_published_cifar_resnets_load_and_score_as_published(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    examples = load_examples(str(real_data / "cifar10" / "test.npz"), ("x",), {})
    weights = real_data / "cifar10" / "resnet20-12fca82f.th"
    model = TASKS["module"].load(Checkpoint("examples.cifar10.model:resnet20", weights), example=examples.rows([0]))
    assert model.parameters == 269_722
    logits = predicted(TorchPredictor(model, "resnet20", best_device()), examples)
    assert (logits.argmax(axis=1) == examples.labels).mean() == pytest.approx(0.915, abs=0.001)


@pytest.fixture(scope="module")
def sst2_package(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SST-2 teacher as an int8 package for a laptop."""
    out, sst2 = tmp_path_factory.mktemp("sst2") / "out", real_data / "sst2"
    data = ["--calibrate", sst2 / "train.tsv", "--eval", sst2 / "dev.tsv", "--columns", "text=sentence"]
    words = [
        "export",
        real_data / "sst2-teacher",
        "--target",
        "laptop-x86-vnni",
        *data,
        "--max-drop",
        "1pp",
        "--out",
        out,
    ]
    assert cli.call([str(word) for word in words]) == 0
    return out / "packages" / "laptop-x86-vnni"


@pytest.mark.slow
def test_the_sst2_teacher_in_int8(sst2_package: Path) -> None:
    manifest = json.loads((sst2_package / "manifest.json").read_text())
    card = manifest["scorecard"]
    assert card["teacher_value"] == pytest.approx(0.898, abs=0.001)
    assert card["difference"] > -0.01
    assert card["agreement"] > 0.97
    assert manifest["quantization"]["left_float"] == 0
    assert manifest["model_bytes"] < 25e6


CLIENT = """
import json, sys
import numpy as np
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer
folder, out = sys.argv[1:3]
texts = json.loads(sys.stdin.read())
model, tokenizer = ORTModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
logits = []
for text in texts:
    encoded = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
    logits.append(model(**encoded).logits[0].tolist())
json.dump({"logits": logits, "labels": model.config.id2label}, open(out, "w"))
"""


@pytest.mark.slow
def test_optimum_opens_the_package_and_predicts_the_same(sst2_package: Path, real_data: Path, tmp_path: Path) -> None:
    """`ORTModelForSequenceClassification` wants an older transformers, so it runs in an environment of its own."""
    python = ROOT / ".venv-optimum" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv-optimum")], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "optimum-onnx==0.1.0", "onnxruntime==1.31.1", "transformers==4.57.6"], check=True)
    examples = load_examples(str(real_data / "sst2" / "dev.tsv"), ("text",), {"text": "sentence"})
    texts = examples.rows(range(200))["text"]
    subprocess.run(
        [str(python), "-c", CLIENT, str(sst2_package), str(tmp_path / "out.json")],
        input=json.dumps(list(texts)), text=True, check=True, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    theirs = json.loads((tmp_path / "out.json").read_text())
    assert theirs["labels"] == {"0": "negative", "1": "positive"}

    from transformers import AutoTokenizer

    from potstill.validate.encoder import TextEncoder
    from potstill.validate.predictor import OnnxPredictor

    encode = TextEncoder(AutoTokenizer.from_pretrained(sst2_package), 128)
    ours = OnnxPredictor(sst2_package / "model.onnx", encode, "the package")(examples.rows(range(200)))
    np.testing.assert_allclose(np.array(theirs["logits"]), ours, atol=1e-4)
