"""A recipe: what to compress, with which data, in which stages, for which targets.

The YAML file and the verbs of the command line build the same `Recipe` through the same checks. All problems
are reported at once: unknown keys, wrong types and missing files, each with its line or its option.

Values are validated as strict JSON: a whole number passes for a number, but no text passes for a number.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

from potstill.compress.settings import StudentSettings
from potstill.pipeline import yaml_lines
from potstill.pipeline.black_box import check_api, expand_api
from potstill.pipeline.limits import EmulateSpec, GateSpec, SearchSpec
from potstill.pipeline.lineage.said import LicencesSpec
from potstill.pipeline.sources import OtherTeacherSpec, TeacherSpec, Text
from potstill.pipeline.yaml_lines import Place, Problem, check, close_to, dotted, in_words, parse
from potstill.validate.checkpoint import is_factory, onnx_file
from potstill.validate.data import READERS, split_key
from potstill.validate.errors import InputError, did_you_mean

DATA_SUFFIXES = (*READERS, ".npz")

_Part = TypeVar("_Part", list[Any], dict[str, Any])
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOCAL = ("./", "../", "/", "~")

TaskWord = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "feature-extraction",
    "text-generation",
    "image-classification",
    "audio-classification",
    "module",
]
OF_CLASSES = ("text-classification", "image-classification", "audio-classification", "module")
OF_TEXT = (
    "text-classification", "token-classification", "question-answering", "feature-extraction", "text-generation",
)  # fmt: skip
Count = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSpec(_Model):
    """Where the examples are, and which columns hold what; `unlabelled` ones are learned from beside `train`.

    `prompts` are for a teacher behind an API, which writes what stands in the place of `train`; `slices` are columns
    of `eval` that it is sliced by; `shifted` is a second set that judges, and `perturb` names what else is done to the
    first; `max_length` is in tokens, for text; `max_seconds` for sounds.
    """

    train: Text | None = None
    prompts: Text | None = None
    unlabelled: Text | None = None
    eval: Text
    calibrate: Text | None = None
    columns: dict[str, Text] = {}
    slices: tuple[Text, ...] = ()
    shifted: Text | None = None
    perturb: tuple[Text, ...] = ()
    max_length: Count | None = None
    max_seconds: Annotated[float, Field(gt=0)] | None = None

    @property
    def calibration(self) -> str | None:
        """The examples that ranges are measured on: `calibrate`, else `train`."""
        return self.calibrate or self.train


class ProfileSpec(_Model):
    """How a package is measured: timed runs (by default as many as fill seconds), and threads (the target's)."""

    runs: Count | None = None
    threads: Count | None = None


class StageSpec(_Model):
    """A stage by its word in the recipe, with the settings that were given."""

    name: str
    settings: dict[str, Any] = {}


class Recipe(_Model):
    """A recipe that passed every check; the paths that were found are absolute."""

    task: TaskWord
    teacher: TeacherSpec
    other_teachers: tuple[OtherTeacherSpec, ...] = ()
    teacher_outputs: Path | None = None
    data: DataSpec
    student: StudentSettings | None = None
    stages: tuple[StageSpec, ...] = ()
    gate: GateSpec | None = None
    targets: tuple[Text, ...] = ()
    search: SearchSpec = SearchSpec()
    emulate: EmulateSpec = EmulateSpec()
    profile: ProfileSpec = ProfileSpec()
    licences: LicencesSpec = LicencesSpec()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def build_stages(self, stage_types: Mapping[str, type[Any]]) -> list[Any]:
        """The stages as objects, in order."""
        return [parse(stage_types[stage.name], stage.settings) for stage in self.stages]

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain data; written as YAML and loaded again, it gives an equal recipe."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return plain | {"stages": [{stage.name: copy.deepcopy(stage.settings)} for stage in self.stages]}


def load_recipe(
    source: Path,
    *,
    stage_types: Mapping[str, type[Any]],
    target_names: Sequence[str],
    overrides: Sequence[str] = (),
) -> Recipe:
    """Read a recipe file, with `key=value` overrides; raises one InputError that lists every problem.

    A stage type is a frozen pydantic dataclass; one that needs no training data says
    `needs_train: ClassVar[bool] = False`. Relative paths start at the recipe's folder, else at the current one.
    """
    try:
        document = yaml_lines.load(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}{_similar_file(source)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml_lines.YamlError as error:
        raise yaml_lines.as_error(source.name, [Problem(error.line, "", str(error))]) from None
    if not isinstance(document.data, dict):
        given = "the file is empty" if document.data is None else f"given {in_words(document.data)}"
        fault = f"expected a mapping with task, teacher, data; {given}"
        raise yaml_lines.as_error(source.name, [Problem(1, "", fault)])
    draft = _Draft(document.data, stage_types, target_names, source.parent)
    draft.lines, draft.problems = document.lines, document.repeated
    for override in overrides:
        draft.override(override)
    return draft.finish(source.name)


def build_recipe(
    mapping: Mapping[str, Any],
    *,
    stage_types: Mapping[str, type[Any]],
    target_names: Sequence[str],
    base: Path,
    option_names: Mapping[str, str] | None = None,
) -> Recipe:
    """Build a recipe from plain data with the checks of `load_recipe`.

    `option_names` maps a dotted key to the option that gave it (`{"gate.max_drop": "--max-drop"}`), for messages.
    """
    plain = json.loads(json.dumps(dict(mapping), default=str))  # a copy; tuples and paths in their plain form
    draft = _Draft(plain, stage_types, target_names, base)
    for key, option in (option_names or {}).items():
        draft.options[tuple(int(part) if part.isdecimal() else part for part in key.split("."))] = option
    return draft.finish("command line")


def parse_pairs(text: str, *, as_text: bool = False) -> dict[str, Any]:
    """`layers=3,hidden=192` as a mapping; values are read as YAML scalars, or kept `as_text`."""
    pairs: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise InputError(f"{text!r}: expected NAME=VALUE,NAME=VALUE; given {part.strip()!r}")
        if name in pairs:
            raise InputError(f"{text!r}: {name!r} is given twice")
        try:
            pairs[name] = value if as_text else yaml_lines.load(value).data
        except yaml_lines.YamlError as error:
            raise InputError(f"{text!r}: the value of {name!r}: {error}") from None
    return pairs


class _Draft:
    """A recipe while it is checked: plain data, where each value came from, and the problems so far."""

    def __init__(
        self, data: dict[str, Any], stage_types: Mapping[str, type[Any]], target_names: Sequence[str], base: Path
    ) -> None:
        self.data, self.stage_types, self.target_names, self.base = data, stage_types, target_names, base
        self.lines: dict[Place, int] = {}
        self.options: dict[Place, str] = {}
        self.problems: list[Problem] = []
        self.expand()

    def finish(self, title: str) -> Recipe:
        """Run every check, then give the recipe or raise all that was found."""
        self._resolve_files()
        self._check_together()
        if isinstance(self.data.get("stages"), list):
            self.data["stages"] = self._check_stages()
        recipe, faults = check(Recipe, self.data)
        for path, text in faults:
            self._report(path, text)
        if self.problems or not isinstance(recipe, Recipe):
            raise yaml_lines.as_error(title, self.problems)
        return recipe

    def expand(self) -> None:
        """Bring the short spellings to the long one; a draft that is expanded stays as it is."""
        if "teacher" in self.data and not isinstance(self.data["teacher"], dict):
            self.data["teacher"] = {"checkpoint": self.data["teacher"]}
        if isinstance(self.data.get("student"), str):
            self.data["student"] = {"checkpoint": self.data["student"]}
        others = self._part("other_teachers", list)
        others[:] = [{"checkpoint": one} if isinstance(one, str) else one for one in others]
        self.data.setdefault("data", {})
        stages = self._part("stages", list)
        for i, stage in enumerate(stages):
            words = {stage: None} if isinstance(stage, str) else stage
            if isinstance(words, dict):
                stages[i] = {name: {} if settings is None else settings for name, settings in words.items()}
        expand_api(self.data)

    def override(self, text: str) -> None:
        """Apply one `key=value`; what is wrong with the key is reported under `--set key`."""
        key, equals, value = text.partition("=")
        label = f"--set {key}"
        try:
            if not key or not equals:
                raise ValueError(f"expected KEY=VALUE; given {text!r}")
            document = yaml_lines.load(value)
            if document.repeated:
                raise ValueError(f"{document.repeated[0].where!r} is given twice in {value!r}")
            path = self._assign(self._locate(key.split(".")), document.data)
        except ValueError as error:
            self.problems.append(Problem(None, label, str(error)))
            return
        self.lines = {known: line for known, line in self.lines.items() if known[: len(path)] != path}
        self.options[path] = label
        self.expand()

    def _locate(self, keys: list[str]) -> list[str]:
        """The full path of a dotted key: `distill.epochs` is the `epochs` of the one stage `distill`."""
        if keys[0] in Recipe.model_fields:
            return keys
        if keys[0] not in self.stage_types:
            raise ValueError(f"unknown key{did_you_mean(keys[0], [*Recipe.model_fields, *self.stage_types])}")
        stages = self._part("stages", list)
        places = [i for i, stage in enumerate(stages) if isinstance(stage, dict) and keys[0] in stage]
        if len(places) != 1:
            exact = f"stages.NUMBER.{dotted(keys)} (from 0)"
            raise ValueError(f"the recipe has {len(places)} stages {keys[0]!r}; write {exact}")
        return ["stages", str(places[0]), *keys]

    def _assign(self, keys: list[str], value: Any) -> Place:
        """Set one value, with the mappings that lead to it; the path as it is in the data."""
        cursor: Any = self.data
        path: list[str | int] = []
        for depth, key in enumerate(keys):
            step: str | int = key
            if isinstance(cursor, list):
                if not key.isdecimal() or int(key) >= len(cursor):
                    raise ValueError(f"{dotted(path)} has {len(cursor)} entries, numbered from 0; given {key!r}")
                step = int(key)
            elif not isinstance(cursor, dict):
                raise ValueError(f"{dotted(path)} holds {in_words(cursor)}, which has no key {key!r}")
            path.append(step)
            if depth == len(keys) - 1:
                cursor[step] = value
            elif isinstance(cursor, dict) and cursor.get(step) is None:
                cursor[step] = {}
            cursor = cursor[step]
        return tuple(path)

    def _report(self, path: Place, text: str) -> None:
        """Note a problem under the option or the line of the value, or of the nearest mapping around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.options:
                where = f"{self.options[path[:end]]} {dotted(path[end:])}".strip()
                self.problems.append(Problem(None, where, text))
                return
            if path[:end] in self.lines:
                break
        self.problems.append(Problem(self.lines.get(path[:end]), dotted(path), text))

    def _part(self, key: str, kind: type[_Part]) -> _Part:
        """The list or mapping under a key; an empty one where something else stands."""
        part = self.data.get(key)
        return part if isinstance(part, kind) else kind()

    def _texts(self, section: str, *keys: str) -> Iterator[tuple[Place, dict[str, Any], str]]:
        """The texts under some keys of a mapping, or of each mapping of a list."""
        parts: list[tuple[Place, Any]] = [((section,), self._part(section, dict))]
        parts += [((section, i), part) for i, part in enumerate(self._part(section, list))]
        for place, part in parts:
            for key in keys:
                if isinstance(part, dict) and isinstance(value := part.get(key), str) and value:
                    yield (*place, key), part, value

    def _resolve_files(self) -> None:
        """Make the paths that exist absolute; report the ones that must exist and do not."""
        for owner in ("teacher", "other_teachers", "student"):
            for path, section, value in self._texts(owner, "checkpoint"):
                if not is_factory(value):
                    local = value.endswith(".onnx") or not _may_be_hub_name(value)
                    section["checkpoint"] = self._resolve(path, value, must_exist=local)
            for path, section, value in self._texts(owner, "weights", "preprocessing"):
                section[str(path[-1])] = self._resolve(path, value, must_exist=True)
        for path, section, value in self._texts(
            "data", "train", "unlabelled", "eval", "shifted", "calibrate", "prompts"
        ):
            file, key = split_key(value)
            looks_local = file.endswith(DATA_SUFFIXES) or bool(re.search(r"/[^/]*\.[A-Za-z]\w*$", file))
            found = self._resolve(path, file, must_exist=looks_local or not _may_be_hub_name(file))
            section[str(path[-1])] = found if key is None else f"{found}:{key}"
        targets = self._part("targets", list)
        for i, target in enumerate(targets):
            if target in targets[:i]:
                self._report(("targets", i), f"{target!r} is given twice")
            elif isinstance(target, str) and target.endswith(".yaml"):
                targets[i] = self._resolve(("targets", i), target, must_exist=True)
            elif isinstance(target, str) and target and target not in self.target_names:
                self._report(("targets", i), f"unknown target {target!r}{did_you_mean(target, [*self.target_names])}")

    def _resolve(self, path: Place, text: str, *, must_exist: bool) -> str:
        try:
            file = Path(text).expanduser()
            for place in (self.base / file, file):
                if place.exists():
                    return str(place.absolute())
        except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
            self._report(path, f"{text!r} cannot be looked up: {error}")
            return text
        if must_exist:
            self._report(path, f"no such file or folder: {text!r}{_similar_file(self.base / file)}")
        return text

    def _check_stages(self) -> list[dict[str, Any]]:
        """Check each stage against its type; the known ones in the long form."""
        good = []
        for i, stage in enumerate(self._part("stages", list)):
            if not isinstance(stage, dict) or len(stage) != 1:
                given = f"{len(stage)} names: {', '.join(stage)}" if isinstance(stage, dict) else in_words(stage)
                self._report(("stages", i), f"expected one stage, a name with its settings; given {given}")
            for name, settings in stage.items() if isinstance(stage, dict) else ():
                path = ("stages", i, name)
                if name not in self.stage_types:
                    self._report(path, f"unknown stage {name!r}{did_you_mean(name, [*self.stage_types])}")
                    continue
                for inner, text in check(self.stage_types[name], settings)[1]:
                    self._report((*path, *inner), text)
                if getattr(self.stage_types[name], "needs_train", True) and not self._learns():
                    self._report(path, "the stage trains, and the recipe gives no data.train")
                good.append({"name": name, "settings": settings if isinstance(settings, dict) else {}})
        return good

    def _check_together(self) -> None:
        """The rules that join two parts of a recipe."""
        data, task = self._part("data", dict), self.data.get("task")
        self._check_onnx()
        check_api(self.data, self._report)
        gate = self.data.get("gate")
        for name in ("max_size", "max_latency", "max_memory", "max_fallback"):
            if isinstance(gate, dict) and name in gate and not self.data.get("targets"):
                self._report(("gate", name), f"{name} is for packages, and the recipe names no targets")
        if self.data.get("targets") and not (data.get("calibrate") or self._learns()):
            self._report(("targets",), "an export measures ranges on examples: give data.calibrate or data.train")
        search = self.data.get("search")
        if isinstance(search, dict) and str(search.get("time", "0")) not in ("0", "0s", SearchSpec().time) and not gate:
            self._report(("search",), "searches where a gate is missed: give gate.max_drop (--max-drop) too")
        if data.get("unlabelled") and not data.get("train"):
            self._report(("data", "unlabelled"), "goes beside labelled examples: give data.train too")
        if data.get("slices") and task in get_args(TaskWord) and task not in OF_CLASSES:
            self._report(("data", "slices"), f"for tasks with one class for each example; the task is {task}")
        if data.get("max_length") is not None and task in get_args(TaskWord) and task not in OF_TEXT:
            self._report(("data", "max_length"), f"for text only; the task is {task}")
        if data.get("max_seconds") is not None and task in get_args(TaskWord) and task != "audio-classification":
            self._report(("data", "max_seconds"), f"for sounds only; the task is {task}")

    def _learns(self) -> bool:
        """Whether there is, or will be, something to learn from."""
        return bool(self._part("data", dict).get("train") or self._part("teacher", dict).get("api"))

    def _check_onnx(self) -> None:
        """An ONNX file can be packaged, and that alone."""
        for owner in ("teacher", "other_teachers", "student"):
            for path, _, value in self._texts(owner, "checkpoint"):
                if is_factory(value) or not onnx_file(value):
                    continue
                if owner != "teacher":
                    self._report(path, f"{value!r} is an ONNX file, which is judged against itself; give a checkpoint")
                elif self.data.get("stages") or self.data.get("student"):
                    self._report(
                        path, f"{value!r} is an ONNX file; distillation, pruning and students need a checkpoint"
                    )


def _may_be_hub_name(text: str) -> bool:
    return not text.startswith(_LOCAL) and _HUB_NAME.fullmatch(text) is not None


def _similar_file(file: Path) -> str:
    try:
        names = [other.name for other in file.parent.iterdir()]
    except OSError:
        return ""
    return close_to(file.name, names)
