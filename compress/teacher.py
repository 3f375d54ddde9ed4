"""The teachers while a student learns: frozen, on the training device; one, several, or their outputs on disk.

Shapes: R rows (examples; words for tagging), C classes, M teachers.
"""

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.compress.layers import Ears, Point, blocks
from potstill.compress.pupil import Taught, of_tokens
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.files import sha256_folder, sha256_json
from potstill.validate.language import check_tokenizer
from potstill.validate.task import Model
from potstill.validate.tokens import TokensEncoder

Weighing = Literal["fixed", "confidence"]


class Teacher:
    """What one or several frozen models say of a batch."""

    def __init__(
        self,
        members: Sequence[Model],
        weights: Sequence[float],
        weighing: Weighing,
        device: torch.device,
        points: Sequence[Point] = (),
    ) -> None:
        """Freeze the models on the device.

        Args:
            members: over one set of classes, in any order; the first one's order counts.
            weights: one for each, above 0.
            weighing: `fixed`, or `confidence`: each also by the inverse of its entropy on the example.
            device: of the training.
            points: layers of the first one that are kept.

        Raises:
            InputError: classes that are not the same, or several teachers of embeddings.
        """
        first = members[0]
        self._members, self._weighing = list(members), weighing
        self._orders = [order_of(first, member) for member in members]
        self._weights = torch.tensor([weight / sum(weights) for weight in weights], device=device)
        for member in members:
            member.module.to(device).eval()
        self._ears = Ears(first.core, points)
        self._listening = bool(points)

    def __call__(self, batches: Sequence[Mapping[str, Tensor]]) -> Taught:
        """What they say; `batches` are the same examples, encoded for each."""
        with torch.no_grad(), self._ears:
            outputs = [member.answers(batch) for member, batch in zip(self._members, batches, strict=True)]
        states = of_tokens(self._ears.states(), batches[0]) if self._listening else {}
        mask = batches[0].get("attention_mask") if self._listening else None
        if len(outputs) == 1:
            return Taught(outputs[0], states, mask)
        logs = torch.stack(
            [
                torch.log_softmax(logits.float()[:, order], dim=1)
                for logits, order in zip(outputs, self._orders, strict=True)
            ]
        )
        return Taught(together(logs, self._weights, self._weighing), states, mask)

    def close(self) -> None:
        """Remove the hooks."""
        self._ears.close()


def together(logs: Tensor, weights: Tensor, weighing: Weighing) -> Tensor:
    """One teacher's logits (R, C) from several teachers' log-probabilities (M, R, C).

    The weighted mean of the log-probabilities, that is, up to a constant, of the logits: the geometric mean of the
    distributions (Hinton 2015, section 3), which means the same at every temperature. By `confidence`, a teacher's
    weight (M,) on an example is also divided by the entropy of what it says there (Kwon 2020, "Adaptive knowledge
    distillation based on entropy", equation 3).
    """
    shares = weights[:, None].expand(logs.shape[:2])
    if weighing == "confidence":
        entropy = -(logs.exp() * logs).sum(dim=2)
        shares = shares / entropy.clamp(min=1e-6)
        shares = shares / shares.sum(dim=0)
    return (shares[:, :, None] * logs).sum(dim=0)


def identity(members: Sequence[Model], weights: Sequence[float], weighing: Weighing) -> str:
    """A hash of all that decides what teachers say: weights, a factory's code, preprocessing, how they are joined."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for i, member in enumerate(members):
            parts.append([member.checkpoint.digest(), _of_weights(member.core), _of_encoder(member.encode, folder, i)])
    return sha256_json([parts, [float(weight) for weight in weights] if len(members) > 1 else None, weighing])


def sharded(model: Model) -> Model:
    """A copy of a teacher whose weights are spread over the processes, for one that fits on no single device.

    Each layer gathers its weights when it runs and lets them go again (`torch.distributed.fsdp.fully_shard`), so all
    processes must run it at the same time. The model itself stays whole, in the memory of the host.
    """
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(model)
    stacks = [module for module in model.core.modules() if isinstance(module, nn.ModuleList)]
    for layer in blocks(model.core).values() if stacks else ():
        fully_shard(layer)
    fully_shard(model.core)
    return model


def _of_weights(module: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy() if tensor.ndim else str(tensor.item()).encode()
        )
    return digest.hexdigest()


def _of_encoder(encode: Encoder, folder: str, number: int) -> list[Any]:
    """What an encoder would save, and the lengths that it cuts to."""
    place = Path(folder) / str(number)
    place.mkdir()
    encode.save(place)
    return [sha256_folder(place), getattr(encode, "max_length", None), type(encode).__name__]


def order_of(first: Model, member: Model) -> list[int] | slice:
    """Where a teacher has the first teacher's classes; of language models, whose tokens are the same, all in order.

    Raises:
        InputError: it has other classes, or another tokenizer.
    """
    if member is first:
        return slice(None)
    if isinstance(first.encode, TokensEncoder):
        check_tokenizer(member, first)
        return slice(None)
    if not first.labels or sorted(member.labels) != sorted(first.labels):
        raise InputError(
            f"teachers must have the same classes: {first.checkpoint} has {', '.join(first.labels) or 'none'}, "
            f"{member.checkpoint} has {', '.join(member.labels) or 'none'}"
        )
    place = {label: i for i, label in enumerate(member.labels)}
    return [place[label] for label in first.labels]
