"""Where an artefact came from: the record in `potstill.json` beside a checkpoint and in a package's manifest.

Its parts are chained (see `chained`), so that an edit is found and named; see docs/lineage.md.
"""

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.targets.host import here
from potstill.validate.checkpoint import RECORD, Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, sha256_each, sha256_file, sha256_json

if TYPE_CHECKING:
    from potstill.compress.api_settings import ApiTeacher
    from potstill.validate.task import Model  # torch comes with it

FORMAT = "potstill-lineage/2"
LEARNED_FROM = ("train", "unlabelled")  # the other sets judge or calibrate, and may change after the model was made
ROOMS = ("validate", "targets", "export", "compress", "pipeline")
VERSIONED = [
    "potstill",
    "torch",
    "torch-pruning",
    "torchvision",
    "pillow",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "optimum",
    "onnx",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnxscript",
    "numpy",
]


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on; `not installed` where it is not."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """This machine: system, processor, cores, and the accelerator that training uses."""
    import torch

    host = here()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": host.system,
        "arch": host.arch,
        "cpu": host.cpu,
        "cores": str(host.cores),
        "accelerator": accelerator,
    }


@cache
def code() -> dict[str, Any]:
    """Potstill itself: its version, the SHA-256 of its source files, the commit of a checkout, and Python's version.

    `commit` is None where the files are in no repository of git that holds them; `changed` says whether they differ
    from that commit.
    """
    rooms = [Path(next(iter(import_module(f"potstill.{room}").__path__))) for room in ROOMS]
    files = {
        f"{room.name}/{path.relative_to(room).as_posix()}": sha256_file(path)
        for room in rooms
        for path in sorted(room.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    own = Path(__file__).resolve()
    held = _git(own.parent, "ls-files", "--error-unmatch", own.name)  # not by a repository that Potstill is used in
    state = _git(own.parent, "status", "--porcelain", "--", *(f":/{room}" for room in ROOMS)) if held else None
    return {
        "version": _version("potstill"),
        "sha256": sha256_json(files),
        "commit": _git(own.parent, "rev-parse", "HEAD") if held else None,
        "changed": None if state is None else bool(state),
        "python": platform.python_version(),
    }


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it is not there, or has nothing to say of the folder."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def origin(checkpoint: Checkpoint, revision: str | None = None, api: "ApiTeacher | None" = None) -> dict[str, Any]:
    """What a model is that a run starts from.

    Args:
        checkpoint: of the model; a hub name is looked up in the hub's cache, where loading it has put its files.
        revision: the commit of a hub name.
        api: the service that wrote what is learned, where the model stands in its place.

    Returns:
        `source` (a name without folders of this machine), `sha256`, `files` (SHA-256 by name), `revision`, `licence`
        (None: unknown), `lineage` (its own record, where Potstill made it), and `api`.
    """
    folder, cached = checkpoint.folder, from_hub(checkpoint, revision)
    if cached:  # its name there is the commit
        folder, revision = cached, revision or cached.name
    beside = checkpoint.weights or checkpoint.onnx
    own = beside.parent if beside else folder
    made: dict[str, Any] = read_record(own / RECORD) if own and (own / RECORD).is_file() else {}
    return {
        "source": short(checkpoint.source),
        "sha256": checkpoint.digest(),
        "files": _files(checkpoint, folder),
        "revision": revision,
        "licence": None,
        "lineage": {name: made[name] for name in PARTS if name in made} if "format" in made else None,
        "api": {"service": api.host, "model": api.model} if api else None,
    }


def origin_of(model: "Model", api: "ApiTeacher | None" = None) -> dict[str, Any]:
    """`origin` of a loaded model."""
    return origin(model.checkpoint, revision_of(model), api)


def _files(checkpoint: Checkpoint, folder: Path | None) -> dict[str, str]:
    """SHA-256 by name of a checkpoint's files: all of a folder, the weights of a factory, an ONNX file and its data."""
    from potstill.validate.external_data import files_of

    if checkpoint.onnx:
        return {path.name: sha256_file(path) for path in files_of(checkpoint.onnx)}
    if checkpoint.weights:
        return {checkpoint.weights.name: sha256_file(checkpoint.weights)}
    return sha256_each(folder) if folder else {}


def from_hub(checkpoint: Checkpoint, revision: str | None) -> Path | None:
    """The folder in the hub's cache that a hub name was loaded from; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    if checkpoint.is_factory or checkpoint.onnx or checkpoint.folder:
        return None
    found = try_to_load_from_cache(checkpoint.source, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def short(source: str) -> str:
    """The last part of a path, or of a factory's module; other names as they are."""
    path = Path(source)
    return path.name if path.exists() else source.rpartition(".")[2] if ":" in source else source


PARTS = (
    "format", "task", "teacher", "other_teachers", "student", "data", "stages", "seed", "versions", "code", "machine",
    "made", "chain",
)  # fmt: skip


def lineage(
    task: str,
    seed: int,
    teacher: dict[str, Any],
    data: dict[str, Any],
    stages: list[dict[str, Any]],
    *,
    others: list[dict[str, Any]],
    student: dict[str, Any] | None,
) -> dict[str, Any]:
    """What made a model.

    Args:
        task: its word in a recipe.
        seed: of the recipe.
        teacher: see `origin`.
        data: for `train`, `eval`, `calibrate`, …: `name`, `sha256`, `examples`, `licence`.
        stages: each with `name`, `settings`, `seconds`; with `started`, `energy`, `code`, `machine`, and `files`, the
            SHA-256 of what it made, unless it was made before these were recorded.
        others: further teachers, each with its `weight`.
        student: the checkpoint that the student began as, where it was given one.
    """
    made = {
        "format": FORMAT,
        "task": task,
        "teacher": teacher,
        "other_teachers": others,
        "student": student,
        "data": data,
        "stages": stages,
        "seed": seed,
        "versions": versions(),
        "code": code(),
        "machine": machine(),
        "made": now(),
    }
    return made | {"chain": chained(made)}


def chained(record: dict[str, Any]) -> list[str]:
    """The links of a lineage: one for what the model began with, and one for each stage, over the one before.

    The first is the SHA-256 of teachers, student, task, seed and the data that was learned from, as canonical JSON. The
    sets that only judge and the licences are under the seal alone: a package may be judged anew, and what is known of a
    licence may grow, while the model stays the same.
    """
    models = [record["teacher"], *record["other_teachers"], *([record["student"]] if record["student"] else [])]
    begun = {
        "models": [{name: value for name, value in one.items() if name != "licence"} for one in models],
        "data": {name: record["data"][name]["sha256"] for name in LEARNED_FROM if name in record["data"]},
        "seed": record["seed"],
        "task": record["task"],
    }
    links = [sha256_json(begun)]
    for stage in record["stages"]:
        links.append(sha256_json({"previous": links[-1], "stage": stage}))
    return links


def read_record(file: Path) -> dict[str, Any]:
    """A lineage record or a manifest.

    Raises:
        InputError: it is no JSON, or holds no mapping.
    """
    try:
        found = read_json(file)
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}); take a whole copy of it") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, expected a mapping; take a whole copy of it")
    return found


def identity(model: "Model", seed: int) -> list[Any]:
    """What a loaded teacher is: its content; for a hub name the revision; for a factory without weights the seed."""
    checkpoint = model.checkpoint
    drawn = seed if checkpoint.is_factory and not checkpoint.weights else None
    return [checkpoint.source, checkpoint.digest(), revision_of(model), drawn]


def revision_of(model: "Model") -> str | None:
    """The commit of a model from the hub."""
    found: str | None = getattr(getattr(model.core, "config", None), "_commit_hash", None)
    return found
