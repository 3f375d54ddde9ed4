"""What a search is given, and what it has on the disk.

Figures and verdicts are kept by a hash of all that they hang on, so that a search that was killed goes on. Model files
are kept only as long as they are needed: their number does not grow with the tries.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from potstill.export.graph import data_file
from potstill.export.quantize import Quantized, quantize
from potstill.export.repairs import repairs_beside
from potstill.export.search_time import Clock, Timed
from potstill.targets.host import here
from potstill.targets.target import Scheme
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import PotstillError
from potstill.validate.files import read_json, sha256_file, sha256_json, write_json
from potstill.validate.model import Model
from potstill.validate.scorecard import Scorecard
from potstill.validate.session import CPU
from potstill.validate.verdict import Verdict

Nodes = frozenset[str]
Judging = Callable[[Path, tuple[str, ...], Encoder], tuple[Scorecard, Verdict]]
"""Of a model file, the names of what was searched in it, and what feeds it until the time is up."""


@dataclass(frozen=True)
class Limits:
    """How a search may go.

    Attributes:
        seconds: after which no model is run any more; a file that is being written then is finished.
        folder: where figures and verdicts are kept, so that a search that was killed goes on.
        asked: a hash of the gate and of the evaluation data that it is asked on.
    """

    seconds: float
    folder: Path
    asked: str


@dataclass(frozen=True)
class Start:
    """What a search is about.

    Attributes:
        graph: the float graph, as `quantize` takes it.
        quantized: the same in the scheme, nothing left in float.
        plain: what the gate said of that.
        scheme: the number formats.
        model: whose graph it is.
        encode: of the package.
        calibrate: examples for the ranges; those that do not go into these rank and measure.
        seed: of their choice.
        session_options: of the target's runtime.
    """

    graph: Path
    quantized: Path
    plain: tuple[Scorecard, Verdict]
    scheme: Scheme
    model: Model
    encode: Encoder
    calibrate: Examples
    seed: int
    session_options: dict[str, str]


def digest(path: Path) -> str:
    """A hash of a model's content: of its file, and of the weights beside it where there are some."""
    return sha256_json([sha256_file(part) for part in (path, data_file(path)) if part.is_file()])


class Files:
    """The figures, verdicts and model files of one search in one scheme.

    Args:
        start: what the search is about.
        limits: on it.
        clock: of it.
        work: a folder for model files.
    """

    def __init__(self, start: Start, limits: Limits, clock: Clock, work: Path) -> None:
        self.start, self.limits, self.clock, self._work = start, limits, clock, work
        self.encode = Timed(start.encode, clock)
        self.key = self._key()
        self._there: dict[Nodes, Quantized] = {}

    def _key(self) -> str:
        """Of the model, its formats, what calibrates it, and the arithmetic of the CPU that runs it here."""
        start, host = self.start, here()
        of = [digest(start.graph), start.scheme.model_dump(), start.calibrate.digest, start.seed]
        return sha256_json([*of, start.session_options, CPU, host.arch, host.cpu, host.isa])

    def kept(self, name: str, what: Any, kind: Any, make: Callable[[], Any]) -> Any:
        """A value made now, or read from where an earlier search left it."""
        path = self.limits.folder / f"{name}-{sha256_json([self.key, what])[:16]}.json"
        if not path.is_file():
            write_json(path, TypeAdapter(kind).dump_python(make(), mode="json"))
        return TypeAdapter(kind).validate_python(read_json(path))

    @cached_property
    def ranges(self) -> Path:
        """The activation ranges of a static scheme, measured once; repairs are kept beside them."""
        path, start = self.limits.folder / f"ranges-{self.key[:16]}.json", self.start
        if start.scheme.method == "static" and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._work) as folder:
                new = Path(folder) / "ranges.json"
                quantize(
                    start.graph, new.with_name("model.onnx"), start.scheme, start.calibrate, self.encode, start.seed,
                    ranges=new,
                )  # fmt: skip
                if repairs_beside(new).is_dir():
                    shutil.rmtree(repairs_beside(path), ignore_errors=True)  # of a search that was killed right here
                    repairs_beside(new).replace(repairs_beside(path))
                new.replace(path)
        return path

    def _place(self, nodes: Nodes) -> Path:
        """Named as the package's file: a file with weights beside it says their name."""
        return self._work / sha256_json(sorted(nodes))[:16] / self.start.quantized.name

    def made(self, nodes: Nodes, left: tuple[str, ...]) -> Path:
        """The model file of a set of nodes, written if it is not there; `left` is all that stays in float with it."""
        path, start = self._place(nodes), self.start
        if nodes not in self._there:
            path.parent.mkdir(exist_ok=True)
            self._there[nodes] = quantize(
                start.graph, path, start.scheme, start.calibrate, self.encode, start.seed,
                keep_float=left, ranges=self.ranges,
            )  # fmt: skip
        return path

    def drop(self, wanted: set[Nodes]) -> None:
        """Remove the model files of all other sets."""
        for nodes in self._there.keys() - wanted:
            shutil.rmtree(self._place(nodes).parent)
            del self._there[nodes]

    def ship(self, nodes: Nodes, left: tuple[str, ...], judged: str) -> Quantized:
        """Put the file that was judged in the plain one's place; it is made again where an earlier search judged it.

        Args:
            nodes: of its set.
            left: as of `made`.
            judged: the `digest` of the file that was judged.

        Raises:
            PotstillError: it was made again, and is another file.
        """
        path, out = self.made(nodes, left), self.start.quantized
        if digest(path) != judged:
            raise PotstillError(
                f"the model that the gate judged and the one that was made again of it are different files; remove "
                f"{self.limits.folder} and run the same command again"
            )
        data_file(out).unlink(missing_ok=True)
        for part, place in ((data_file(path), data_file(out)), (path, out)):
            if part.is_file():
                part.replace(place)
        return self._there[nodes]
