"""Each kind of bad input: exit 2, one clear sentence, nothing lost, nothing left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.pipeline import cli

POTSTILL = str(Path(sys.executable).with_name("potstill"))


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Runs a command that must fail, and gives what it says on standard error."""

    def run(*words: object, code: int = 2, cwd: Path | None = None) -> str:
        if cwd:
            monkeypatch.chdir(cwd)
            monkeypatch.syspath_prepend(str(cwd))
        capsys.readouterr()
        found = cli.call([str(word) for word in words])
        said = capsys.readouterr().err
        assert found == code, said
        assert "Traceback" not in said
        return " ".join(said.split())

    yield run
    sys.modules.pop("models", None)


Potstill = Callable[..., str]


@pytest.fixture
def words(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> dict[str, object]:
    """A compress command that would work."""
    return {
        "teacher": text_teacher,
        "--task": "text-classification",
        "--train": texts["train"],
        "--eval": texts["eval"],
        "--columns": "text=sentence",
        "--student": "layers=1",
        "--epochs": "1",
        "--max-drop": "50pp",
        "--out": tmp_path / "out",
    }


def compress(potstill: Potstill, words: dict[str, object], **changes: object) -> str:
    """Compress with some words changed; `None` leaves one out."""
    words = words | {f"--{name.replace('_', '-')}": value for name, value in changes.items() if name != "teacher"}
    teacher = changes.get("teacher", words.pop("teacher"))
    words.pop("teacher", None)
    options = [part for name, value in words.items() if value is not None for part in (name, value)]
    return potstill("compress", teacher, *options)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"eval": "./none.tsv"}, "--eval"),
        ({"teacher": "./none"}, "./none"),
        ({"columns": "text=sentense"}, "did you mean 'sentence'"),
        ({"task": "text-clasification"}, "did you mean 'text-classification'"),
        ({"max_drop": "0.01"}, "is it a point or a share"),
        ({"student": "layer=3"}, "did you mean 'layers'"),
        ({"student": "layers=9"}, "the teacher has 4 layers"),
        ({"epochs": "0"}, "epochs must be above 0"),
        ({"epochs": "many"}, "epochs"),
    ],
)
def test_words_that_are_wrong(
    potstill: Potstill, words: dict[str, object], changes: dict[str, object], match: str
) -> None:
    assert match in compress(potstill, words, **changes)
    assert not list(Path(str(words["--out"])).glob("student"))


def test_all_problems_at_once(potstill: Potstill, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: text-clasification\nteacher: ./none\ndata:\n  trian: a.tsv\n  eval: ./b.tsv\n"
        "gate: {max_drop: 0.01}\ntargets: [phone]\n"
    )
    said = potstill("run", tmp_path / "recipe.yaml")
    for part in (
        "7 problems",
        "line 1: task",
        "line 2: teacher",
        "line 4: data.trian",
        "line 5: data.eval",
        "line 6: gate.max_drop",
        "line 7: targets",
    ):
        assert part in said


def test_an_unknown_target(potstill: Potstill, words: dict[str, object], tmp_path: Path) -> None:
    said = potstill(
        "export",
        words["teacher"],
        "--target",
        "phone-arm",
        "--calibrate",
        words["--train"],
        "--eval",
        words["--eval"],
        "--columns",
        "text=sentence",
        "--out",
        tmp_path / "out",
    )
    assert "did you mean 'phone-arm64'" in said
    assert "did you mean" in potstill("targets", "laptop-x86")


def test_calibration_on_the_evaluation_set(potstill: Potstill, words: dict[str, object], tmp_path: Path) -> None:
    said = potstill(
        "export",
        words["teacher"],
        "--target",
        "laptop-x86-vnni",
        "--calibrate",
        words["--eval"],
        "--eval",
        words["--eval"],
        "--columns",
        "text=sentence",
        "--out",
        tmp_path / "out",
    )
    assert "all of data.eval (200 examples) is in data.calibrate (eval.tsv) too" in said


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("", "is empty"),
        ("a good film\t1\nfine\t1\n", "holds one class only"),
        ("a good film\t1\nfine\t2\n", "has the label 2 in row 2; the model has 2 classes"),
    ],
)
def test_evaluation_sets_that_cannot_judge(
    potstill: Potstill, words: dict[str, object], tmp_path: Path, rows: str, match: str
) -> None:
    (tmp_path / "eval.tsv").write_text("sentence\tlabel\n" + rows)
    assert match in compress(potstill, words, eval=tmp_path / "eval.tsv")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_weights_that_are_not(potstill: Potstill, arrays: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 4))\n"
    )
    path = tmp_path / "w.th"
    torch.save(
        {"conv": torch.zeros(3)} if damage == "foreign" else {"state_dict": {"1.weight": torch.zeros(4, 432)}}, path
    )
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "pickle":
        torch.save({"state_dict": Path("/")}, path)
    said = potstill(
        "export",
        "models:net",
        "--weights",
        path,
        "--target",
        "laptop-x86-vnni",
        "--calibrate",
        f"{arrays}:train",
        "--eval",
        f"{arrays}:test",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert {"truncated": "cannot", "foreign": "does not fit", "pickle": "plain tensors"}[damage] in said


def test_logits_that_are_not_finite(potstill: Potstill, arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)).relu() / 0\ndef net(): return Net(432, 4)\n"
    )
    said = potstill(
        "export",
        "models:net",
        "--target",
        "laptop-x86-vnni",
        "--calibrate",
        f"{arrays}:train",
        "--eval",
        f"{arrays}:test",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert "gave logits that are not finite on 300 of 300 examples" in said


def test_a_student_of_other_classes(potstill: Potstill, arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\ndef four(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 4))\n"
        "def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 7))\n"
    )
    said = potstill(
        "compress",
        "models:four",
        "--task",
        "module",
        "--train",
        f"{arrays}:train",
        "--eval",
        f"{arrays}:test",
        "--student",
        "models:seven",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert "models:seven gives 7 classes, the teacher has 4" in said


def test_an_output_folder_that_holds_something_else(
    potstill: Potstill, words: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("my only copy")
    assert "holds something else" in compress(potstill, words)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder(potstill: Potstill, words: dict[str, object], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "potstill-run.json").write_text("{}")
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another run of potstill works in" in compress(potstill, words)


def start(words: dict[str, object]) -> subprocess.Popen[str]:
    options = [str(part) for name, value in words.items() if name != "teacher" for part in (name, value)]
    command = [POTSTILL, "compress", str(words["teacher"]), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def test_ctrl_c_and_the_same_command_goes_on(words: dict[str, object], tmp_path: Path) -> None:
    words = words | {"--epochs": "15"}
    stopped = start(words)
    while not list(tmp_path.glob("out/stages/.work-*/checkpoint-*/trainer_state.json")) and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=300)
    assert stopped.returncode == 130, said
    assert "the same command goes on where it was" in said
    assert not list(tmp_path.glob("out/stages/2-distill-*"))
    finished = start(words)
    _, said = finished.communicate(timeout=300)
    assert finished.returncode == 0, said
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("out/stages/.*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 24 MB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=False, capture_output=True
    ).returncode:
        pytest.skip("may not mount a small disk here")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up(potstill: Potstill, small_disk: Path, words: dict[str, object]) -> None:
    words = words | {"--out": small_disk / "out"}
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * ((24 << 20) - (128 << 10)))
    assert "of disk are needed and" in compress(potstill, words)
    filler.unlink()
    running = start(words | {"--epochs": "6"})  # filled while it works, after the estimate
    while not list(small_disk.glob("out/stages/0-teacher-*/record.json")) and running.poll() is None:
        time.sleep(0.005)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
    _, said = running.communicate(timeout=300)
    assert running.returncode == 2, said
    assert "the disk is full" in said
    filler.unlink()
    finished = start(words | {"--epochs": "6"})
    _, said = finished.communicate(timeout=300)
    assert finished.returncode == 0, said


def test_a_package_that_is_none(potstill: Potstill, tmp_path: Path) -> None:
    assert "give a package, the folder that `potstill export` writes" in potstill("profile", tmp_path)
    assert "none" in potstill("profile", tmp_path / "none")


def test_a_module_that_cannot_take_the_data(potstill: Potstill, arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("from torch import nn\ndef net(): return nn.Linear(5, 4)\n")
    said = potstill(
        "export",
        "models:net",
        "--target",
        "laptop-x86-vnni",
        "--calibrate",
        f"{arrays}:train",
        "--eval",
        f"{arrays}:test",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert "does not take x of shape (1, 12, 12, 3)" in said


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run([POTSTILL, "--debug", "profile", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_text_column_that_holds_numbers(potstill: Potstill, words: dict[str, object]) -> None:
    assert "column 'label' holds Value" in compress(potstill, words, columns="text=label")


def test_an_evaluation_set_without_arrays(potstill: Potstill, arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 4))\n"
    )
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 12, 12, 3)), y=np.zeros(0, dtype=int))
    data = ("--calibrate", f"{arrays}:train", "--eval", tmp_path / "none.npz", "--out", tmp_path / "out")
    assert "is empty" in potstill("export", "models:net", "--target", "laptop-x86-vnni", *data, cwd=tmp_path)


@pytest.mark.parametrize("code", ["def net(:\n", "def net(): return 1 / 0\n", "raise RuntimeError('mine')\n"])
def test_a_users_own_code_that_fails(potstill: Potstill, arrays: Path, tmp_path: Path, code: str) -> None:
    (tmp_path / "models.py").write_text(code)
    data = ("--calibrate", f"{arrays}:train", "--eval", f"{arrays}:test", "--out", tmp_path / "out")
    said = potstill("export", "models:net", "--target", "laptop-x86-vnni", *data, cwd=tmp_path)
    assert "models:net cannot be called" in said or "cannot import models:net" in said


def test_a_hub_that_cannot_be_reached(potstill: Potstill, words: dict[str, object], tmp_path: Path) -> None:
    data = ("--calibrate", words["--train"], "--eval", words["--eval"], "--out", tmp_path / "out")
    said = potstill("export", "someone/some-model", "--target", "laptop-x86-vnni", *data, code=4)
    assert "the model hub did not give it" in said


def test_a_folder_that_cannot_be_made(potstill: Potstill, words: dict[str, object]) -> None:
    assert "cannot write in /proc/none" in compress(potstill, words, out="/proc/none")


def test_options_that_would_do_nothing(potstill: Potstill, words: dict[str, object]) -> None:
    assert "both are given" in compress(potstill, words, student_weights="w.th")
    assert "say which" in compress(potstill, words, student=None, student_weights="w.th")


def test_a_failed_gate_still_prints_its_json(words: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    words = words | {"--student": "layers=1,hidden=8", "--epochs": "0.2", "--max-drop": "1pp"}
    options = [str(part) for name, value in words.items() if name != "teacher" for part in (name, value)]
    assert cli.call(["compress", str(words["teacher"]), *options, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["entries"][-1]["verdict"]["passed"] is False
