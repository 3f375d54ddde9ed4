"""transformers' training loop with the distillation losses.

Shapes: R rows (examples; words for tagging), C classes.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from potstill.compress.lesson import Order
from potstill.compress.meeting import AS_IT_IS, Meeting
from potstill.compress.on_policy import Writer
from potstill.compress.output_cache import OutputCache
from potstill.compress.pupil import Pupil, Taught
from potstill.compress.teacher import Teacher
from potstill.validate.errors import InputError
from potstill.validate.progress import track

DIVERGED = 10.0  # times the loss at the start
MOST_ROWS = 64  # of a broken batch that are named


class DistillTrainer(Trainer):  # type: ignore[misc]
    """transformers' training loop with the distillation losses."""

    def give(
        self,
        pupil: Pupil,
        teacher: Teacher | None,
        order: Order,
        kept: Mapping[str, OutputCache],
        name: str,
        lockstep: bool,
        writer: Writer | None = None,
        meeting: Meeting = AS_IT_IS,
    ) -> None:
        """What the loop needs beside its own arguments.

        Args:
            pupil: the model, as it is before the loop wraps it.
            teacher: None when no loss reads it.
            order: of the training examples.
            kept: teachers' outputs on disk.
            name: of the training examples, for messages.
            lockstep: whether the processes must run the teacher at the same time.
            writer: of batches in the place of others, where the student learns from its own texts.
            meeting: brings what the teacher says to the rows and tokens of a student with a tokenizer of its own.
        """
        self._pupil, self._teacher, self._order, self._kept, self._name = pupil, teacher, order, kept, name
        self._writer, self._meeting = writer, meeting
        self._lockstep, self._taught_rows, self._kept_rows = lockstep, 0, 0
        self._parts: dict[str, list[Tensor]] = {}
        self._seen: list[tuple[Tensor, NDArray[np.int64]]] = []  # the loss of each batch, and its examples
        self._first: float | None = None
        self.pop_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The weighted sum of the losses."""
        if self._writer and model.training:
            with self.accelerator.autocast():
                inputs = self._writer(inputs, self.state.global_step, self.args.device)
        parts = model(inputs["student"], self._taught(inputs), inputs["labels"], inputs["keep"])
        loss = self._pupil.weighted(parts)
        if model.training:
            for name, part in parts.items():
                self._parts.setdefault(name, []).append(part.detach())
            self._seen.append((loss.detach(), inputs["items"]))
        return loss

    def _taught(self, inputs: dict[str, Any]) -> Taught:
        """The teachers' outputs: from disk, else from the teachers, and then to disk."""
        known = inputs["taught"] is not None
        if self._lockstep:
            known = bool(self.accelerator.gather(torch.tensor([known], device=self.args.device)).all())
        if self._teacher is None or known:
            self._kept_rows += len(inputs["labels"]) if known else 0
            return self._meeting(Taught(inputs["taught"]), inputs["met"])
        with self.accelerator.autocast():
            taught = self._teacher(inputs["teachers"])
        self._taught_rows += len(inputs["labels"])
        if inputs["part"] in self._kept and taught.outputs is not None:
            device = taught.outputs.device
            taught.outputs = self._kept[inputs["part"]].write(inputs["rows"], taught.outputs).to(device)
        return self._meeting(taught, inputs["met"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what is logged; stop a training that has gone wrong.

        Raises:
            InputError: a loss is not finite, or ten times what it was at the start.
        """
        if "loss" in logs and self._seen:
            losses = torch.stack([loss for loss, _ in self._seen]).float()
            parts = torch.stack([torch.stack(part).float().mean() for part in self._parts.values()])
            self._check(self._of_all(losses).cpu())
            logs |= dict(zip(self._parts, self._of_all(parts).mean(dim=0).tolist(), strict=True))
            logs["loss"] = self._of_all(losses).mean().item()
            self._parts, self._seen = {}, []
        elif not math.isfinite(logs.get("eval_loss", 0.0)):
            raise InputError(f"the loss on held-out examples is {logs['eval_loss']} at step {self.state.global_step}")
        super().log(logs, start_time)

    def _of_all(self, values: Tensor) -> Tensor:
        """The same of every process (P, N), from this one's (N,)."""
        gathered: Tensor = self.accelerator.gather(values)
        return gathered.reshape(-1, len(values))

    def taught(self) -> dict[str, float]:
        """For how many rows the teachers ran (`taught_rows`) or were read (`kept_rows`), in all processes."""
        rows = torch.tensor([self._taught_rows, self._kept_rows], device=self.args.device)
        taught, kept = self._of_all(rows).sum(dim=0).tolist()
        return {"taught_rows": float(taught), "kept_rows": float(kept)}

    def _check(self, losses: Tensor) -> None:
        """Refuse losses (processes, steps since the last log) that are not finite or have run away."""
        broken = (~torch.isfinite(losses)).T.nonzero()
        rate = f"try a lower learning_rate (now {self.args.learning_rate:g})"
        if len(broken):
            first, process = broken[0].tolist()
            batches = gather_object([self._seen[first][1].tolist()])
            step = self.state.global_step - (losses.shape[1] - 1 - first) // self.args.gradient_accumulation_steps
            rows = ", ".join(str(i + 1) for i in sorted(batches[process])[:MOST_ROWS])
            raise InputError(
                f"the loss is {losses[process, first].item()} at step {step}, on the batch of rows {rows}"
                f"{', …' if len(batches[process]) > MOST_ROWS else ''} of {self._name}; {rate}, "
                "or look for broken inputs in these rows"
            )
        mean = losses.mean().item()
        self._first = mean if self._first is None else self._first
        if mean > DIVERGED * max(self._first, 1.0):
            raise InputError(
                f"the training diverged: the loss is {mean:.3g} at step {self.state.global_step} and was "
                f"{self._first:.3g} at the start; {rate}"
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save copies of the tensors: weights that are tied share memory, which safetensors refuses."""
        tensors = state_dict or self._pupil.state_dict()
        super()._save(output_dir, {name: tensor.detach().clone() for name, tensor in tensors.items()})

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights that decay: all but biases and the scales of norms, which are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process's, before the first one writes `trainer_state.json`, which makes the checkpoint whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def taken_up(self) -> str | None:
        """The newest whole checkpoint, as the first process finds it.

        Raises:
            InputError: it is of another student, or of other losses.
        """
        found = [last_whole_checkpoint(Path(self.args.output_dir)) if self.is_world_process_zero() else None]
        path: str | None = broadcast_object_list(found)[0]
        if path:
            with safe_open(Path(path) / "model.safetensors", "pt") as file:
                theirs = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if theirs != {name: list(tensor.shape) for name, tensor in self._pupil.state_dict().items()}:
                raise InputError(
                    f"{self.args.output_dir} holds checkpoints of another training; remove it, or give another folder"
                )
        return path

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards no process reads checkpoints any more."""
        output = super().train(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order


def last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; one cut off in the middle is removed.

    transformers writes `trainer_state.json` last.
    """
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if (path / "trainer_state.json").is_file() and (path / "trainer_state.json").read_text().endswith("}\n"):
            return str(path)
        shutil.rmtree(path)
    return None


class Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar over the steps, with the last loss."""

    def __enter__(self) -> None:
        self._bar: Any = None
        self._note = ""

    def __exit__(self, *exc: Any) -> None:
        if self._bar:
            self._bar.__exit__(*exc)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where the training goes on, on the first process."""
        if not state.is_world_process_zero:
            return
        self._bar = track("distilling", state.max_steps)
        self._advance = self._bar.__enter__()
        self._advance(state.global_step, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self._bar:
            self._advance(1, self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Note the loss."""
        if "loss" in logs:
            self._note = f"loss {logs['loss']:.3f}"
