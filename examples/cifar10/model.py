"""Nets for CIFAR-10, from raw pixels to logits.

The ResNets of He et al. 2015 (section 4.2) with option A shortcuts, and a net of depthwise convolutions made of the
inverted residuals of Sandler et al. 2018 (MobileNetV2), whose layers are narrow and so hard to quantise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 × 3 convolutions; a narrower shortcut skips every second pixel and pads channels with zeros."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=width // before, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.grow = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """Pixels (B, 32, 32, 3) from 0 to 255, to logits (B, 10)."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, (before, after) in enumerate(zip((width, *widths), widths, strict=False)):
            stage = [Block(before if j == 0 else after, after) for j in range(blocks)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(4 * width, 10)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]) * 255, persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]) * 255, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).permute(0, 3, 1, 2)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class Inverted(nn.Module):
    """1 × 1 up, 3 × 3 in each channel alone, 1 × 1 down without an activation; added to its input where it fits."""

    def __init__(self, before: int, after: int, stride: int, grow: int) -> None:
        super().__init__()
        wide = before * grow
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(before, wide, 1, bias=False)), nn.ReLU(),
            *_normed(nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)), nn.ReLU(),
            *_normed(nn.Conv2d(wide, after, 1, bias=False)),
        )  # fmt: skip
        self.shortcut = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class Depthwise(nn.Module):
    """Pixels (B, 32, 32, 3) from 0 to 255, to logits (B, 10)."""

    plan = ((24, 2, 2), (40, 3, 2), (64, 3, 1), (96, 2, 2))  # channels, blocks, stride of the first

    def __init__(self, stem: int = 16, head: int = 256, grow: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_normed(nn.Conv2d(3, stem, 3, padding=1, bias=False)), nn.ReLU()]
        before = stem
        for after, blocks, stride in self.plan:
            for i in range(blocks):
                layers.append(Inverted(before, after, stride if i == 0 else 1, grow))
                before = after
        self.features = nn.Sequential(*layers, *_normed(nn.Conv2d(before, head, 1, bias=False)), nn.ReLU())
        self.linear = nn.Linear(head, 10)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]) * 255, persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]) * 255, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(((x - self.mean) / self.std).permute(0, 3, 1, 2))
        return self.linear(x.mean(dim=(2, 3)))


def _normed(conv: nn.Conv2d) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return conv, nn.BatchNorm2d(conv.out_channels)


def resnet56() -> ResNet:
    """The teacher: 0.86 M weights."""
    return ResNet(9)


def resnet20() -> ResNet:
    """The student: 0.27 M weights."""
    return ResNet(3)


def resnet8() -> ResNet:
    """The smallest: 0.08 M weights."""
    return ResNet(1)


def depthwise() -> Depthwise:
    """A small MobileNetV2: 0.29 M weights."""
    return Depthwise()
