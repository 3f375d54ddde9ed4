"""Small real models and data that the tests share."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["POTSTILL_DECIDED_BY"] = "the tests"  # their models are made on the spot; tests of licences unset it
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # these models are small: two threads on a busy machine wait for each other
os.environ.setdefault("HF_DATASETS_CACHE", str(Path(os.environ.get("TMPDIR", "/tmp")) / "potstill-tests-datasets"))

import numpy as np
import pytest
import torch

from potstill.export import graph
from tests.exports import once

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
EXPORT = graph._exported
LONGEST = (  # files go to workers one by one: a long one at the end would keep one worker busy alone
    "pipeline/test_road.py", "targets/test_browser.py", "pipeline/test_tasks.py", "pipeline/test_emulating.py",
    "export/test_deterministic.py", "export/test_search.py", "pipeline/test_npu_road.py", "compress/test_prune.py",
    "pipeline/test_bad_input.py", "compress/test_qat.py", "pipeline/test_judging.py", "pipeline/test_profiling.py",
    "pipeline/test_search_road.py", "targets/test_wire.py", "export/test_adopt.py", "targets/test_emulate.py",
    "compress/test_output_cache.py", "pipeline/test_onnx_road.py", "export/test_quantize.py",
)  # fmt: skip
GOOD, BAD = ["good", "great", "fine", "lovely", "bright"], ["bad", "poor", "dull", "awful", "grim"]
FILLER = ["the", "film", "is", "a", "very", "and", "plot", "with", "some", "scenes"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    place = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in place)
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same transformer is exported once in a session, by all workers together; see `exports.py`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_exported", once(EXPORT, folder))
        yield


@pytest.fixture
def exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the export itself."""
    monkeypatch.setattr(graph, "_exported", EXPORT)


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


def word_tokenizer(words: list[str]) -> Any:
    """A fast BERT tokenizer whose vocabulary is these words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return BertTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer BERT with its tokenizer, trained on such sentences until it is nearly always right."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_tokenizer([*GOOD, *BAD, *FILLER])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
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


FIRST, LAST, PLACES = ["anna", "boris", "carla"], ["smith", "jones", "lee"], ["paris", "oslo", "lima"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tagged(n: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Sentences with the names of people and places; some words are two tokens (`parisian`, `jonesian`)."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        words, tags = [], []
        for _ in range(int(rng.integers(2, 5))):
            kind = rng.integers(3)
            if kind == 0:
                found, said = list(rng.choice(FILLER, size=2)), ["O", "O"]
            elif kind == 1:
                found, said = [str(rng.choice(FIRST)), str(rng.choice(LAST))], ["B-PER", "I-PER"]
            else:
                found, said = ["new", str(rng.choice(PLACES))], ["B-LOC", "I-LOC"]
            words += [f"{word}ian" if rng.random() < 0.2 and kind else str(word) for word in found]
            tags += said
        rows.append((words, tags))
    return rows


@pytest.fixture(scope="session")
def tag_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train` (300) and `eval` (120) of `tokens` and `tags`, by name."""
    folder = tmp_path_factory.mktemp("tags")
    for seed, (name, n) in enumerate({"train": 300, "eval": 120}.items()):
        lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in tagged(n, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: folder / f"{name}.jsonl" for name in ("train", "eval")}


@pytest.fixture(scope="session")
def tag_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer BERT with its tokenizer, trained on such sentences."""
    from transformers import BertConfig, BertForTokenClassification

    tokenizer = word_tokenizer([*FILLER, *FIRST, *LAST, *PLACES, "new", "##ian"])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, id2label=dict(enumerate(TAGS)), label2id={tag: i for i, tag in enumerate(TAGS)},
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = BertForTokenClassification(config), tagged(300, seed=99)
    encoded = tokenizer([words for words, _ in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full(encoded["input_ids"].shape, -100)
    for i, (_, tags) in enumerate(rows):
        for place, word in enumerate(encoded.word_ids(i)):
            if word is not None:
                labels[i, place] = TAGS.index(tags[word])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(4):
        for index in torch.randperm(len(rows)).split(30):
            batch = {name: tensor[index] for name, tensor in encoded.items()}
            model(**batch, labels=labels[index]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "tagger"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train` (400 single texts) and `eval` (150 pairs, whose score is higher for texts of one class)."""
    folder = tmp_path_factory.mktemp("pairs")
    train = [json.dumps({"text": text}) for text, _ in sentences(400, 20)]
    (folder / "train.jsonl").write_text("\n".join(train))
    pairs = zip(sentences(150, 21), sentences(150, 22), strict=True)
    rows = [{"text": a, "text2": b, "label": 4.5 * (y == z) + 0.1 * len(a)} for (a, y), (b, z) in pairs]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: folder / f"{name}.jsonl" for name in ("train", "eval")}


def tones(n: int, seed: int) -> list[tuple[np.ndarray, int]]:
    """Sounds of 0.2 to 0.5 seconds at 16 kHz, float32; the class is whether a tone is high."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        high, samples = int(rng.integers(2)), int(rng.integers(3200, 8000))
        hertz = rng.uniform(300, 500) * (6 if high else 1)
        tone = np.sin(2 * np.pi * hertz * np.arange(samples) / 16_000 + rng.uniform(0, 6))
        found.append(((0.3 * tone + 0.05 * rng.normal(size=samples)).astype(np.float32), high))
    return found


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `train` (60) and `eval` (40) of class folders with WAV files."""
    import soundfile

    folders = {}
    for seed, (name, n) in enumerate({"train": 60, "eval": 40}.items()):
        folders[name] = tmp_path_factory.mktemp(f"sounds-{name}")
        for i, (sound, high) in enumerate(tones(n, seed)):
            place = folders[name] / ("high" if high else "low")
            place.mkdir(exist_ok=True)
            soundfile.write(place / f"{i}.wav", sound, 16_000)
    return folders


@pytest.fixture(scope="session")
def sound_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer audio spectrogram transformer with its feature extractor, trained on such sounds."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_length=32,
        num_mel_bins=32, id2label={0: "high", 1: "low"}, label2id={"high": 0, "low": 1},
    )  # fmt: skip
    extractor = ASTFeatureExtractor(max_length=32, num_mel_bins=32)
    torch.manual_seed(0)
    model, rows = ASTForAudioClassification(config), tones(120, 9)
    spectrograms = extractor([sound for sound, _ in rows], sampling_rate=16_000, return_tensors="pt")["input_values"]
    labels = torch.tensor([1 - high for _, high in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(4):
        for index in torch.randperm(len(rows)).split(20):
            model(input_values=spectrograms[index], labels=labels[index]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "ast"
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def questions(n: int, seed: int) -> list[dict[str, Any]]:
    """Contexts with a person and a place; the question asks for the person."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        person = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        place = f"new {rng.choice(PLACES)}"
        parts = [person, place, *(str(word) for word in rng.choice(FILLER, size=int(rng.integers(2, 7))))]
        rng.shuffle(parts)
        context, asked = " ".join(parts), str(rng.choice(["who", "who is it"]))
        answers = {"text": [person], "answer_start": [context.index(person)]}
        rows.append({"question": asked, "context": context, "answers": answers})
    return rows


@pytest.fixture(scope="session")
def span_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train` (300) and `eval` (100) of questions as SQuAD has them."""
    folder = tmp_path_factory.mktemp("questions")
    for seed, (name, n) in enumerate({"train": 300, "eval": 100}.items()):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions(n, seed))))
    return {name: folder / f"{name}.jsonl" for name in ("train", "eval")}


@pytest.fixture(scope="session")
def span_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer BERT with its tokenizer, trained on such questions."""
    from transformers import BertConfig, BertForQuestionAnswering

    tokenizer = word_tokenizer([*FILLER, *FIRST, *LAST, *PLACES, "new", "##ian", "who", "where", "it", "good"])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = BertForQuestionAnswering(config), questions(300, seed=99)
    asked, contexts = [row["question"] for row in rows], [row["context"] for row in rows]
    encoded = tokenizer(asked, contexts, padding=True, return_tensors="pt")
    spans = []
    for i, row in enumerate(rows):
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0]) - 1
        spans.append([encoded.char_to_token(i, place, sequence_index=1) for place in (start, end)])
    starts, ends = torch.tensor(spans).T
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for index in torch.randperm(len(rows)).split(30):
            batch = {name: tensor[index] for name, tensor in encoded.items()}
            model(**batch, start_positions=starts[index], end_positions=ends[index]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "spans"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stories(n: int, seed: int) -> list[str]:
    """Texts of 1 to 9 sentences, each of which says who, does what, to whom; half of the words follow from others."""
    rng = np.random.default_rng(seed)
    who, does = ["tom", "ann", "dog", "cat"], {"tom": "sees", "ann": "likes", "dog": "finds", "cat": "hears"}
    found = []
    for _ in range(n):
        said = []
        for _ in range(int(rng.integers(1, 10))):
            one, other = rng.choice(who, size=2)
            said += [str(one), does[str(one)], "the", "big" if other in ("dog", "cat") else "old", str(other), "."]
        found.append(" ".join(said))
    return found


@pytest.fixture(scope="session")
def story_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `train` (200) and `eval` (60) of texts."""
    folder, files = tmp_path_factory.mktemp("stories"), {}
    for seed, (name, n) in enumerate({"train": 200, "eval": 60}.items()):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(n, seed)))
    return files


def story_tokenizer() -> Any:
    """A fast tokenizer of these words, which begins each text with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted({word for text in stories(100, 0) for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def story_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with its tokenizer, trained on such texts until it knows what follows from what."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = story_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [tokenizer(text)["input_ids"] for text in stories(600, 99)]
    for start in range(0, len(rows), 12):
        batch = rows[start : start + 12]
        ids = torch.full((12, max(map(len, batch))), -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
