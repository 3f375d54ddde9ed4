"""The embedded default: scikit-learn's handwritten digits, a teacher trained on the spot, three targets."""

from pathlib import Path
from typing import Any

import numpy as np

from potstill.pipeline.cache import run_folder
from potstill.validate.files import whole_folder
from potstill.validate.progress import track

TARGETS = ("laptop-x86-vnni", "phone-arm64-dotprod", "browser-wasm")
EPOCHS = 12


def prepare(out: Path) -> dict[str, Any]:
    """Write the digits, train the teacher, and give the recipe; what is there already is kept.

    The digits are the test set of Alpaydin and Kaynak 1998 (UCI), as scikit-learn ships them: 1,797 pictures of 8 × 8.
    Two thirds train, one third judges.
    """
    inputs = out / "inputs"
    with run_folder(out):
        if not inputs.is_dir():
            with whole_folder(inputs) as aside:
                x, y = _digits()
                cut = len(x) * 2 // 3
                np.savez_compressed(
                    aside / "digits.npz", train_x=x[:cut], train_y=y[:cut], test_x=x[cut:], test_y=y[cut:]
                )
                _train_teacher(x[:cut], y[:cut], aside / "teacher.safetensors")
    digits = inputs.resolve() / "digits.npz"
    return {
        "task": "module",
        "teacher": {
            "checkpoint": "potstill.pipeline.demo_models:teacher",
            "weights": str(inputs.resolve() / "teacher.safetensors"),
        },
        "data": {"train": f"{digits}:train", "eval": f"{digits}:test"},
        "student": {"checkpoint": "potstill.pipeline.demo_models:student"},
        "stages": [{"distill": {"epochs": 40, "learning_rate": 3e-3, "augment": ["shift"]}}],
        "gate": {"max_drop": "2pp"},
        "targets": list(TARGETS),
        "licences": {
            "teacher": "own",  # trained above, on this machine
            "student": "own",
            "data": "cc-by-4.0",  # the UCI Machine Learning Repository, archive.ics.uci.edu/dataset/80
        },
        "seed": 0,
    }


def _digits() -> tuple[Any, Any]:
    """Pictures (1797, 8, 8, 1) from 0 to 16, and classes (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order, :, :, None].astype(np.float32), digits.target[order].astype(np.int64)


def _train_teacher(x: Any, y: Any, weights: Path) -> None:
    """Plain supervised training, the same loop that a user's own teacher had."""
    import torch
    from safetensors.torch import save_model

    from potstill.pipeline.demo_models import teacher

    torch.manual_seed(0)
    model, pictures, classes = teacher(), torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * -(-len(x) // 64))
    model.train()
    with track("training the demo's teacher", EPOCHS) as advance:
        for _ in range(EPOCHS):
            for index in torch.randperm(len(x)).split(64):
                loss = torch.nn.functional.cross_entropy(model(pictures[index]), classes[index])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            advance(1, f"loss {loss.item():.3f}")
    save_model(model, str(weights))
