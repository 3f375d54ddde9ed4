"""Small real models and data that the tests share."""

import csv
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # these models are small: two threads on a busy machine wait for each other
os.environ.setdefault("HF_DATASETS_CACHE", str(Path(os.environ.get("TMPDIR", "/tmp")) / "potstill-tests-datasets"))

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
GOOD, BAD = ["good", "great", "fine", "lovely", "bright"], ["bad", "poor", "dull", "awful", "grim"]
FILLER = ["the", "film", "is", "a", "very", "and", "plot", "with", "some", "scenes"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real checkpoints and data; a visible skip where it is not."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set POTSTILL_DATA")
    return DATA


def sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """Texts whose class is whether good or bad words are more."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = int(rng.integers(2))
        words = list(rng.choice(FILLER, size=int(rng.integers(2, 9))))
        words += list(rng.choice(GOOD if label else BAD, size=2)) + list(rng.choice(BAD if label else GOOD, size=1))
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_tsv(path: Path, rows: list[tuple[str, int]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        writer.writerow(["sentence", "label"])
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train` (600), `calibrate` (40) and `eval` (200) of labelled sentences."""
    folder = tmp_path_factory.mktemp("texts")
    sizes = {"train": 600, "calibrate": 40, "eval": 200}
    return {name: write_tsv(folder / f"{name}.tsv", sentences(n, i)) for i, (name, n) in enumerate(sizes.items())}


@pytest.fixture(scope="session")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer BERT with its tokenizer, trained on such sentences until it is nearly always right."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = BertTokenizerFast(tokenizer_object=backend)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    rows = sentences(1500, seed=99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(len(rows))
        for start in range(0, len(rows), 50):
            batch = [rows[i] for i in order[start : start + 50]]
            encoded = tokenizer([text for text, _ in batch], padding=True, return_tensors="pt")
            loss = model(**encoded, labels=torch.tensor([label for _, label in batch])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 12, 12, 3), uint8, with a bright quarter; the class is which of the four."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    x = rng.integers(0, 140, size=(n, 12, 12, 3))
    for i, quarter in enumerate(y):
        down, right = 6 * (quarter // 2), 6 * (quarter % 2)
        x[i, down : down + 6, right : right + 6] += 70
    return x.astype(np.uint8), y.astype(np.int64)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz with `train_x`, `train_y` (600) and `test_x`, `test_y` (300)."""
    path = tmp_path_factory.mktemp("arrays") / "blobs.npz"
    (train_x, train_y), (test_x, test_y) = blobs(600, 0), blobs(300, 1)
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `train` (160) and `eval` (80) of class folders with PNG files."""
    from PIL import Image

    folders = {}
    for seed, (name, n) in enumerate({"train": 160, "eval": 80}.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        for i, (x, y) in enumerate(zip(*blobs(n, seed), strict=True)):
            place = folders[name] / f"quarter{y}"
            place.mkdir(exist_ok=True)
            Image.fromarray(x).save(place / f"{i}.png")
    return folders


@pytest.fixture(scope="session")
def image_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer ViT with its image processor, trained on such pictures."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = [f"quarter{i}" for i in range(4)]
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=12, patch_size=6,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    x, y = blobs(800, 7)
    pixels = torch.from_numpy(processor(images=list(x), return_tensors="np")["pixel_values"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for index in torch.randperm(len(y)).split(50):
            model(pixel_values=pixels[index], labels=torch.from_numpy(y)[index]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "vit"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
