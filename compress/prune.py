"""Pruning: parts of a model that matter least are taken out, and the rest is trained again by the teacher."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors.torch import load_model, save_model
from torch import Tensor, device
from torch.utils.flop_counter import FlopCounterMode

from potstill.compress.channel_parts import channels_of, remove_channels
from potstill.compress.distill import Distill, world_size
from potstill.compress.gates import Part, importance, one_by_one, outputs, same
from potstill.compress.lesson import Lesson
from potstill.compress.transformer_parts import Encoder, encoder_of
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, whole_folder, write_json
from potstill.validate.low_rank import ranks_of
from potstill.validate.predictor import best_device
from potstill.validate.reshape import mark
from potstill.validate.task import Model
from potstill.validate.units import counted

Cut = dict[str, dict[str, list[int]]]  # kind -> name of a part -> the units to remove
Log = list[dict[str, float]]
KINDS = ("heads", "neurons", "channels")
WEIGHTS, LOG, CUT, LAYERS = "weights.safetensors", "log.json", "cut.json", "layers.json"
TRIED = 4  # examples that show that a cut model computes what the gated one did


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Prune:
    """Remove what the loss hangs on least, then let the student learn again; the model is really smaller.

    Importance is first-order Taylor by gates (Molchanov et al. 2019; heads: Michel et al. 2019; see
    `compress/gates.py`), on training examples with their hard labels. Layers go at once, before the first round. The
    other shares grow evenly over the rounds, and after each round the student is distilled (iterative pruning,
    Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference").

    Heads are compared over all layers and channels over all groups, each of which keeps at least one; of neurons each
    layer loses as many. Channels that cannot be cut (`compress/channel_parts.py`) stay, and the log counts them. A cut
    model must compute what it did with the removed units gated to zero.

    Attributes:
        heads: share of all attention heads that is gone at the end, for transformer encoders (a decoder's share keys
            and values; `student: {hidden: …}` cuts them by groups). The result opens with
            Potstill, not with `from_pretrained` alone: its config cannot say it.
        neurons: share of the feed-forward's neurons in each layer, for transformers.
        channels: share of the channels of convolutions and of the units of hidden Linear modules, of those that can be
            cut, for other models.
        layers: how many transformer layers go.
        rounds: steps to the full share.
        examples: training examples that importance is measured on, chosen by the seed.
        distill: the training after each round.
    """

    heads: float | None = None
    neurons: float | None = None
    channels: float | None = None
    layers: int | None = None
    rounds: int = 1
    examples: int = 1024
    distill: Distill = Distill(epochs=1)

    def __post_init__(self) -> None:
        """Refuse shares that are none, and rounds without a share."""
        for kind, share in self.shares.items():
            if not 0 < share < 1:
                raise ValueError(f"{kind} must be above 0 and below 1, the share to remove, and is {share:g}")
        for name in ("layers", "rounds", "examples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, and is {value}")
        if not self.shares and self.layers is None:
            raise ValueError("prune needs heads, neurons, channels or layers")
        if not self.shares and self.rounds > 1:
            raise ValueError("rounds are for heads, neurons and channels; layers go at once")

    @property
    def shares(self) -> dict[str, float]:
        """The shares that are asked for, by kind."""
        return {kind: share for kind in KINDS if (share := getattr(self, kind)) is not None}

    def __call__(self, student: Model, lesson: Lesson) -> Log:
        """Prune and train `student` in place; a run that was cut off goes on where it was, with the same cuts.

        Returns:
            For each round an entry with `round` (0: before), `parameters`, `macs` (multiply-adds for the first
            training example) and for channels `free` and `bound` (cannot be cut), then the training's own log.

        Raises:
            InputError: the model has no such parts, too few of them, or uses them in a way that is not known; see also
                `Distill`.
        """
        if world_size() > 1:
            raise InputError("prune works in one process; start its run without torchrun")
        if ranks_of(student.core):
            raise InputError("a student of low rank cannot be pruned: give heads, neurons or layers, or rank, not both")
        if student.in_float() is not student:
            raise InputError("a quantised student cannot be pruned: put prune before qat")
        student.module.to("cpu").eval()
        inputs = one_by_one(student).batch(lesson.train.rows(range(min(TRIED, len(lesson.train)))), device("cpu"))
        encoder = self._encoder(student, writes=lesson.task.gives == "tokens")
        log: Log = [{"round": 0, "step": 0, "epoch": 0, **sizes(student, inputs)}]
        if self.layers and encoder:
            cut = _once(lesson.work / LAYERS, partial(self._least_layers, encoder, student, lesson))
            _apply(cut, student, inputs)
        start = {kind: {part.name: part.units for part in _parts(kind, student, inputs)} for kind in self.shares}
        self._check(start, student)
        if "channels" in self.shares:
            found = channels_of(student.module, inputs)
            log[0] |= {"free": found.free, "bound": found.bound}
        for number in range(1, self.rounds + 1):
            work = lesson.work / f"round-{number}"
            cut = _once(work / CUT, partial(self._least, start, number / self.rounds, student, inputs, lesson))
            _apply(cut, student, inputs)
            log.append({**_end(log), "round": number, **sizes(student, inputs)})
            log += _after(_end(log), self._trained(student, replace(lesson, work=work)))
        return log

    def notes(self, log: Log) -> list[str]:
        """What a reader should know of a run of this stage, from its log."""
        bound = int(log[0].get("bound", 0))
        total = bound + int(log[0].get("free", 0))
        said = f"{bound:,} of {counted(total, 'channel')} cannot be pruned, and stayed: the model fixes their number."
        return [said] if bound else []

    # The steps.

    def _encoder(self, student: Model, writes: bool) -> Encoder | None:
        """The student's transformer layers, if it has some; refuses kinds of parts that it has not."""
        encoder, name = encoder_of(student.core), type(student.core).__name__
        wrong = [kind for kind in ("heads", "neurons", "layers") if getattr(self, kind) is not None]
        shared = encoder is not None and encoder.gated and self.heads is not None
        if shared or (writes and (encoder is None or self.channels is not None)):
            raise InputError(
                f"prune: of {name} no {' or '.join(wrong or ['channels'])} can be removed: models of Llama's form "
                "(Mistral, Qwen, Gemma) lose layers and neurons, other language models nothing; cut the student from "
                "the teacher instead (student: {hidden: …}), or give a smaller one"
            )
        if encoder is None and wrong:
            raise InputError(
                f"prune: {name} has no transformer layers of a known form (BERT, RoBERTa, DistilBERT, ViT and their "
                f"like), so no {' or '.join(wrong)} to remove; use channels, or give a smaller --student"
            )
        if encoder is not None and self.channels is not None:
            raise InputError(
                f"prune: {name} is a transformer; it has layers, heads and neurons, and no channels to remove"
            )
        if encoder is not None and self.layers and self.layers >= len(encoder.layers):
            raise InputError(
                f"prune: layers={self.layers}, and {name} has {len(encoder.layers)}; at least one must stay"
            )
        return encoder

    def _check(self, start: Mapping[str, Mapping[str, int]], student: Model) -> None:
        """Refuse shares that remove nothing, or leave a part empty."""
        for kind, share in self.shares.items():
            units = list(start[kind].values())
            if not units:
                raise InputError(f"prune: {type(student.core).__name__} has no {kind} that can be removed")
            gone = round(share * units[0]) if kind == "neurons" else round(share * sum(units))
            most = units[0] - 1 if kind == "neurons" else sum(units) - len(units)
            if not 0 < gone <= most:
                raise InputError(
                    f"prune: {kind}={share:g} of {_in_words(units)} would remove {gone}"
                    f"{' from each' if kind == 'neurons' else ''}; from 1 to {most} can be removed"
                )

    def _examples(self, lesson: Lesson) -> Examples:
        """The training examples that importance is measured on."""
        count = min(self.examples, len(lesson.train))
        chosen = np.random.default_rng(lesson.seed).choice(len(lesson.train), count, replace=False)
        return lesson.train.take(np.sort(chosen).tolist(), "to weigh")

    def _least_layers(self, encoder: Encoder, student: Model, lesson: Lesson) -> Cut:
        """The layers of least importance."""
        assert self.layers is not None
        parts = encoder.layer_parts()
        scores = np.concatenate(importance(student, parts, self._examples(lesson), best_device()))
        gone = set(np.argsort(scores, kind="stable")[: self.layers].tolist())
        return {"layers": {part.name: [0] if i in gone else [] for i, part in enumerate(parts)}}

    def _least(
        self,
        start: Mapping[str, Mapping[str, int]],
        done: float,
        student: Model,
        inputs: Sequence[Tensor],
        lesson: Lesson,
    ) -> Cut:
        """The units of least importance that must go for `done` of the way, from all kinds at once."""
        parts = {kind: _parts(kind, student, inputs) for kind in self.shares}
        every = [part for own in parts.values() for part in own]
        scores = iter(importance(student, every, self._examples(lesson), best_device()))
        cut: Cut = {}
        for kind, share in self.shares.items():
            own, was = [next(scores) for _ in parts[kind]], start[kind]
            if kind == "neurons":  # the config has one number for all layers
                before = next(iter(was.values()))
                count = round(share * done * before) - before + len(own[0])
                chosen = [sorted(np.argsort(score, kind="stable")[:count].tolist()) for score in own]
            else:
                total = sum(was.values())
                # A group that is down to one channel is no part any more.
                left = sum(map(len, own)) + len(was) - len(own)
                chosen = least_of_all(own, round(share * done * total) - total + left)
            cut[kind] = {part.name: units for part, units in zip(parts[kind], chosen, strict=True)}
        return cut

    def _trained(self, student: Model, lesson: Lesson) -> Log:
        """Distil the student, or take up the weights of a round that is done."""
        done = lesson.work / "done"
        if not done.is_dir():
            log = self.distill(student, lesson)
            with whole_folder(done) as aside:
                save_model(student.core, str(aside / WEIGHTS))
                write_json(aside / LOG, log)
        for checkpoint in lesson.work.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        load_model(student.core, done / WEIGHTS)
        read: Log = read_json(done / LOG)
        return read


def least_of_all(scores: Sequence[NDArray[np.float64]], count: int) -> list[list[int]]:
    """For each part (U,) the units to remove: the `count` of lowest score over all parts, one unit of each kept."""
    gone: list[list[int]] = [[] for _ in scores]
    for _, part, unit in sorted((score, i, j) for i, own in enumerate(scores) for j, score in enumerate(own)):
        if count > 0 and len(gone[part]) < len(scores[part]) - 1:
            gone[part].append(unit)
            count -= 1
    return [sorted(units) for units in gone]


def sizes(student: Model, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Weights of a model, and its multiply-adds for the first of some inputs, as `torch.utils.flop_counter` counts."""
    with FlopCounterMode(display=False) as counter:
        outputs(student.module, [tensor[:1] for tensor in inputs], [], [])
    return {"parameters": student.parameters, "macs": counter.get_total_flops() // 2}


def _parts(kind: str, student: Model, inputs: Sequence[Tensor]) -> list[Part]:
    if kind == "channels":
        return channels_of(student.module, inputs).parts
    encoder = encoder_of(student.core)
    assert encoder is not None
    return {"layers": encoder.layer_parts, "heads": encoder.head_parts, "neurons": encoder.neuron_parts}[kind]()


def _apply(cut: Cut, student: Model, inputs: Sequence[Tensor]) -> None:
    """Take units out of a model in place.

    Raises:
        InputError: the smaller model does not compute what the larger one does with those units at zero.
    """
    parts = [part for kind in cut for part in _parts(kind, student, inputs)]
    gone = [units for named in cut.values() for units in named.values()]
    wanted = outputs(student.module, inputs, parts, gone)
    for kind, named in cut.items():
        encoder = encoder_of(student.core)
        if kind == "channels":
            remove_channels(student.module, inputs, named)
            mark(student.core)
        elif encoder and kind == "layers":
            encoder.remove_layers([i for i, units in enumerate(named.values()) if units])
        elif encoder:
            (encoder.remove_heads if kind == "heads" else encoder.remove_neurons)(named)
    if not same(outputs(student.module, inputs, [], []), wanted):
        raise InputError(
            f"prune: {type(student.core).__name__} without its {' and '.join(cut)} does not compute what it does with "
            "them at zero: its forward uses them in a way that is not known; give a smaller --student instead"
        )


def _once(path: Path, make: Callable[[], Cut]) -> Cut:
    """A choice that was made before, or one made now and kept."""
    if not path.is_file():
        write_json(path, make())
    cut: Cut = read_json(path)
    return cut


def _end(log: Log) -> dict[str, float]:
    """The last step and epoch of a log."""
    return {name: max(entry.get(name, 0) for entry in log) for name in ("step", "epoch")}


def _after(end: Mapping[str, float], log: Log) -> Log:
    """A training's log as the continuation of what ended at a step and epoch."""
    return [entry | {name: entry[name] + end[name] for name in end if name in entry} for entry in log]


def _in_words(units: Sequence[int]) -> str:
    """How many units there are, e.g. `4 each in 12 parts`."""
    each = f"{units[0]}" if len(set(units)) == 1 else f"{min(units)} to {max(units)}"
    return f"{each} each in {len(units)} parts"
