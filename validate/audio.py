"""Sounds, one class for each.

Shapes: B examples in a batch, S samples.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import BATCH, Encoder, Inputs
from potstill.validate.errors import InputError, told
from potstill.validate.examples import Rows
from potstill.validate.model import OneClass
from potstill.validate.pretrained import Pretrained

MAX_SECONDS = 10.0
FRAME_SECONDS = 0.01  # from one row of a mel spectrogram to the next, as Kaldi and all these models have it


@dataclass
class AudioEncoder:
    """Sounds through the checkpoint's own feature extractor, to arrays of one fixed length.

    Files are read by soundfile, channels averaged, and samples brought to the extractor's rate by scipy's polyphase
    resampling. A fixed length makes the answer to one sound independent of the others in its batch.

    Attributes:
        extractor: a feature extractor of transformers.
        samples: S kept of a sound.
        truncated: sounds that were cut so far.
    """

    extractor: Any
    samples: int
    truncated: int = 0
    axes: ClassVar[Mapping[int, str]] = BATCH

    def __call__(self, rows: Rows) -> Inputs:
        """Samples (B, S), or mel spectrograms as the extractor gives them."""
        sounds = [_samples(sound, self.extractor.sampling_rate) for sound in rows["audio"]]
        self.truncated += sum(len(sound) > self.samples for sound in sounds)
        sounds = [sound[: self.samples] for sound in sounds]
        how = {"sampling_rate": self.extractor.sampling_rate, "return_tensors": "np"}
        if _takes_samples(self.extractor):
            return self._padded([self.extractor(sound, **how)["input_values"][0] for sound in sounds])
        return {name: values.astype(np.float32) for name, values in self.extractor(sounds, **how).items()}

    def _padded(self, sounds: list[NDArray[np.float32]]) -> Inputs:
        """Each sound normalised alone, then padded; with a mask (B, S) where the model wants one."""
        values = np.full((len(sounds), self.samples), self.extractor.padding_value, dtype=np.float32)
        mask = np.zeros((len(sounds), self.samples), dtype=np.int64)
        for i, sound in enumerate(sounds):
            values[i, : len(sound)] = sound
            mask[i, : len(sound)] = 1
        return {"input_values": values} | ({"attention_mask": mask} if self.extractor.return_attention_mask else {})

    def save(self, folder: Path) -> None:
        """Write the feature extractor."""
        self.extractor.save_pretrained(folder)

    def same_as(self, other: Encoder) -> bool:
        """Whether the other one prepares sounds the same way."""
        return (
            isinstance(other, AudioEncoder)
            and self.samples == other.samples
            and bool(self.extractor.to_dict() == other.extractor.to_dict())
        )


class AudioClassification(Pretrained, OneClass):
    """One sound, one class."""

    word = "audio-classification"
    features: tuple[str, ...] = ("audio",)
    length_of: str | None = None
    tool = "feature_extractor"
    probe: ClassVar[Rows] = {"audio": [{"array": np.zeros(400, dtype=np.float32), "sampling_rate": 16_000}]}

    def open_tool(self, folder: str) -> Any:
        """The feature extractor."""
        from transformers import AutoFeatureExtractor

        return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)

    def encoder(  # type: ignore[override]  # a task's own options
        self, tool: Any, core: nn.Module, checkpoint: Checkpoint, max_seconds: float | None = None
    ) -> AudioEncoder:
        """See `Pretrained.encoder`.

        Args:
            tool: the feature extractor.
            core: the model.
            checkpoint: for messages.
            max_seconds: kept of a sound; at most, and by default, the fixed length of the extractor (Whisper, AST); for
                one of samples (Wav2Vec2, HuBERT, WavLM) by default `MAX_SECONDS`.

        Raises:
            InputError: the extractor gives inputs of no fixed length.
        """
        if _takes_samples(tool):
            longest = max_seconds or MAX_SECONDS
        else:
            frames, chunk = getattr(tool, "max_length", None), getattr(tool, "chunk_length", None)
            own = chunk or (frames and frames * FRAME_SECONDS)
            if not own:
                raise InputError(
                    f"the feature extractor of {checkpoint} ({type(tool).__name__}) gives inputs of no fixed length; "
                    "expected one of samples, or of spectrograms with max_length or chunk_length"
                )
            longest = min(own, max_seconds or own)
        return AudioEncoder(tool, round(longest * tool.sampling_rate))


def _takes_samples(extractor: Any) -> bool:
    """Whether it gives the samples themselves, padded as it is told."""
    from transformers import Wav2Vec2FeatureExtractor

    return isinstance(extractor, Wav2Vec2FeatureExtractor)


def _samples(sound: Mapping[str, Any], rate: int) -> NDArray[np.float32]:
    """The samples of a sound, float32 (S,), at a rate in Hz; see `decoded`."""
    from scipy.signal import resample_poly

    samples, own = decoded(sound)
    common = math.gcd(own, rate)
    found: NDArray[np.float32] = resample_poly(samples, rate // common, own // common).astype(np.float32)
    return found


def decoded(sound: Mapping[str, Any]) -> tuple[NDArray[np.float32], int]:
    """The samples of a sound, float32 (S,), the mean of its channels, and its own rate in Hz.

    Args:
        sound: a file by `bytes` or `path`, or `array` with `sampling_rate`.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    import soundfile

    if "array" in sound:
        samples, rate = np.asarray(sound["array"], dtype=np.float32), int(sound["sampling_rate"])
    else:
        file = io.BytesIO(sound["bytes"]) if sound.get("bytes") else sound["path"]
        try:
            channels, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise InputError(f"cannot read the sound {sound.get('path')}: {told(error)}") from error
        samples = channels.mean(axis=1)
    if not len(samples):
        raise InputError(f"the sound {sound.get('path')} is empty")
    return samples, rate
