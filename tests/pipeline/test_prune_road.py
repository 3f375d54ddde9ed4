"""The stage `prune` in a recipe, by the command line."""

import json
from pathlib import Path

import pytest

from potstill.pipeline.recipe import load_recipe
from potstill.pipeline.stages import STAGES
from potstill.validate.errors import InputError
from tests.program import called

HEAD = """
task: module
teacher: {checkpoint: test_prune_models:strided}
data: {train: %(arrays)s:train, eval: %(arrays)s:test}
stages:
"""


@pytest.fixture
def recipe(arrays: Path, tmp_path: Path) -> Path:
    """A network whose shortcut pads its channels, taught by itself."""
    (tmp_path / "test_prune_models.py").write_text(
        """
from torch import nn

class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 3, padding=1)
        self.outer, self.last = nn.Conv2d(16, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x.permute(0, 3, 1, 2) / 255).relu()
        x = nn.functional.pad(x, (0, 0, 0, 0, 2, 2)) + self.outer(self.inner(x).relu())
        return self.last(x.relu().mean(dim=(2, 3)))

def strided():
    return Strided()
"""
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        HEAD % {"arrays": arrays}
        + """  - prune: {channels: 0.5, rounds: 2, distill: {epochs: 1}}
  - distill: {epochs: 1}
targets: [laptop-x86-vnni]
profile: {runs: 5}
"""
    )
    return path


def test_a_pruned_module_walks_the_road(recipe: Path) -> None:
    out = recipe.parent / "out"
    said = called("run", recipe, "--out", out, cwd=recipe.parent)
    assert "20 of 36 channels cannot be pruned, and stayed" in " ".join(said.stdout.split())
    ledger = json.loads((out / "ledger.json").read_text())
    teacher, pruned, distilled, package = ledger["entries"]
    assert pruned["what"] == "50% of channels less, 2 rounds, 1 epoch"
    assert teacher["parameters"] - pruned["parameters"] == 8 * (8 * 9 + 1) + 8 * 12 * 9
    assert distilled["parameters"] == pruned["parameters"]
    record = json.loads((out / "student" / "potstill.json").read_text())
    assert record["factory"] == "test_prune_models:strided"
    assert record["reshaped"]["attributes"]["inner.groups"] == 1
    assert [stage["name"] for stage in record["stages"]] == ["prune", "distill"]
    assert package["scorecard"]["examples"] == 300
    assert package["size_bytes"] < teacher["size_bytes"]


def test_what_is_wrong_in_a_recipe_is_said_with_its_line(recipe: Path) -> None:
    text = recipe.read_text().replace("{epochs: 1}}", "{epoch: 1}}")
    recipe.write_text(text)
    with pytest.raises(InputError, match=r"line 6: stages.0.prune.distill.epoch: unknown key; did you mean 'epochs'\?"):
        load_recipe(recipe, stage_types=STAGES, target_names=["laptop-x86-vnni"])
    recipe.write_text(text.replace("0.5", "1.5").replace("{epoch: 1}}", "{epochs: 1}}"))
    with pytest.raises(InputError, match="line 6: stages.0.prune: channels must be above 0 and below 1, the share"):
        load_recipe(recipe, stage_types=STAGES, target_names=["laptop-x86-vnni"])
