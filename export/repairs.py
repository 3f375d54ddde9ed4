"""What gives accuracy back to integers without training: weights and biases of the float graph that suit them better.

Equalisation and SmoothQuant rewrite weights so that the graph computes the same and rounds better. AdaRound and bias
correction learn from the graph in integers; what they learn holds only for nodes in integers and is kept apart.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from potstill.export.adaround import learned_weights
from potstill.export.bias_correction import corrected_biases
from potstill.export.calibrate import Reader
from potstill.export.equalize import equalize
from potstill.export.graph import save_model
from potstill.export.net import Net
from potstill.export.smooth import smooth
from potstill.targets.target import Repair
from potstill.validate.files import read_json, whole_folder, write_json

GRAPH, TOLD = "graph.onnx", "told.json"
LEARNED = {"adaround": "rounding learned", "bias": "bias corrected"}  # each kept in a file of arrays by name


class Repairs:
    """The repairs of one graph, made once and kept in a folder.

    Args:
        wanted: which.
        folder: where they are kept; those that are there are not made again.
        reader: of calibration examples.
        seed: of AdaRound's choices.
    """

    def __init__(self, wanted: Sequence[Repair], folder: Path, reader: Reader, seed: int) -> None:
        self._wanted, self._folder, self._reader, self._seed = wanted, folder, reader, seed

    def __call__(self, path: Path, keep_float: Sequence[str], write: Callable[[Path, Path], None]) -> list[str]:
        """Repair a graph in place, and say what was done, one clause for each repair.

        Args:
            path: the graph, as `prepare` leaves it.
            keep_float: names of nodes that stay in float: what is learned is not put there.
            write: makes a graph in integers, without any node in float, of one that was rewritten.
        """
        if not self._folder.is_dir():
            with whole_folder(self._folder) as aside:
                self._make(path, aside, write)
        net = Net(onnx.load(str(self._folder / GRAPH)))
        told: list[str] = read_json(self._folder / TOLD)
        for repair in (one for one in LEARNED if one in self._wanted):
            with np.load(self._folder / f"{repair}.npz") as learned:
                count, put = len(learned), _put(net, dict(learned), keep_float)
            told.append(_told(LEARNED[repair], put, "nodes", count))
        save_model(net.model, path)
        return told

    def _make(self, path: Path, folder: Path, write: Callable[[Path, Path], None]) -> None:
        """All that is wanted, into a folder."""
        told, graph, ints = list[str](), folder / GRAPH, folder / "integers.onnx"
        net = Net(onnx.load(str(path)))
        if "equalize" in self._wanted:
            told.append(_told("equalized", equalize(net), "pairs of layers"))
            net = Net(net.model)
        if "smooth" in self._wanted:
            told.append(_told("smoothed", smooth(net, self._reader), "layer norms"))
            net = Net(net.model)
        save_model(net.model, graph)
        write_json(folder / TOLD, told)
        if set(LEARNED) & set(self._wanted):
            write(graph, ints)
            net, in_integers = Net(onnx.load(str(graph))), Net(onnx.load(str(ints)))
            if "adaround" in self._wanted:
                _keep(folder, "adaround", learned_weights(net, in_integers, self._reader, self._seed))
            if "bias" in self._wanted:
                _keep(folder, "bias", corrected_biases(net, in_integers, self._reader))
            for part in folder.glob(f"{ints.name}*"):
                part.unlink()


def repairs_beside(ranges: Path) -> Path:
    """The folder in which the repairs are kept that belong to a file of ranges."""
    return ranges.with_suffix(".repairs")


def repaired_graph(folder: Path, out: Path) -> None:
    """Write the float graph that the repairs in a folder left, without what holds for integers alone."""
    save_model(onnx.load(str(folder / GRAPH)), out)


def _keep(folder: Path, repair: str, learned: Mapping[str, NDArray[np.float64]]) -> None:
    np.savez(folder / f"{repair}.npz", **learned)  # type: ignore[arg-type]


def _put(net: Net, learned: Mapping[str, NDArray[np.float64]], keep_float: Sequence[str]) -> int:
    """Put what was learned where a node is in integers; at how many."""
    left = [net.nodes[name] for name in keep_float if name in net.nodes]
    kept = {name for node in left for name in [*node.input[1:], net.bias(node)]}
    put = learned.keys() - kept
    for name in put:
        net.put(name, learned[name])
    return len(put)


def _told(what: str, count: int, of: str, most: int = 0) -> str:
    """What a repair did at some of those that it could be made at."""
    if count < most:
        return f"{what}: {count} of {most} {of}, the others are in float"
    return f"{what}: {count} {of}" if count else f"{what}: nothing, there are no {of} for it"
