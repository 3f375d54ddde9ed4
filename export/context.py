"""The context binary of a Snapdragon: the graph compiled ahead for one chip, and what its compiler says of it."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from potstill.targets.coverage import Coverage, estimated, weighed
from potstill.targets.local import Local
from potstill.targets.qnn import AGENT, TRACE, read_trace
from potstill.targets.target import QNN, Target
from potstill.validate.errors import PotstillError, Unreachable
from potstill.validate.files import read_json
from potstill.validate.units import counted

CONTEXT = "model_ctx.onnx"  # as onnxruntime-qnn's own documentation names it
GET_IT = 'pip install "potstill[qnn]" and export again'


@dataclass(frozen=True)
class EmulatedNpu:
    """The compiled graph on the emulated NPU, beside the golden outputs. It says nothing of time.

    Attributes:
        samples: golden samples that were run.
        difference: largest absolute difference of an output, as a share of the largest logit of its sample.
        tolerance: the share that the golden samples allow.
        same: samples whose largest logit is at the same place.
    """

    samples: int
    difference: float
    tolerance: float
    same: int

    @property
    def within(self) -> bool:
        """Whether the difference is one that the golden samples allow."""
        return self.difference <= self.tolerance

    def in_words(self) -> str:
        """One sentence."""
        verdict = "within" if self.within else "more than"
        return (
            f"Emulated NPU, {counted(self.samples, 'golden sample')}: up to {self.difference:.1%} of the largest logit "
            f"from the CPU, {verdict} the {self.tolerance:.0%} that they allow; {self.same} with the same "
            "largest logit."
        )


@dataclass(frozen=True)
class Context:
    """What became of the context binary.

    Attributes:
        compiled: whether it is in the package.
        options: of the provider that it was compiled with; the chip among them.
        files: that belong to it, by name.
        versions: of what compiled it.
        emulated: how it computes; None where nothing was compiled.
        note: why nothing was compiled and what to do; "" where it was.
    """

    compiled: bool
    options: dict[str, str]
    files: tuple[str, ...] = ()
    versions: dict[str, str] | None = None
    emulated: EmulatedNpu | None = None
    note: str = ""

    def in_words(self) -> str:
        """What was compiled and how it computes, or why nothing was."""
        if not self.compiled or self.emulated is None:
            return self.note
        chip = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"Compiled ahead into {' and '.join(self.files)} ({chip}). {self.emulated.in_words()}"


def on_npu(model: Path, golden: Path, target: Target, tolerance: float) -> tuple[Context | None, Coverage | None]:
    """The context binary where the target wants one, else None; and which nodes of the file its provider takes."""
    context, coverage = None, estimated(model, target)
    if target.model.compiler:
        context, coverage = compile_context(model, golden, target, tolerance)
    sample = _in_folder(read_json(golden / "golden.json")["samples"][0]["inputs"], golden)
    feeds = {n: np.fromfile(one["file"], one["dtype"]).reshape(one["shape"]) for n, one in sample.items()}
    return context, weighed(coverage, model, feeds)


def compile_context(model: Path, golden: Path, target: Target, tolerance: float) -> tuple[Context, Coverage]:
    """Compile a file beside it into `CONTEXT` and a `.bin` for the target's chip, and read the compiler's trace.

    Where onnxruntime-qnn is not installed, or refuses the graph, nothing is written and both records say so. A file of
    which the provider took no node counts as refused.

    Args:
        model: the ONNX file.
        golden: folder of the golden samples, which are run on the emulated NPU.
        target: whose `model.compiler` asks for this.
        tolerance: of the golden outputs, as a share of the largest logit.
    """
    options = target.runtime.provider_options[QNN]
    if find_spec("onnxruntime_qnn") is None:
        return _not_compiled(options, f"onnxruntime-qnn is not installed; {GET_IT}")
    samples = read_json(golden / "golden.json")["samples"]
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".context.") as folder:
        aside = Path(folder)
        request = {
            "model": str(model.resolve()),
            "context": str(aside.resolve() / CONTEXT),
            "options": options,
            "trace_folder": str(aside.resolve()),
            "samples": [_in_folder(one["inputs"], golden.resolve()) for one in samples],
        }
        try:
            reply = Local(program=AGENT).ask(request)
        except (PotstillError, Unreachable) as error:
            return _not_compiled(options, f"onnxruntime-qnn refused the graph: {str(error).splitlines()[-1]}")
        made = sorted(aside.glob(f"{Path(CONTEXT).stem}*"))
        if not reply["assigned"].get(QNN) or not (aside / CONTEXT).is_file():
            return _not_compiled(
                options, "onnxruntime-qnn took no node of the graph; check soc_model and htp_arch of the target"
            )
        coverage = read_trace(aside / TRACE, reply)
        for path in made:
            path.rename(model.parent / path.name)
    outputs = [np.asarray(one, dtype=np.float32) for one in reply["outputs"]]
    files = tuple(path.name for path in made)
    return Context(True, options, files, reply["versions"], _beside(outputs, samples, golden, tolerance)), coverage


def _not_compiled(options: dict[str, str], why: str) -> tuple[Context, Coverage]:
    return Context(False, options, note=f"No context binary was compiled: {why}."), Coverage("unknown", QNN, why)


def _in_folder(inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {name: one | {"file": str(folder / one["file"])} for name, one in inputs.items()}


def _beside(
    outputs: Sequence[np.typing.NDArray[np.float32]], samples: Sequence[dict[str, Any]], golden: Path, tolerance: float
) -> EmulatedNpu:
    """Outputs of the emulated NPU beside the golden ones."""
    worst, same = 0.0, 0
    for output, sample in zip(outputs, samples, strict=True):
        (expected,) = sample["outputs"].values()
        wanted = np.fromfile(golden / expected["file"], dtype=expected["dtype"]).reshape(expected["shape"])
        difference = np.nan_to_num(np.abs(output - wanted), nan=np.inf).max()
        worst = max(worst, float(difference / max(np.abs(wanted).max(), np.finfo(np.float32).tiny)))
        same += bool((output.argmax(axis=-1) == wanted.argmax(axis=-1)).all())
    return EmulatedNpu(len(outputs), worst, tolerance, same)
