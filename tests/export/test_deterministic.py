"""The same checkpoint gives the same files: in another process, with another hash seed, in another folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("exporting.py")


def files(folder: Path, seed: str, task: str, checkpoint: Path, data: Path, column: str) -> list[str]:
    """Name and hash of each file that a process of its own writes, with a copy of the checkpoint."""
    (folder / "out").mkdir(parents=True)
    if checkpoint.is_dir():
        shutil.copytree(checkpoint, folder / "copy")
    told = [task, str(folder / "copy"), str(data), str(folder / "out"), *([column] if column else [])]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *told], cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("task", "teacher", "data", "column"),
    [
        ("text-classification", "text_teacher", "texts", "sentence"),
        ("image-classification", "image_teacher", "pictures", ""),
        ("own", "", "", ""),
        ("own-recurrent", "", "", ""),
    ],
)
def test_two_processes_write_the_same(
    task: str, teacher: str, data: str, column: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(teacher) if teacher else tmp_path / "none"
    examples = request.getfixturevalue(data)["train"] if data else tmp_path / "none"
    first, second = (
        files(tmp_path / name, seed, task, checkpoint, examples, column) for name, seed in (("a", "1"), ("b/c", "77"))
    )
    assert first == second
    assert len(first) == (4 if task == "own" else 5)
    assert len({one.partition("=")[2] for one in first}) == len(first)
