"""Where the time of a run goes, by the modules of the model as its code names them.

ONNX Runtime times the nodes that are left after fusion, many of which have new names. What a fused node writes and
reads keeps its name, so that the optimised graph, which the device writes when it profiles, leads from each of them to
a tensor of the file, and the package's own `modules.json` from that to its module.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from potstill.targets.operators import Node
from potstill.validate.errors import InputError
from potstill.validate.files import read_json

MODULES = "modules.json"
BEFORE = ("fused ", "InsertedPrecisionFreeCast_", "FusedBack_")  # ONNX Runtime 1.31, core/optimizer
FORMAT = "potstill-modules/1"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Module:
    """A module, its nodes after fusion and its share of a run's time, without those of the modules inside it.

    `module` is its dotted path, such as `bert.encoder.layer.3.attention.self.query`, "" the model itself; None has the
    nodes of which no module is known.
    """

    module: str | None
    nodes: int
    share: float

    def in_words(self) -> str:
        """Its path, or what stands in its place."""
        return "of no known module" if self.module is None else self.module or "the model itself"


def read_modules(folder: Path) -> dict[str, str]:
    """Nodes and tensors of a package's graph, each with its module; nothing where the package does not say.

    Raises:
        InputError: the file is malformed.
    """
    file = folder / MODULES
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
        return {str(name): str(module) for module, names in found["modules"].items() for name in names}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: no map of modules ({told}); export the model again") from None


def by_module(nodes: Sequence[Node], known: Mapping[str, str], graph: Path | None) -> list[Module]:
    """The shares of nodes summed by module, in the order of the run; the nodes without a module come last.

    Args:
        nodes: of a profile.
        known: of the package, by `read_modules`.
        graph: that ONNX Runtime ran, as the device wrote it; None where it wrote none, and names are all that is known.
    """
    if not known:
        return []
    optimised = (
        {} if graph is None else {one.name: one for one in onnx.load(graph, load_external_data=False).graph.node}
    )
    made_by = {name: one for one in optimised.values() for name in one.output}
    spent: dict[str | None, float] = {}
    counts: Counter[str | None] = Counter()
    for node in nodes:
        module = _first(_names(node.name, optimised, made_by), known)
        spent[module] = spent.get(module, 0) + node.share
        counts[module] += 1
    order = sorted(spent, key=lambda module: module is None)
    return [Module(module, counts[module], spent[module]) for module in order]


def folded(modules: Sequence[Module], most: int) -> list[Module]:
    """The same shares by outer modules: at the deepest level at which there are at most so many of them."""
    for depth in range(max((one.module.count(".") + 1 for one in modules if one.module), default=1), 0, -1):
        spent: dict[str | None, list[Module]] = {}
        for one in modules:
            outer = one.module and ".".join(one.module.split(".")[:depth])
            spent.setdefault(outer, []).append(one)
        if len(spent) <= most or depth == 1:
            break
    return [
        Module(name, sum(one.nodes for one in inner), sum(one.share for one in inner)) for name, inner in spent.items()
    ]


def _names(name: str, graph: Mapping[str, onnx.NodeProto], made_by: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """What may tell a node's module, best first: its name, what it writes, what it reads, and what those were made of.

    A conversion of formats or layouts is of the module whose tensor it converts.
    """
    yield name
    before, seen = [graph[name]] if name in graph else [], set[str]()
    if before:
        yield from before[0].output
    while before:
        names = [one for node in before for one in node.input if one and one not in seen]
        seen.update(names)
        yield from names
        before = [made_by[one] for one in names if one in made_by]


def _first(names: Iterator[str], known: Mapping[str, str]) -> str | None:
    return next((module for name in names if (module := _module(name, known)) is not None), None)


def _module(name: str, known: Mapping[str, str]) -> str | None:
    """That of a name, or of the longest known one which it starts with.

    ONNX Runtime and its quantisers put words behind a name, as in `linear_3_QuantizeLinear` and `relu_nchwc`, and some
    before.
    """
    while word := next((one for one in BEFORE if name.startswith(one)), None):
        name = name.removeprefix(word)
    ends = [end for end in range(len(name), 0, -1) if end == len(name) or not name[end].isalnum()]
    return next((known[name[:end]] for end in ends if name[:end] in known), None)
