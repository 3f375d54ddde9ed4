"""The models whose files are compared: trained checkpoints, their examples, and how they are had again.

sst2-teacher    a 6-layer BERT of MiniLM's shape, from `POTSTILL_DATA`; judged on SST-2's 872 dev sentences
sst2-student    3 of its layers, distilled by `potstill compress` on 8,000 sentences
resnet56        the published CIFAR-10 ResNet-56, from `POTSTILL_DATA`; judged on 1,000 test images
depthwise       a small MobileNetV2 trained on CIFAR-10 by `search_train.py`
vit             a transformers ViT of 0.8 M weights trained on scikit-learn's digits; judged on 597 of them

What is trained here lies in `runs/formats` (`runs/formats/quick`: shorter trainings), and is not trained again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.export.calibrate import calibration_indices
from potstill.pipeline.material import Material
from potstill.pipeline.recipe import build_recipe
from potstill.pipeline.stages import STAGES
from potstill.targets.target import target_names
from potstill.validate.examples import Examples

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data")).absolute()
TRAINED = 1200  # digits that the ViT learns from; the rest judge it


@dataclass(frozen=True)
class Case:
    """One checkpoint with its examples.

    Attributes:
        name: as in the table.
        task: the task's word.
        checkpoint: a folder, or `package.module:factory` with `weights`.
        calibrate, judge: sources of examples.
        columns: as `--columns` takes them.
        weights: of a factory.
    """

    name: str
    task: str
    checkpoint: str
    calibrate: str
    judge: str
    columns: str = ""
    weights: Path | None = None

    @property
    def words(self) -> list[str]:
        """What `potstill export` is told, but for targets and `--out`."""
        own = ["--weights", str(self.weights)] if self.weights else []
        columns = ["--columns", self.columns] if self.columns else []
        sets = ["--calibrate", self.calibrate, "--eval", self.judge]
        return [self.checkpoint, "--task", self.task, *own, *sets, *columns]

    @cached_property
    def material(self) -> Material:
        """The loaded model and examples, as `potstill export` loads them."""
        teacher = {"checkpoint": self.checkpoint} | ({"weights": str(self.weights)} if self.weights else {})
        data: dict[str, Any] = {"eval": self.judge, "calibrate": self.calibrate}
        if self.columns:
            data["columns"] = dict(pair.split("=") for pair in self.columns.split(","))
        mapping = {"task": self.task, "teacher": teacher, "data": data, "targets": ["laptop-x86-vnni"]}
        return Material(build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=Path.cwd()))

    @cached_property
    def calibration(self) -> Examples:
        """The examples that `potstill export` takes ranges from."""
        examples = self.material.measured
        assert examples
        return examples.take(calibration_indices(examples, 0).tolist(), "calibration")


def case(name: str, *, quick: bool) -> Case:
    """A case by its name; what is not there yet is trained."""
    cache = ROOT / "runs" / "formats" / ("quick" if quick else "")
    cache.mkdir(parents=True, exist_ok=True)
    return CASES[name](cache, quick)


def _teacher(_cache: Path, _quick: bool) -> Case:
    return _sst2("sst2-teacher", DATA / "sst2-teacher")


def _student(cache: Path, quick: bool) -> Case:
    place = cache / "sst2-student"
    if not place.is_dir():
        sentences, epochs = (1000, 1) if quick else (8000, 2)
        with tempfile.TemporaryDirectory() as folder:
            few, out = Path(folder, "few.tsv"), Path(folder, "out")
            with (DATA / "sst2" / "train.tsv").open() as lines:
                few.write_text("".join(next(lines) for _ in range(sentences + 1)))
            words = [str(DATA / "sst2-teacher"), "--task", "text-classification", "--train", str(few)]
            words += ["--eval", str(DATA / "sst2" / "dev.tsv"), "--columns", "text=sentence,label=label"]
            words += ["--student", "layers=3", "--epochs", str(epochs), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "potstill.pipeline.cli", "compress", *words], check=True)
            shutil.move(out / "student", place)
    return _sst2("sst2-student", place)


def _sst2(name: str, checkpoint: Path) -> Case:
    train, dev = (str(DATA / "sst2" / f"{part}.tsv") for part in ("train", "dev"))
    return Case(name, "text-classification", str(checkpoint), train, dev, "text=sentence,label=label")


def _resnet(_cache: Path, _quick: bool) -> Case:
    return _cifar10("resnet56", DATA / "cifar10" / "resnet56-4bfd9763.th")


def _depthwise(cache: Path, quick: bool) -> Case:
    weights = cache / "depthwise.safetensors"
    if not weights.is_file():
        script = str(Path(__file__).with_name("search_train.py"))
        words = [str(DATA / "cifar10"), str(weights), *(["1"] if quick else [])]
        subprocess.run([sys.executable, script, *words], check=True)
    return _cifar10("depthwise", weights)


def _cifar10(name: str, weights: Path) -> Case:
    calibrate, judge = (str(DATA / "cifar10" / f"{part}.npz") for part in ("train_lossless", "test"))
    return Case(name, "module", f"examples.cifar10.model:{name}", calibrate, judge, weights=weights)


def _vit(cache: Path, quick: bool) -> Case:
    place = cache / "vit"
    if not place.is_dir():
        aside = cache / "vit.aside"
        shutil.rmtree(aside, ignore_errors=True)
        _train_vit(aside, epochs=4 if quick else 15)
        aside.rename(place)
    parts = {part: str(place / "digits" / part) for part in ("train", "test")}
    return Case("vit", "image-classification", str(place / "model"), parts["train"], parts["test"])


def _train_vit(folder: Path, epochs: int) -> None:
    """Write the digits as folders of PNGs, and a ViT that was trained on the first `TRAINED` of them."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pictures = [Image.fromarray((pixels[i] * 255 / 16).astype(np.uint8).reshape(8, 8)).convert("RGB") for i in order]
    for index, picture in enumerate(pictures):
        part = "train" if index < TRAINED else "test"
        place = folder / "digits" / part / str(labels[order[index]])
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{index}.png")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "intermediate_size": 512, "hidden_dropout_prob": 0.1}
    names = {i: str(i) for i in range(10)}
    config = ViTConfig(**shape, id2label=names, label2id={name: i for i, name in names.items()})
    model, processor = ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32})
    x = processor(images=pictures[:TRAINED], return_tensors="pt")["pixel_values"]
    y = torch.from_numpy(labels[order[:TRAINED]])
    optimizer, steps = torch.optim.AdamW(model.parameters(), weight_decay=0.05), TRAINED // 50 * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(TRAINED).split(50):
            model(pixel_values=x[index], labels=y[index]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


CASES: dict[str, Callable[[Path, bool], Case]] = {
    "sst2-teacher": _teacher,
    "sst2-student": _student,
    "resnet56": _resnet,
    "depthwise": _depthwise,
    "vit": _vit,
}
