import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from potstill.pipeline import yaml_lines
from potstill.pipeline.recipe import Recipe, build_recipe, load_recipe, parse_pairs
from potstill.validate.errors import InputError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Boil:
    """A stage that trains."""

    epochs: int = 3
    learning_rate: float = 1e-4
    kind: Literal["kl", "mse"] = "kl"
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1; given {self.epochs}")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Trim:
    """A stage that does not train."""

    needs_train: ClassVar[bool] = False
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise InputError(f"share must be at most 1; given {self.share}")


STAGES: dict[str, type[Any]] = {"boil": Boil, "trim": Trim}
TARGETS = ["laptop-x86-vnni", "phone-arm64-dotprod"]

GOOD = """\
task: text-classification
teacher: models/teacher
data:
  train: train.tsv
  eval: dev.tsv
  columns: {text: sentence, label: label}
  max_length: 128
student: {layers: 3, hidden: 192}
stages:
  - boil: {epochs: 5, learning_rate: 5e-5}
  - trim
gate: {max_drop: 2pp}
targets: [laptop-x86-vnni]
profile: {runs: 50}
seed: 7
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv", "digits.npz", "weights.th", "mine.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    source = folder / "recipe.yaml"
    source.write_text(text, encoding="utf-8")
    return load_recipe(source, stage_types=STAGES, target_names=TARGETS, overrides=overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError, match=r"^recipe.yaml: \d+ problems?\n") as caught:
        load(folder, text, *overrides)
    title, *found = str(caught.value).split("\n")
    assert title == f"recipe.yaml: {len(found)} problem{'s' if len(found) != 1 else ''}"
    return [line.removeprefix("  ") for line in found]


def build(base: Path, **changes: Any) -> Recipe:
    mapping = {"task": "module", "teacher": "org/name", "data": {"eval": "dev.tsv"}} | changes
    names = {"gate.max_drop": "--max-drop", "data.columns": "--columns", "stages.0.boil.epochs": "--epochs"}
    return build_recipe(mapping, stage_types=STAGES, target_names=TARGETS, base=base, option_names=names)


def test_a_good_recipe(folder: Path) -> None:
    recipe = load(folder, GOOD)
    assert recipe.teacher.checkpoint == str(folder / "models/teacher")
    assert recipe.data.train == recipe.data.calibration == str(folder / "train.tsv")
    assert recipe.student is not None
    assert (recipe.student.layers, recipe.student.hidden) == (3, 192)
    assert recipe.build_stages(STAGES) == [Boil(epochs=5, learning_rate=5e-5), Trim()]
    assert recipe.gate is not None
    assert recipe.gate.max_drop == "2pp"
    assert (recipe.profile.runs, recipe.profile.threads, recipe.seed) == (50, None, 7)


def test_the_least_recipe(folder: Path) -> None:
    recipe = load(folder, "{task: module, teacher: org/name, data: {eval: dev.tsv}}")
    assert (recipe.student, recipe.gate, recipe.stages, recipe.targets) == (None, None, (), ())


def test_round_trip(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = load(folder, GOOD, "boil.layers=[0, 2]", "teacher={checkpoint: a.b:make, weights: weights.th}")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert load(elsewhere, yaml_lines.dump(recipe.to_mapping())) == recipe
    assert build(elsewhere, **recipe.to_mapping()) == recipe


def test_dump_keeps_text_that_looks_like_a_number() -> None:
    data = {"a": "1e-3", "b": 1e-3, "c": "2024-01-01", "d": "yes", "e": 1e20, "f": None}
    assert yaml_lines.load(yaml_lines.dump(data)).data == data


def test_several_problems_at_once_in_the_order_of_their_lines(folder: Path) -> None:
    text = """\
# a comment
task: text-clasification
teacher: ./no-such-folder
data:
  trian: train.tsv
  eval: dve.tsv
  columns: {text: 5}
stages:
  - boil: {epochs: "3", learning_rat: 5e-5,
           kind: k}
  - biol
targets: [laptop-x86-vni, mien.yaml]
sede: 1
"""
    assert problems(folder, text) == [
        "line 2: task: expected 'text-classification', 'token-classification', 'question-answering', "
        "'feature-extraction', 'text-generation', 'image-classification', 'audio-classification' or 'module'; "
        "given the text 'text-clasification'; did you mean 'text-classification'?",
        "line 3: teacher.checkpoint: no such file or folder: './no-such-folder'",
        "line 5: data.trian: unknown key; did you mean 'train'?",
        "line 6: data.eval: no such file or folder: 'dve.tsv'; did you mean 'dev.tsv'?",
        "line 7: data.columns.text: expected text; given the number 5",
        "line 9: stages.0.boil.epochs: expected a whole number; given the text '3'",
        "line 9: stages.0.boil.learning_rat: unknown key; did you mean 'learning_rate'?",
        "line 9: stages.0.boil: the stage trains, and the recipe gives no data.train",
        "line 10: stages.0.boil.kind: expected 'kl' or 'mse'; given the text 'k'; did you mean 'kl'?",
        "line 11: stages.1.biol: unknown stage 'biol'; did you mean 'boil'?",
        "line 12: targets.0: unknown target 'laptop-x86-vni'; did you mean 'laptop-x86-vnni'?",
        "line 12: targets.1: no such file or folder: 'mien.yaml'; did you mean 'mine.yaml'?",
        "line 12: targets: an export measures ranges on examples: give data.calibrate or data.train",
        "line 13: sede: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 7", "seed: -1"), "line 15: seed: should be greater than or equal to 0; given the number -1"),
        (("seed: 7", "seed: 1.5"), "line 15: seed: expected a whole number; given the number 1.5"),
        (("seed: 7", "seed: true"), "line 15: seed: expected a whole number; given true"),
        (("max_drop: 2pp", "max_drop: [2pp]"), "line 12: gate.max_drop: expected text; given a list"),
        (("max_drop: 2pp", "max_drop: low"), "'low' is not a limit; write 1pp or 1%"),
        (("max_drop: 2pp", "max_drop: -1pp"), "'-1pp' is not a limit; write 1pp or 1%"),
        (("{max_drop: 2pp}", "{}"), "line 12: gate.max_drop: missing: this key is required"),
        (("[laptop-x86-vnni]", "laptop-x86-vnni"), "targets: expected a list; given the text 'laptop-x86-vnni'"),
        (("{runs: 50}", "50"), "line 14: profile: expected a mapping; given the number 50"),
        (("{runs: 50}", ""), "line 14: profile: expected a mapping; given nothing"),
        (("{runs: 50}", "{run: 50}"), "line 14: profile.run: unknown key; did you mean 'runs'?"),
        (("models/teacher", "7"), "line 2: teacher.checkpoint: expected text; given the number 7"),
        (("models/teacher", "a/b/c"), "line 2: teacher.checkpoint: no such file or folder: 'a/b/c'"),
        (("models/teacher", "{checkpoint: m:f, weights: weight.th}"), "teacher.weights: no such file or folder"),
        (("models/teacher", "{checkpoint: o/n, weights: weights.th}"), "weights go with package.module:factory only"),
        (("{layers: 3, hidden: 192}", "{}"), "vocabulary, rank) or a checkpoint; neither is given"),
        (("{layers: 3,", "{checkpoint: o/n,"), "vocabulary, rank) or a checkpoint; both are given"),
        (
            ("{layers: 3,", "{layers: 0,"),
            "line 8: student.layers: expected a number of layers from 1, or their indices",
        ),
        (
            ("{layers: 3,", "{layers: 3, pick: last,"),
            "line 8: student.pick: expected 'evenly', 'first' or 'importance'",
        ),
        (("{layers: 3,", "{layer: 3,"), "line 8: student.layer: unknown key; did you mean 'layers'?"),
        (("text-classification", "module"), "line 7: data.max_length: for text only; the task is module"),
        (("max_length: 128", "max_seconds: 3"), "line 7: data.max_seconds: for sounds only; the task is text-class"),
        (("max_length: 128", "max_seconds: 0"), "line 7: data.max_seconds: should be greater than 0"),
        (("max_length: 128", "slices: who"), "line 7: data.slices: expected a list; given the text 'who'"),
        (("max_length: 128", 'slices: [""]'), "line 7: data.slices.0: expected text that is not empty"),
        (("train: train.tsv", "unlabelled: train.tsv"), "data.unlabelled: goes beside labelled examples"),
        (
            ("gate: {max_drop: 2pp}", "search: {time: 5min}"),
            "line 12: search: searches where a gate is missed",
        ),
        (("train: train.tsv", "train: train.tsv\n  unlabelled: no.tsv"), "line 5: data.unlabelled: no such file"),
        (("epochs: 5", "epochs: 0"), "line 10: stages.0.boil: epochs must be at least 1; given 0"),
        (("  - trim", "  - trim: {share: 2}"), "line 11: stages.1.trim: share must be at most 1; given 2.0"),
        (("  - trim", "  - trim: 2"), "line 11: stages.1.trim: expected a mapping; given the number 2"),
        (("  - trim", "  - 5"), "line 11: stages.1: expected one stage, a name with its settings; given the number 5"),
        (
            ("  - trim", "  - {trim: , boil: }"),
            "line 11: stages.1: expected one stage, a name with its settings; given 2",
        ),
        (("train: train.tsv", 'train: ""'), "line 4: data.train: expected text that is not empty; given the text ''"),
        (("train: train.tsv", f"train: {'a' * 5000}"), "line 4: data.train: 'aaa"),
    ],
)
def test_each_message(folder: Path, change: tuple[str, str], message: str) -> None:
    assert any(message in found for found in problems(folder, GOOD.replace(*change)))


@pytest.mark.parametrize("drop", ["0.01", '"0.01"', "1", "1e-2"])
def test_a_bare_number_for_the_drop(folder: Path, drop: str) -> None:
    (found,) = problems(folder, GOOD.replace("2pp", drop))
    assert found.startswith("line 12: gate.max_drop: ")
    assert found.endswith(
        "has no unit: is it a point or a share? "
        "Write 1pp for one point of the metric, or 1% for a hundredth of the teacher's value"
    )


@pytest.mark.parametrize("drop", ["1pp", "1%", "0.5 pp"])
def test_a_drop_with_its_unit(folder: Path, drop: str) -> None:
    recipe = load(folder, GOOD, f"gate.max_drop={drop}")
    assert recipe.gate is not None
    assert recipe.gate.max_drop == drop


def test_missing_keys(folder: Path) -> None:
    assert problems(folder, "seed: 1\n") == [
        "line 1: task: missing: this key is required",
        "line 1: teacher: missing: this key is required",
        "line 1: data.eval: missing: this key is required",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "line 1: expected a mapping with task, teacher, data; the file is empty"),
        ("# only a comment\n", "line 1: expected a mapping with task, teacher, data; the file is empty"),
        ("- a\n", "line 1: expected a mapping with task, teacher, data; given a list"),
        ("just words\n", "line 1: expected a mapping with task, teacher, data; given the text 'just words'"),
    ],
)
def test_not_a_recipe(folder: Path, text: str, found: str) -> None:
    assert problems(folder, text) == [found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("task: module\ndata: [a\nseed: 1\n", "line 3: not valid YAML: "),
        ("task: module\nseed: \x07\n", "line 2: not valid YAML: a character that is not allowed, U+0007"),
        ("task: module\n? [a, b]\n: 1\n", "line 2: a key must be one word"),
        ("task: !!python/object:os.system x\n", "line 1: not valid YAML: could not determine a constructor"),
        ("a: &a\n  b: *a\n", "line 1: more than 32 levels"),
        ("seed: !!int x\n", "line 1: 'x' cannot be read"),
        ("[" * 5000, "nested too deep"),
    ],
)
def test_not_yaml(folder: Path, text: str, found: str) -> None:
    assert problems(folder, text)[0].startswith(found)


def test_aliases_that_multiply_are_refused() -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(yaml_lines.YamlError, match="10000 values"):
        yaml_lines.load(text)


def test_a_recipe_that_cannot_be_read(folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"recipe.yaml: not a text file in UTF-8"):
        load_recipe(folder / "recipe.yaml", stage_types=STAGES, target_names=TARGETS)
    with pytest.raises(InputError, match=r"cannot be read: No such file or directory; did you mean 'recipe.yaml'\?"):
        load_recipe(folder / "recip.yaml", stage_types=STAGES, target_names=TARGETS)


def test_a_key_given_twice(folder: Path) -> None:
    text = GOOD.replace("  max_length: 128\n", "  max_length: 128\n  eval: dev.tsv\n") + "seed: 8\nsede: 9\n"
    assert problems(folder, text) == [
        "line 8: data.eval: given twice, first in line 5",
        "line 17: seed: given twice, first in line 16",
        "line 18: sede: unknown key; did you mean 'seed'?",
    ]


def test_lines_and_scalars() -> None:
    data, lines, repeated = yaml_lines.load("a: 1e-3\nb:\n  - 5E-5\n  - {on: 2024-01-01}\nc: -1.5e+3\nd: e3\n")
    assert data == {"a": 1e-3, "b": [5e-5, {"on": "2024-01-01"}], "c": -1500.0, "d": "e3"}
    assert lines == {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "on"): 4, ("c",): 5, ("d",): 6}
    assert repeated == []


def test_overrides(folder: Path) -> None:
    recipe = load(
        folder,
        GOOD.replace("  - boil: {epochs: 5, learning_rate: 5e-5}", "  - boil"),
        "boil.epochs=9",
        "stages.0.boil.learning_rate=1e-3",
        "gate.max_drop=1%",
        "student=org/small",
        "targets.0=mine.yaml",
        "profile.threads=4",
    )
    assert recipe.build_stages(STAGES)[0] == Boil(epochs=9, learning_rate=1e-3)
    assert recipe.gate is not None
    assert recipe.gate.max_drop == "1%"
    assert recipe.student is not None
    assert recipe.student.checkpoint == "org/small"
    assert recipe.targets == (str(folder / "mine.yaml"),)
    assert (recipe.profile.runs, recipe.profile.threads) == (50, 4)
    assert load(folder, GOOD, "gate=").gate is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.trian=x.tsv", "--set data.trian: unknown key; did you mean 'train'?"),
        ("biol.epochs=1", "--set biol.epochs: unknown key; did you mean 'boil'?"),
        ("boil.epoch=1", "--set boil.epoch: unknown key; did you mean 'epochs'?"),
        ("boil.epochs=x", "--set boil.epochs: expected a whole number; given the text 'x'"),
        ("stages.5.boil.epochs=1", "--set stages.5.boil.epochs: stages has 2 entries, numbered from 0; given '5'"),
        ("seed.x=1", "--set seed.x: seed holds the number 7, which has no key 'x'"),
        ("seed", "--set seed: expected KEY=VALUE; given 'seed'"),
        ("seed=[1", "--set seed: not valid YAML: "),
        ("gate={max_drop: 1pp, max_drop: 2pp}", "--set gate: 'max_drop' is given twice in "),
        ("gate.max_drop=1", "--set gate.max_drop: '1' has no unit"),
        ("data={evil: dev.tsv}", "--set data evil: unknown key; did you mean 'eval'?"),
        ("data.eval=no.tsv", "--set data.eval: no such file or folder: 'no.tsv'"),
    ],
)
def test_a_wrong_override(folder: Path, override: str, message: str) -> None:
    assert any(found.startswith(message) for found in problems(folder, GOOD, override))


def test_the_short_form_of_an_override_needs_exactly_one_stage(folder: Path) -> None:
    twice = GOOD.replace("  - trim\n", "  - boil\n")
    assert problems(folder, twice, "boil.epochs=1", "trim.share=0.1") == [
        "--set boil.epochs: the recipe has 2 stages 'boil'; write stages.NUMBER.boil.epochs (from 0)",
        "--set trim.share: the recipe has 0 stages 'trim'; write stages.NUMBER.trim.share (from 0)",
    ]


def test_an_unknown_stage_is_one_problem(folder: Path) -> None:
    text = GOOD.replace("  - boil: {epochs: 5, learning_rate: 5e-5}\n  - trim\n", "  - roast: {epochs: 5}\n")
    assert problems(folder, text) == ["line 10: stages.0.roast: unknown stage 'roast'; known: boil, trim"]


def test_a_stage_that_does_not_train_needs_no_training_data(folder: Path) -> None:
    assert build(folder, stages=["trim"]).build_stages(STAGES) == [Trim()]


def test_npz_keys(folder: Path) -> None:
    assert load(folder, GOOD, "data.eval=digits.npz:x_test").data.eval == f"{folder / 'digits.npz'}:x_test"
    assert "no such file" in problems(folder, GOOD, "data.eval=digit.npz:x_test")[0]


def test_names_of_the_hub_and_factories_are_left_as_they_are(folder: Path) -> None:
    recipe = load(folder, GOOD, "teacher=org/name-2.1", "data.train=org/corpus_11.0", "student=package.module:make")
    assert (recipe.teacher.checkpoint, recipe.data.train) == ("org/name-2.1", "org/corpus_11.0")
    assert recipe.student is not None
    assert recipe.student.checkpoint == "package.module:make"


def test_paths_start_at_the_recipe_then_here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "dev.tsv").touch()
    (here / "only-here.tsv").touch()
    monkeypatch.chdir(here)
    recipe = load(folder, GOOD.replace("train: train.tsv", "train: only-here.tsv"))
    assert (recipe.data.eval, recipe.data.train) == (str(folder / "dev.tsv"), str(here / "only-here.tsv"))


def test_the_verbs_name_their_options(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^command line: 4 problems\n") as caught:
        build(
            folder,
            gate={"max_drop": 0.01},
            data={"eval": "dev.tsv", "train": Path("train.tsv"), "columns": {"text": 3}},
            stages=({"boil": {"epochs": 0.5}},),
            seed="x",
        )
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")[1:]] == [
        "  --epochs",
        "  --columns text",
        "  --max-drop",
        "  seed",
    ]


def test_the_verbs_leave_what_they_were_given(folder: Path) -> None:
    data = {"eval": "dev.tsv", "train": "train.tsv"}
    build(folder, data=data, stages=["boil"])
    assert data == {"eval": "dev.tsv", "train": "train.tsv"}


def test_pairs() -> None:
    assert parse_pairs("layers=3,hidden=192") == {"layers": 3, "hidden": 192}
    assert parse_pairs("text=sentence, label=1", as_text=True) == {"text": "sentence", "label": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers", "'layers': expected NAME=VALUE,NAME=VALUE; given 'layers'"),
        ("layers=3,", "'layers=3,': expected NAME=VALUE,NAME=VALUE; given ''"),
        ("layers=", "expected NAME=VALUE,NAME=VALUE; given 'layers='"),
        ("a=1,a=2", "'a=1,a=2': 'a' is given twice"),
        ("a=[1", "'a=[1': the value of 'a': not valid YAML"),
    ],
)
def test_wrong_pairs(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_pairs(text)


def test_the_import_is_light() -> None:
    code = "import sys, potstill.pipeline.recipe; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
