"""A run in several processes of `torchrun`: the first one walks it, the others train with it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.pipeline.ranks import Crew, rank
from potstill.validate.errors import GateFailed, InputError, PotstillError
from tests.forked import Forked
from tests.waiting import free_port

Together = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def together(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> Together:
    """Run a small recipe in two processes, with values changed; what they say, mixed as it comes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data: {{train: {texts["train"]}, eval: {texts["eval"]}, columns: {{text: sentence}}}}
student: {{layers: 1, hidden: 8}}
stages:
  - distill: {{epochs: 0.2, learning_rate: 1e-3}}
gate: {{max_drop: 90pp}}
"""
    )

    def run(*changes: str) -> subprocess.CompletedProcess[str]:
        words = [word for change in changes for word in ("--set", change)]
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "potstill.pipeline", "run", str(recipe), "--out", str(tmp_path / "out"), *words],
            capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_run_in_two_processes(together: Together, tmp_path: Path) -> None:
    done = together()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1  # the first process alone speaks
    assert "Traceback" not in done.stderr
    entries = json.loads((tmp_path / "out" / "ledger.json").read_text())["entries"]
    assert [entry["name"] for entry in entries] == ["teacher", "student", "distill"]
    assert entries[-1]["log"][-1]["taught_rows"] > 0
    # A gate that fails ends all: what is done is not trained again.
    failed = together("gate.max_drop=0pp")
    assert failed.returncode == 1  # torchrun's own; it names the exit code of the first process
    assert "exitcode  : 3" in failed.stderr
    assert failed.stderr.count("potstill: ") == 1


def _process(place: int, port: int, fails: tuple[str, ...], out: Path) -> None:
    """One process of a crew of two, with `fails[place]` as the error of its stage; leaves its exit code."""
    setting = {"WORLD_SIZE": 2, "RANK": place, "LOCAL_RANK": place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in setting.items()}

    def stage(**word: str) -> None:
        assert word == {"stage": "one"}
        if fails[place]:
            raise InputError(fails[place])

    crew, code = Crew(), 0
    with (out / f"{place}.txt").open("w") as file, contextlib.redirect_stderr(file):
        if place:
            code = crew.follow(stage)
        else:
            try:
                with crew.led():
                    with crew.called(stage="one"):
                        stage(stage="one")
                    if fails[2]:
                        raise GateFailed(fails[2])
            except PotstillError as error:
                code = error.exit_code
    os._exit(code)


@pytest.mark.parametrize(
    ("fails", "codes", "said"),
    [
        (("", "", ""), [0, 0], ""),
        (("", "", "missed"), [3, 3], ""),  # a gate, after the stage
        (("the same", "the same", ""), [2, 2], ""),  # the first one says it
        (("", "of the second alone", "later"), [None, 2], "potstill: process 1: of the second alone\n"),
    ],
)
def test_how_a_crew_ends(fails: tuple[str, ...], codes: list[int | None], said: str, tmp_path: Path) -> None:
    port = free_port()
    processes = [Forked(target=_process, args=(place, port, fails, tmp_path)) for place in range(2)]
    for process in processes:
        process.start()
    processes[1].join(timeout=300)
    if codes[0] is None:  # as torchrun does when one process fails
        processes[0].kill()
    processes[0].join(timeout=300)
    assert [process.exitcode for process in processes] == [code or -9 * (code is None) for code in codes]
    assert (tmp_path / "1.txt").read_text() == said


def test_alone_there_is_nobody_to_call() -> None:
    crew = Crew()
    with crew.led(), crew.called(stage=0):
        assert rank() == 0
