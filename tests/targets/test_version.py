import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potstill.targets.device import Kind
from potstill.targets.local import Local
from potstill.targets.profile import compare, profile
from potstill.targets.target import Target, load_target
from potstill.targets.version import check_version
from potstill.validate.errors import InputError


def asks_for(oldest: str | None, older: str = "error") -> Target:
    target = load_target("laptop-x86-vnni")
    runtime = target.runtime.model_copy(update={"min_version": oldest, "older": older})
    return target.model_copy(update={"runtime": runtime})


@dataclass(frozen=True)
class Old:
    """This machine, with an ONNX Runtime that says another version."""

    version: str
    where: str = "old"
    kind: Kind = "measured"

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        reply = Local().ask(request, timeout_s=timeout_s)
        return reply | {"versions": {"onnxruntime": self.version}}


@pytest.mark.parametrize("there", ["1.24.2", "1.24.10", "1.25", "2.0.0", "1.24.2+cpu"])
def test_new_enough(there: str) -> None:
    assert check_version(asks_for("1.24.2"), {"onnxruntime": there}) == []
    assert check_version(asks_for("1.24.2"), {"onnxruntime-web": there}) == []
    assert check_version(asks_for(None), {"onnxruntime": "0.1"}) == []


@pytest.mark.parametrize("there", ["1.24.1", "1.9.0", "1.24.2rc1"])
def test_older(there: str) -> None:
    told = f"ONNX Runtime on the device is {there}, and laptop-x86-vnni needs 1.24.2 or newer; update it there"
    with pytest.raises(InputError) as failed:
        check_version(asks_for("1.24.2"), {"onnxruntime": there})
    assert str(failed.value) == f"{told}, or say `runtime: {{older: warning}}` in a target of your own"
    assert check_version(asks_for("1.24.2", "warning"), {"onnxruntime": there}) == [told]


@pytest.mark.parametrize("versions", [{}, {"onnxruntime": "newest"}])
def test_a_version_that_is_not_told(versions: dict[str, str]) -> None:
    told = "laptop-x86-vnni needs ONNX Runtime 1.24.2 or newer, and the device does not say which it has"
    assert check_version(asks_for("1.24.2"), versions) == [told]


def test_a_device_with_an_old_runtime(make_package: Callable[..., Path]) -> None:
    def package(name: str, older: str) -> Path:
        folder = make_package(name, width=8, layers=1)
        manifest = {"target": asks_for("1.24.2", older).model_dump(mode="json")}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    strict, lenient = package("strict", "error"), package("lenient", "warning")
    with pytest.raises(InputError, match="ONNX Runtime on the device is 1.20.0"):
        profile(strict, device=Old("1.20.0"), runs=1)
    with pytest.raises(InputError, match="ONNX Runtime on the device is 1.20.0"):
        compare([lenient, strict], device=Old("1.20.0"), runs=1)
    told = ["ONNX Runtime on the device is 1.20.0, and laptop-x86-vnni needs 1.24.2 or newer; update it there"]
    assert profile(lenient, device=Old("1.20.0"), runs=1).notes == told
    assert compare([lenient, lenient], device=Old("1.20.0"), runs=1).notes == told
    assert profile(strict, device=Old("1.31.1"), runs=1).notes == []
