"""What a search's files are held to."""

from pathlib import Path
from typing import Any

import pytest

from potstill.export import package
from potstill.targets.target import ModelForm, load_target
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
    _, found = package._judging(lambda *_: (nothing, held), nothing, target)(tmp_path / "model.onnx", ())
    assert found.passed is passes
    assert passes or "the model is 2 MB, and laptop-x86-vnni takes at most 1 MB" in found.checks[-1].reason
