"""What can be cut out of a module of convolutions: channels, and the units of hidden Linear modules.

torch-pruning's dependency graph (Fang et al. 2023, "DepGraph: towards any structural pruning") says which channels of
which modules go together and cuts them. What it cannot see (a shortcut that pads by a fixed number, a reshape
to a fixed size, a norm over channels) is found by trying: each group is cut on a copy, which must compute exactly what
the model does with those channels gated to zero; a group that does not is left, and counted.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from potstill.compress.gates import Part, Site, outputs, same
from potstill.validate.reshape import RESHAPABLE

ROOTS = (nn.Conv1d, nn.Conv2d, nn.Linear)
TAKERS = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)


@dataclass(frozen=True)
class Channels:
    """The channels of a module.

    Attributes:
        parts: groups of channels that can be cut, each named by the first module that gives them.
        free: output channels of all modules in these groups.
        bound: output channels of the modules in groups that cannot be cut; the module's outputs not counted.
    """

    parts: list[Part]
    free: int
    bound: int


def channels_of(module: nn.Module, inputs: Sequence[Tensor]) -> Channels:
    """Which channels of a module can be cut.

    Args:
        module: in eval mode, on the CPU.
        inputs: real inputs of its `forward`, a batch of two or more.
    """
    parts, free, bound = [], 0, 0
    for group in _graph(module, inputs).get_all_groups(root_module_types=ROOTS):
        count, part = sum(_given(item) for item in group.items), _part(group)
        match _trial(module, inputs, part) if part else "bound":
            case "cut":
                parts += [part] if part else []
                free += count
            case "bound":
                bound += count
    return Channels(parts, free, bound)


def remove_channels(module: nn.Module, inputs: Sequence[Tensor], gone: Mapping[str, Sequence[int]]) -> None:
    """Cut channels, by the name of their part and their indices in it."""
    graph = _graph(module, inputs)
    for name, channels in gone.items():
        if channels:
            root = module.get_submodule(name)
            cut = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, cut, list(channels)).prune()


def _graph(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(module, example_inputs=tuple(inputs), verbose=False)


def _given(item: Any) -> int:
    """Output channels that a Conv or Linear module gives to a group."""
    module = item.dep.target.module
    gives = isinstance(module, ROOTS) and item.dep.handler not in TAKERS
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels) if gives else 0


def _part(group: Any) -> Part | None:
    """A group as a part, gated where Conv and Linear modules take its channels; None if they take less than it has."""
    root = group[0].dep.target
    sites = []
    for item in group.items:
        module = item.dep.target.module
        if item.dep.handler in TAKERS:
            features = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            if max(item.idxs) >= features or None in item.root_idxs:
                return None
            unit = torch.full((features,), -1)
            unit[list(item.idxs)] = torch.tensor(list(item.root_idxs))
            sites.append(Site(module, unit))
    return Part(root.name.partition(" ")[0], len(group[0].idxs), tuple(sites))


def _trial(module: nn.Module, inputs: Sequence[Tensor], part: Part) -> str:
    """Cut every second channel of a part on a copy: `cut` if that is right, `output` if outputs go, else `bound`."""
    if part.units < 2:
        return "bound"
    gone = list(range(0, part.units, 2))
    trial = copy.deepcopy(module)
    try:
        remove_channels(trial, inputs, {part.name: gone})
        got = outputs(trial, inputs, [], [])
    except Exception:  # whatever a user's own forward raises when its sizes changed
        return "bound"
    wanted = outputs(module, inputs, [part], [gone])
    if got.shape != wanted.shape:
        return "output"
    before = module.state_dict()
    changed = {
        name.rpartition(".")[0] for name, tensor in trial.state_dict().items() if tensor.shape != before[name].shape
    }
    known = all(isinstance(trial.get_submodule(name), RESHAPABLE) for name in changed)
    return "cut" if known and same(got, wanted) else "bound"
