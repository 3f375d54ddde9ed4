"""Sounds: files of all kinds to the model's inputs, and a tiny model judged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

from potstill.validate.audio import AudioEncoder
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS
from tests.predicted import predicted

AUDIO = TASKS["audio-classification"]
CPU = torch.device("cpu")
TONE = np.sin(2 * np.pi * 440 * np.arange(4800) / 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16, num_feat_extract_layers=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wav2vec2")
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


def test_a_trained_model_is_right(sound_teacher: Path, sounds: dict[str, Path]) -> None:
    model = AUDIO.load(Checkpoint(str(sound_teacher)))
    examples = AUDIO.checked(AUDIO.examples(str(sounds["eval"]), {}, judging=True), model.labels, judging=True)
    rows = predicted(TorchPredictor(model, "teacher", CPU), examples)
    card = AUDIO.judge(rows, rows, examples, model.encode)
    assert (card.metric, card.examples) == ("accuracy", 40)
    assert card.value > 0.95


def test_an_extractor_of_samples_pads_to_the_length_that_is_kept(wav2vec2: Path) -> None:
    model = AUDIO.load(Checkpoint(str(wav2vec2)), max_seconds=0.2)
    rows = {"audio": [{"array": TONE[:1000], "sampling_rate": 16_000}, {"array": TONE, "sampling_rate": 16_000}]}
    values = model.encode(rows)["input_values"]
    assert values.shape == (2, 3200)
    assert model.encode.truncated == 1
    np.testing.assert_allclose(values[0, :1000], (TONE[:1000] - TONE[:1000].mean()) / TONE[:1000].std(), atol=1e-3)
    assert not values[0, 1000:].any()
    alone = model.answers(model.tensors({"audio": rows["audio"][:1]}, CPU))
    torch.testing.assert_close(alone[0], model.answers(model.tensors(rows, CPU))[0])


@pytest.mark.parametrize(("seconds", "samples"), [(None, 5120), (0.1, 1600), (9.0, 5120)])
def test_an_extractor_of_spectrograms_has_a_length_of_its_own(
    sound_teacher: Path, seconds: float | None, samples: int
) -> None:
    encode = AUDIO.load(Checkpoint(str(sound_teacher)), max_seconds=seconds).encode
    assert isinstance(encode, AudioEncoder)
    assert encode.samples == samples
    assert encode({"audio": [{"array": TONE, "sampling_rate": 16_000}]})["input_values"].shape == (1, 32, 32)


def test_files_of_another_rate_and_of_two_channels(wav2vec2: Path, tmp_path: Path) -> None:
    encode = AUDIO.load(Checkpoint(str(wav2vec2)), max_seconds=0.3).encode
    slow = np.sin(2 * np.pi * 440 * np.arange(2400) / 8000).astype(np.float32)
    soundfile.write(tmp_path / "slow.wav", np.stack([slow * 1.5, slow * 0.5], axis=1), 8000, subtype="FLOAT")
    found = encode({"audio": [{"bytes": None, "path": str(tmp_path / "slow.wav")}]})["input_values"][0]
    expected = resample(slow, 4800)  # by Fourier, where ours is polyphase
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    held = encode({"audio": [{"bytes": (tmp_path / "slow.wav").read_bytes(), "path": "slow.wav"}]})["input_values"][0]
    np.testing.assert_array_equal(held, found)


@pytest.mark.parametrize(
    ("content", "match"), [(b"no sound", "cannot read the sound .*a.wav"), (None, "the sound .*a.wav is empty")]
)
def test_broken_files(wav2vec2: Path, tmp_path: Path, content: bytes | None, match: str) -> None:
    if content is None:
        soundfile.write(tmp_path / "a.wav", np.zeros(0, dtype=np.float32), 16_000)
    else:
        (tmp_path / "a.wav").write_bytes(content)
    encode = AUDIO.load(Checkpoint(str(wav2vec2))).encode
    with pytest.raises(InputError, match=match):
        encode({"audio": [{"bytes": None, "path": str(tmp_path / "a.wav")}]})


def test_an_extractor_without_a_fixed_length_is_refused() -> None:
    class Loose:
        sampling_rate = 16_000

    task: Any = AUDIO
    with pytest.raises(InputError, match="Loose.*no fixed length"):
        task.encoder(Loose(), None, Checkpoint("somewhere"))
