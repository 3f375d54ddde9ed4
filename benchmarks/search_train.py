"""Train the depthwise net of `benchmarks/search.py` on CIFAR-10: 20,000 JPEG and, twice, 4,000 lossless images.

By Adam without weight decay, which leaves channels of unlike ranges, as long trainings do: what makes such nets hard to
quantise per tensor (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction").

    python benchmarks/search_train.py data/cifar10 depthwise.safetensors [EPOCHS]
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.cifar10.model import depthwise

EPOCHS, BATCH, RATE = 10, 64, 0.01


def main(data: Path, out: Path, epochs: int) -> None:
    """Train from a fixed seed, say the accuracy on the 1,000 test images, and write the weights."""
    torch.manual_seed(0)
    jpeg, lossless, test = (np.load(data / f"{name}.npz") for name in ("train_jpeg", "train_lossless", "test"))
    x, y = (torch.from_numpy(np.concatenate([jpeg[k], lossless[k], lossless[k]])) for k in ("x", "y"))
    model, started = depthwise(), time.monotonic()
    steps = len(x) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            images = x[index].float()
            images = torch.where(torch.rand(BATCH)[:, None, None, None] < 0.5, images.flip(2), images)
            right, down = torch.randint(0, 9, (2,)).tolist()
            images = functional.pad(images, (0, 0, 4, 4, 4, 4))[:, down : down + 32, right : right + 32]
            loss = functional.cross_entropy(model(images), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            said = torch.cat([model(part.float()).argmax(1) for part in torch.from_numpy(test["x"]).split(200)])
        accuracy = float((said.numpy() == test["y"]).mean())
        print(f"epoch {epoch + 1}: {accuracy:.1%} of the test images, {time.monotonic() - started:.0f} s", flush=True)
        save_file(model.state_dict(), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else EPOCHS)
