"""Students of other architectures than their teachers, as a user would write them."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer by letters, which no teacher has."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate(["[PAD]", "[UNK]", *" abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128)


class Convolutions(nn.Module):
    """Letters (B, T) to logits (B, 2), by convolutions over the letters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = letters()
        self.embed = nn.Embedding(28, 24, padding_idx=0)
        self.convolve = nn.Conv1d(24, 64, 5, padding=2)
        self.classify = nn.Linear(64, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2)."""
        found = torch.relu(self.convolve(self.embed(input_ids).transpose(1, 2)))
        return self.classify((found * attention_mask[:, None]).amax(dim=2))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """The teacher's tokens (B, T) to logits (B, 2), by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.run = nn.GRU(24, 32, batch_first=True)
        self.classify = nn.Linear(32, 2)

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        """Logits (B, 2); the inputs in an order of its own."""
        states, _ = self.run(self.embed(input_ids))
        return self.classify((states * attention_mask[..., None]).amax(dim=1))  # type: ignore[no-any-return]


class Tagger(nn.Module):
    """The teacher's tokens (B, T) to logits (B, T, 5), by a GRU in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.run = nn.GRU(24, 16, batch_first=True, bidirectional=True)
        self.classify = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, 5)."""
        return self.classify(self.run(self.embed(input_ids))[0])  # type: ignore[no-any-return]


class Pixels(nn.Module):
    """Pixels (B, 3, H, W) to logits (B, 4), by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classify = nn.Linear(64, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, 4)."""
        return self.classify(self.layers(pixel_values))  # type: ignore[no-any-return]


class Vectors(nn.Module):
    """The teacher's tokens (B, T) to vectors (B, 12) of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(40, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors (B, 12)."""
        return self.embed(input_ids)  # type: ignore[no-any-return]


class Words(nn.Module):
    """The teacher's tokens (B, T) to the mean of their vectors (B, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors (B, 32) of length 1."""
        mean = (self.embed(input_ids) * attention_mask[..., None]).sum(dim=1)
        return nn.functional.normalize(mean, dim=1)


class Foreign(nn.Module):
    """Takes what no tokenizer gives."""

    def forward(self, words: Tensor) -> Tensor:
        """Words as they are."""
        return words


class Flat(nn.Module):
    """Gives one number for each example."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Sums (B,)."""
        return input_ids.sum(dim=1)


class Named(Convolutions):
    """A teacher that names its classes."""

    labels = ("negative", "positive")
