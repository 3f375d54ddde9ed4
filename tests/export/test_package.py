"""What a package's files are held to, and what it says of its target."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.export import package
from potstill.export.checked import NotEmulated, checked
from potstill.export.context import Context, EmulatedNpu
from potstill.export.package import Package, shipped_bytes
from potstill.export.quantize import Quantized
from potstill.targets.target import ModelForm, load_target
from potstill.validate.scorecard import Scorecard, paired
from potstill.validate.verdict import Check, verdict_of


@pytest.mark.parametrize(("most", "passes"), [(1, False), (3, True), (None, True)])
def test_a_searched_file_that_the_target_does_not_take_misses(
    most: int | None, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = ModelForm(shapes="dynamic", max_file_mb=most)
    target = load_target("laptop-x86-vnni").model_copy(update={"model": form})
    (tmp_path / "model.onnx").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(package, "_open", lambda *_: None)
    held = verdict_of([Check("max_drop", "pass", True, "it holds")])
    nothing: Any = None
    _, found = package._judging(lambda *_: (nothing, held), nothing, target)(tmp_path / "model.onnx", (), nothing)
    assert found.passed is passes
    assert passes or "the model is 2 MB, and laptop-x86-vnni takes at most 1 MB" in found.checks[-1].reason


@pytest.mark.parametrize(
    ("files", "largest"),
    [
        ({"model.onnx": 20}, 20),
        ({"model.onnx": 1, "model.onnx.data": 20}, 21),
        ({"model.onnx": 20, "model.ort": 23, "required_operators_and_types.config": 50}, 23),
        ({"model.onnx": 20, "model.ort": 19}, 20),
        ({"model.onnx": 20, "model_ctx.onnx": 2, "model_ctx_qnn.bin": 30, "tokenizer.json": 99}, 32),
    ],
)
def test_a_model_in_several_forms_has_the_size_of_the_largest(
    files: dict[str, int], largest: int, tmp_path: Path
) -> None:
    for name, size in files.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert shipped_bytes(tmp_path) == largest


def made(tmp_path: Path, **more: Any) -> Package:
    """A package of a Snapdragon phone, of which only some fields matter."""
    target, right = load_target("phone-snapdragon-v75"), np.ones(4, dtype=bool)
    card = Scorecard(metric="accuracy", data="made up", **paired(right, right))
    numbers = Quantized("float16", "test", weighted=1, left_float=0, calibration_examples=0)
    fields: dict[str, Any] = {"checked": checked(target), "min_version": target.runtime.min_version} | more
    return Package(tmp_path, target.id, numbers, card, None, model_bytes=1, seconds=1.0, **fields)


def test_a_package_says_which_runtime_its_device_needs(tmp_path: Path) -> None:
    """onnxruntime-qnn 2.7.0 asks for 1.24.2 in its metadata."""
    assert made(tmp_path).on_target() == ["The device needs ONNX Runtime 1.24.2 or newer."]
    assert made(tmp_path, min_version=None).on_target() == []


def test_what_went_wrong_on_the_target_is_a_finding(tmp_path: Path) -> None:
    within = EmulatedNpu(samples=4, difference=0.007, tolerance=0.02, same=4)
    context = Context(True, {"soc_model": "57"}, ("model_ctx.onnx",), {}, within)
    assert made(tmp_path).findings() == made(tmp_path, context=context).findings() == []
    beyond = replace(context, emulated=replace(within, difference=0.065, same=3))
    assert made(tmp_path, context=beyond).findings() == [
        "Emulated NPU, 4 golden samples: up to 6.5% of the largest logit from the CPU, more than the 2% that they "
        "allow; 3 with the same largest logit."
    ]
    crashed = checked(load_target("phone-snapdragon-v75"), NotEmulated("it crashed", crashed=True))
    assert made(tmp_path, checked=crashed).findings() == [crashed["note"]]
