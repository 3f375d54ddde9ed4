"""One knowledge distillation by torchdistill, for a side-by-side comparison; run by the Python that has torchdistill.

    torchdistill_worker.py SETTING.json

Workload: a student learns from a frozen teacher on images that are not augmented; one teacher forward, one student
forward and backward, gradients clipped to norm 1, one AdamW step a batch. The box, data loader, KDLoss and meters are
torchdistill's, in a loop like that of its image classification example, without its validation between epochs.
Timer: from before the first batch is drawn to the end of the last step; samples are epochs × training examples.
Imports, loading, and the judging of the trained student on the test part are outside.

The loss is w · T² KL(teacher ‖ student at temperature T) + (1 − w) · cross-entropy; the learning rate rises linearly
over the first tenth of the steps, then falls linearly to zero; weight decay is on all weights but vectors.
SETTING.json holds `arrays` (.npz with train_x, train_y, test_x, test_y: uint8 (N, 32, 32, 3) and classes (N,)),
`teacher` and `student` (FILE.py:FACTORY), `teacher_weights` and `student_weights` (safetensors, or a PyTorch file of
plain tensors), `epochs`, `batch_size`, `learning_rate` (the peak), `weight_decay`, `temperature` T, `soft_weight` w,
`seed` and `threads`. Prints one line of JSON; its `loss` is the mean over the last epoch's steps.
"""

import json
import runpy
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.utils.data import RandomSampler, TensorDataset


def declare_torchvision_operators() -> None:
    """Let torchvision be imported where its C++ part cannot load, as that of a CUDA wheel beside a CPU torch.

    While it is imported, torchvision describes what these two operators return, and for that needs their signatures.
    They get no implementation: to call one is an error. Distillation calls neither.
    """
    try:
        torch.ops.load_library(distribution("torchvision").locate_file("torchvision/_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def load_model(factory: str, weights: str) -> nn.Module:
    """Build the module of FILE.py:FACTORY and load its weights; every key must match."""
    file, _, name = factory.rpartition(":")
    model: nn.Module = runpy.run_path(file)[name]()
    is_safe = weights.endswith(".safetensors")
    state: Any = load_file(weights) if is_safe else torch.load(weights, "cpu", weights_only=True)
    state = state.get("state_dict", state)
    model.load_state_dict({key.removeprefix("module."): tensor for key, tensor in state.items()})
    return model


def adamw_sparing_vectors(module: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """AdamW whose weight decay leaves out biases and the scales of norms."""
    parts = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim <= 1]
    decayed, spared = (
        {"params": part, "weight_decay": rate} for part, rate in zip(parts, (weight_decay, 0.0), strict=True)
    )
    return AdamW([decayed, spared], lr=lr, fused=True)


def linear_with_warmup(optimizer: Optimizer, steps: int) -> lr_scheduler.LambdaLR:
    """From zero to the peak over the first tenth of `steps`, then to zero."""
    up = max(1, steps // 10)
    down = max(1, steps - up)
    return lr_scheduler.LambdaLR(optimizer, lambda step: step / up if step < up else (steps - step) / down)


def kd_criterion(temperature: float, soft_weight: float) -> dict[str, Any]:
    """The configuration of the loss: alpha weighs the cross-entropy, beta the soft part, which KDLoss multiplies by T².

    With alpha zero KDLoss leaves out beta and T² (as of torchdistill 1.1.5), so T² becomes the term's weight.
    """
    student, teacher = ({f"{who}_module_path": ".", f"{who}_module_io": "output"} for who in ("student", "teacher"))
    weights = {"temperature": temperature, "alpha": 1 - soft_weight, "beta": soft_weight, "reduction": "batchmean"}
    criterion = {"key": "KDLoss", "kwargs": student | teacher | weights}
    term = {"criterion": criterion, "weight": 1.0 if soft_weight < 1 else temperature**2}
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}}


def distillation_box(setting: SimpleNamespace, data: TensorDataset, teacher: nn.Module, student: nn.Module) -> Any:
    """torchdistill's box for one stage, configured as the YAML files of its examples do."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.optim.registry import register_optimizer, register_scheduler

    register_optimizer(adamw_sparing_vectors)
    register_scheduler(linear_with_warmup)
    batches = {"batch_size": setting.batch_size}
    rates = {"lr": setting.learning_rate, "weight_decay": setting.weight_decay}
    optimizer = {"key": "adamw_sparing_vectors", "kwargs": rates, "filters_params": False, "max_grad_norm": 1.0}
    steps = {"steps": -(-len(data) // setting.batch_size) * setting.epochs}
    config = {
        "num_epochs": setting.epochs,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": batches},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": optimizer,  # unfiltered, it is given modules, whose parameters have names
        "scheduler": {"key": "linear_with_warmup", "kwargs": steps, "scheduling_step": 1},
        "criterion": kd_criterion(setting.temperature, setting.soft_weight),
    }
    return get_distillation_box(teacher, student, {"train": data}, config, torch.device("cpu"), None, False, 1)


def train(box: Any) -> tuple[float, float]:
    """Seconds of the training, and the mean loss of its last epoch."""
    from torchdistill.misc.log import MetricLogger

    started = time.perf_counter()
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        meters = MetricLogger()
        for images, labels, extras in meters.log_every(box.train_data_loader, 100):
            loss = box.forward_process(images.float(), labels, extras)
            box.post_forward_process(loss=loss)
            meters.update(loss=loss.item())
        box.post_epoch_process()
    return time.perf_counter() - started, meters.loss.global_avg


def main() -> None:
    """Train, judge, and print one line of JSON."""
    setting = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(setting.threads)
    declare_torchvision_operators()
    import torchdistill
    import torchvision
    from torchdistill.common.main_util import set_seed

    arrays = {name: torch.from_numpy(array) for name, array in np.load(setting.arrays).items()}
    teacher = load_model(setting.teacher, setting.teacher_weights).eval()  # the box freezes it, but does not do this
    student = load_model(setting.student, setting.student_weights)
    set_seed(setting.seed)
    box = distillation_box(setting, TensorDataset(arrays["train_x"], arrays["train_y"]), teacher, student)
    seconds, loss = train(box)
    with torch.inference_mode():
        right = student.eval()(arrays["test_x"].float()).argmax(1) == arrays["test_y"]
    versions = {package.__name__: package.__version__ for package in (torch, torchdistill, torchvision)}
    speed, share = setting.epochs * len(arrays["train_x"]) / seconds, right.float().mean().item()
    print(json.dumps({"samples_per_second": speed, "accuracy": share, "loss": loss, "versions": versions}))


if __name__ == "__main__":
    main()
