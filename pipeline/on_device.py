"""A package of a run, judged where it will run: the evaluation set answered by a device, in the run's own scorecard.

What is emulated must give the answers of this machine, too: beyond rounding the verdict fails and names the cause.
What the device has answered is kept batch by batch in the run's folder, so that one that went away goes on.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from rich.console import Console

from potstill.export.checked import Emulated, tolerance
from potstill.export.package import MODEL, open_package, package_encoder, read_package
from potstill.pipeline import searching
from potstill.pipeline.cache import WORK, run_folder, run_of
from potstill.pipeline.emulating import EMULATED, sqnr_db
from potstill.pipeline.going_on import readable
from potstill.pipeline.judging import Judged, Subject, verdict_on
from potstill.pipeline.recipe import load_recipe
from potstill.pipeline.run import Run
from potstill.pipeline.stages import STAGES
from potstill.targets.device import Device
from potstill.targets.emulate import EmulatedCpu
from potstill.targets.measurement import Measurement
from potstill.targets.qnn import QnnSim
from potstill.targets.saturation import saturation
from potstill.targets.target import Target, load_target, target_names
from potstill.targets.wire import DevicePredictor
from potstill.validate.errors import InputError
from potstill.validate.examples import Rows
from potstill.validate.files import sha256_json
from potstill.validate.predictor import Predictor
from potstill.validate.units import counted, signed
from potstill.validate.verdict import Check, Verdict, verdict_of

BATCH = 64  # examples of one request: what is lost where a device goes away


class Kept:
    """A predictor whose batches are kept in a folder, and taken from there by a hash of their rows."""

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        self.name, self.batch_size, self.encode = predictor.name, predictor.batch_size, predictor.encode
        self._predictor, self._folder = predictor, folder

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits (R, C) of some rows; how many inputs were cut is counted again, too."""
        file = self._folder / f"{Hasher.hash(dict(rows))}.npz"
        if file.is_file():
            with np.load(file) as kept:
                self.encode.truncated += int(kept["truncated"])
                return np.asarray(kept["rows"], dtype=np.float32)
        before = self.encode.truncated
        found = self._predictor(rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}")
        examples = len(next(iter(rows.values())))
        np.savez(aside, rows=found, truncated=self.encode.truncated - before, examples=examples)
        aside.rename(file)
        return found

    def in_words(self) -> str | None:
        """How many answers are there already, and of when the last one is; None where there are none."""
        files = [file for file in self._folder.glob("*.npz") if not file.name.startswith(".")]
        if not files:
            return None
        examples = 0
        for file in files:
            with np.load(file) as kept:
                examples += int(kept["examples"])
        last = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC)
        return f"{counted(examples, 'answer')} of {self.name} are kept from {readable(last.isoformat(' ', 'seconds'))}"


@dataclass(frozen=True)
class OnDevice:
    """What the run's judge says of a package by a device's answers; `emulated`, where the device is."""

    judged: Judged
    verdict: Verdict | None
    emulated: Emulated | None = None


def judge_on(
    package: Path, device: Device, measurement: Measurement, console: Console, *, timeout_s: float = 900
) -> OnDevice:
    """Have a device answer the evaluation set of the run that made a package, and judge that against the teacher.

    Args:
        package: its folder, in the run's.
        device: that runs it.
        measurement: of the same package there, which says what machine and versions these are.
        console: where the run tells what it does, and which answers an earlier try had.
        timeout_s: for the answers of `BATCH` examples.

    Raises:
        InputError: the package is not in the folder of a run, or the run is not done as it stands.
        Unreachable: the device went away; what it answered is kept.
    """
    out = run_of(package)
    if out is None:
        raise InputError(
            f"{package} does not lie in the folder of a run, whose evaluation set and teacher would judge it; give "
            "RUN/packages/NAME"
        )
    recipe = load_recipe(out / "recipe.yaml", stage_types=STAGES, target_names=target_names())
    with run_folder(out):
        run = Run(recipe, out, console)
        plan = run.plan()
        if undone := [one.step for one in plan if not one.done and one.step != "reference"]:
            raise InputError(
                f"{out}: {', '.join(undone)} would have to be made anew, by other versions or files than now; run its "
                "recipe again first"
            )
        model = run.last_model(plan)
        targets = {one.id: one for one in map(load_target, recipe.targets)}
        if package.resolve().name not in targets:
            raise InputError(
                f"{package} is no package of {out}'s recipe, which makes {', '.join(targets)}; give one of these"
            )
        target = targets[package.resolve().name]
        here = Subject(
            run.packing.on_here(run.keys[f"packages/{target.id}"]),
            package_encoder(model.encode, target),
            lambda: open_package(package, model, target),
        )
        made = read_package(package)
        known = searching.known_by(here, made)
        key = sha256_json([known.key, device.where, asdict(measurement.where), measurement.versions])
        predictor = DevicePredictor(
            package / MODEL,
            here.encode,
            f"{target.id} on {device.where}",
            read=model.read,
            providers=measurement.providers,
            session_options=target.runtime.session_options,
            threads=measurement.threads,
            batch_size=BATCH,
            device=device,
            timeout_s=timeout_s,
        )
        answers = run.cache.folder / f"{WORK}answers-{key[:10]}"
        kept = Kept(predictor, answers)
        if words := kept.in_words():
            console.print(words, highlight=False, soft_wrap=True, markup=False)
        there, started = Subject(key, predictor.encode, lambda: kept), time.monotonic()
        found = run.judge(there, after=known)
        shutil.rmtree(answers, ignore_errors=True)
        verdict = verdict_on(found, run.gate, made.model_bytes)
        if not isinstance(device, EmulatedCpu | QnnSim):
            return OnDevice(found, verdict)
        assert found.step
        emulated = Emulated(
            cpu=device.chip if isinstance(device, QnnSim) else device.emulator.cpu,
            emulator="onnxruntime-qnn" if isinstance(device, QnnSim) else Path(device.emulator.python[0]).name,
            examples=found.scorecard.examples,
            of=found.scorecard.examples,
            scorecard=found.scorecard,
            apart=found.step,
            sqnr_db=sqnr_db(run.judge.rows(known), run.judge.rows(there)),
            least_db=tolerance(run.packing.scheme(target).method).sqnr_db,
            seconds=time.monotonic() - started,
        )
        same = answers_as_here(emulated, package / MODEL, target, device.target)
        return OnDevice(found, verdict_of([*(verdict.checks if verdict else []), same]), emulated)


def answers_as_here(found: Emulated, model: Path, made_for: Target, on: Target) -> Check:
    """Whether a file answers on an emulated CPU or NPU as on this machine, within what its number format allows.

    Args:
        found: of the same file on both.
        model: the file.
        made_for: the target of its package.
        on: that whose CPU or NPU was emulated.
    """
    card = found.apart
    low, lost, high = (
        signed(one * 100, 1) for one in (card.difference_interval.low, card.difference, card.difference_interval.high)
    )
    noise = "the same outputs as here"
    if found.sqnr_db is not None:
        noise = f"outputs {found.sqnr_db:.0f} dB above their differences ({found.least_db:.0f} dB or more is rounding)"
    same = "" if card.agreement is None else f"{card.agreement:.2%} of the answers are those of the same file here, "
    reason = (
        f"as {found.cpu}, on {counted(card.examples, 'example')}: {same}{noise}; {card.metric} {lost} points "
        f"[{low}, {high}]"
    )
    if not found.differs:
        return Check(f"{EMULATED} answers", "pass", True, reason)
    cause = saturation(model, on)
    if cause is None:
        remedy = "why is not known; judge it on the device itself"
    elif made_for.id == on.id:
        remedy = f"{cause.in_words(on)}; give this target's scheme `reduce_range: true` or `weight: uint8`"
    else:
        remedy = f"{cause.in_words(on)}; export for it (`--target {on.id}`), with weights that leave room"
    return Check(f"{EMULATED} answers", "fail", False, f"{reason}: {remedy}")
