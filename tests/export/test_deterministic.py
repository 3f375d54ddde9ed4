"""The same checkpoint gives the same files: in another process, with another hash seed, in another folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("exporting.py")
TASKS = {
    "text-classification": ("text_teacher", "texts", "sentence"),
    "image-classification": ("image_teacher", "pictures", ""),
    "own": ("", "", ""),
    "own-recurrent": ("", "", ""),
}
Files = dict[str, list[str]]


def files(folder: Path, seed: str, tasks: list[str], request: pytest.FixtureRequest) -> Files:
    """Name and hash of each file that a process of its own writes, with copies of the checkpoints."""
    wanted = []
    for task in tasks:
        teacher, data, column = TASKS[task]
        (folder / task / "out").mkdir(parents=True)
        if teacher:
            shutil.copytree(request.getfixturevalue(teacher), folder / task / "copy")
        examples = str(request.getfixturevalue(data)["train"]) if data else ""
        wanted.append([task, str(folder / task / "copy"), examples, str(folder / task / "out"), column])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(wanted)], cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: words[1:] for words in said if words and words[0] in TASKS}


@pytest.mark.parametrize(
    "tasks", [["text-classification", "own"], pytest.param(list(TASKS), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_two_processes_write_the_same(tasks: list[str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The second takes the tasks the other way."""
    first, second = files(tmp_path / "a", "1", tasks, request), files(tmp_path / "b/c", "77", tasks[::-1], request)
    assert first == second
    for task, found in first.items():
        assert len(found) == (5 if task == "own" else 6)  # the map of its modules among them
        assert len({one.partition("=")[2] for one in found}) == len(found)
