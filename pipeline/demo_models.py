"""The demo's own models: small convolutional nets for 8 × 8 pictures of digits."""

import torch
from torch import Tensor, nn


class DigitNet(nn.Module):
    """Pixels (B, 8, 8, 1) from 0 to 16, to logits (B, 10)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if i in (1, 3):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        scaled = x.permute(0, 3, 1, 2) / 8 - 1
        return self.classify(torch.amax(self.features(scaled), dim=(2, 3)))  # type: ignore[no-any-return]


def teacher() -> nn.Module:
    """The demo's teacher: 6 convolutions, 1.2 million weights."""
    return DigitNet(widths=(64, 64, 128, 128, 256, 256))


def student() -> nn.Module:
    """The demo's student: 4 convolutions, 28,000 weights."""
    return DigitNet(widths=(16, 16, 32, 64))
