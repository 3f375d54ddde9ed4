"""Vocabularies cut to what the examples use: the same tokens for them, spelling for all else."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.compress.student import Student
from potstill.compress.vocabulary import cut_encoder, token_counts, tokens_to_keep, unknown_tokens
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import TASKS, Model

TEXT, IMAGE, CPU = TASKS["text-classification"], TASKS["image-classification"], torch.device("cpu")
CORPUS = [
    "the lowest tower is lower than the newest tower",
    "a new widow follows the slow window, wider and wiser",
    "well-known tales of the renewed wonders 1984 and 2010",
    "unknown fellows renew their vows in the widest hall",
]
USED = CORPUS[:2]


def examples_of(texts: list[str]) -> Examples:
    table = Arrays({"text": np.array(texts, dtype=object)})
    return Examples("some texts", table, np.arange(len(texts)) % 2, ("a", "b"), "digest")


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of that kind, trained on the corpus by its own library."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    names: dict[str, str] = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    match kind:
        case "wordpiece":
            backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
            trainer: Any = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
        case "bytes":
            backend = Tokenizer(models.BPE())
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet)
        case "bpe":
            backend = Tokenizer(
                models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>")
            )
            trainer = trainers.BpeTrainer(
                vocab_size=190, special_tokens=special, continuing_subword_prefix="##", end_of_word_suffix="</w>"
            )
        case _:
            backend = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    backend.normalizer = normalizers.NFKC()
    if kind == "bytes":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    elif kind == "unigram":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS * 3, trainer)
    ends = [("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>"))]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.post_processor = processors.RobertaProcessing(*ends) if kind == "bytes" else template
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def teacher_of(kind: str, folder: Path) -> Model:
    """An untrained RoBERTa, whose positions hang on the padding token's id, with that tokenizer; read from a folder."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = tokenizer_of(kind)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TEXT.load(Checkpoint(str(folder)))


KINDS = ["wordpiece", "bytes", "bpe", "unigram"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_model_is_the_same_on_the_texts_it_was_cut_for(kind: str, tmp_path: Path) -> None:
    teacher = teacher_of(kind, tmp_path / "teacher")
    student = Student(vocabulary="used")(teacher, TEXT, {}, 0, examples_of(USED))
    before, after = teacher.encode.tokenizer, student.encode.tokenizer  # type: ignore[attr-defined]
    assert len(after) < len(before)
    assert student.core.config.vocab_size == len(after) == len(student.core.get_input_embeddings().weight)  # type: ignore[operator]
    assert student.core.config.pad_token_id == after.pad_token_id == 1
    for text in USED:
        assert after.tokenize(text) == before.tokenize(text)
    rows = {"text": USED}
    assert np.array_equal(student.encode(rows)["attention_mask"], teacher.encode(rows)["attention_mask"])
    with torch.inference_mode():
        assert torch.equal(student.module(*student.batch(rows, CPU)), teacher.module(*teacher.batch(rows, CPU)))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_opened_again_it_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    teacher = teacher_of(kind, tmp_path / "teacher")
    student = Student(vocabulary="used")(teacher, TEXT, {}, 0, examples_of(USED))
    student.save(tmp_path / "student")
    opened = AutoTokenizer.from_pretrained(tmp_path / "student")
    ids = student.encode.tokenizer(CORPUS)["input_ids"]  # type: ignore[attr-defined]
    assert opened(CORPUS)["input_ids"] == ids
    assert opened.special_tokens_map == teacher.encode.tokenizer.special_tokens_map  # type: ignore[attr-defined]
    again = TEXT.load(Checkpoint(str(tmp_path / "student")))
    assert again.encode.same_as(student.encode)
    assert max(map(max, ids)) < student.core.config.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_were_not_used_are_spelled(kind: str, tmp_path: Path) -> None:
    teacher = teacher_of(kind, tmp_path / "teacher")
    student = Student(vocabulary="used")(teacher, TEXT, {}, 0, examples_of(USED))
    before, after = teacher.encode.tokenizer, student.encode.tokenizer  # type: ignore[attr-defined]
    unseen = CORPUS[3]
    assert len(after.tokenize(unseen)) > len(before.tokenize(unseen))
    assert before.tokenize(unseen).count("<unk>") == after.tokenize(unseen).count("<unk>") == 0
    foreign = "the 猫"
    assert after.tokenize(foreign).count("<unk>") == before.tokenize(foreign).count("<unk>")


def test_unseen_words_are_unknown_where_they_were_before(text_teacher: Path) -> None:
    """A vocabulary of whole words without letters cannot spell: what goes becomes [UNK]."""
    teacher = TEXT.load(Checkpoint(str(text_teacher)))
    student = Student(vocabulary="used")(teacher, TEXT, {}, 0, examples_of(["the film is good", "a very dull plot"]))
    tokenizer = student.encode.tokenizer  # type: ignore[attr-defined]
    assert tokenizer.tokenize("the film is lovely and dull") == ["the", "film", "is", "[UNK]", "[UNK]", "dull"]
    assert student.core.config.vocab_size == 5 + 8
    others = examples_of(["the film is lovely and dull", "a grim plot"])
    assert (unknown_tokens(student, others), unknown_tokens(teacher, others)) == (3, 0)


def test_tokens_before_the_padding_token_stay(tmp_path: Path) -> None:
    """RoBERTa counts its positions from the padding token's id, which therefore stays."""
    teacher = teacher_of("wordpiece", tmp_path)
    config: Any = teacher.core.config
    config.pad_token_id = 40
    none = np.zeros(config.vocab_size, dtype=np.int64)
    kept = tokens_to_keep(teacher.encode.tokenizer, none, "used", config)  # type: ignore[attr-defined]
    assert kept[:41] == [*range(41)]
    assert len(kept) < config.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_keeps_the_most_frequent(kind: str, tmp_path: Path) -> None:
    teacher = teacher_of(kind, tmp_path / "teacher")
    tokenizer, config = teacher.encode.tokenizer, teacher.core.config  # type: ignore[attr-defined]
    counts = token_counts(teacher, examples_of(USED))
    used = tokens_to_keep(tokenizer, counts, "used", config)
    least = tokens_to_keep(tokenizer, np.zeros_like(counts), "used", config)
    few = tokens_to_keep(tokenizer, counts, len(used) - 3, config)
    assert len(least) <= len(few) <= len(used) - 3
    assert {*least} <= {*few} < {*used}
    assert tokens_to_keep(tokenizer, counts, len(tokenizer), config) == used
    best = max(set(used) - set(least), key=lambda i: counts[i])
    assert best in few
    student = Student(vocabulary=len(few))(teacher, TEXT, {}, 0, examples_of(USED))
    assert student.core.config.vocab_size == len(few)
    with pytest.raises(
        InputError, match=f"vocabulary={len(least) - 1}: special tokens, .* they alone are {len(least)}"
    ):
        tokens_to_keep(tokenizer, counts, len(least) - 1, config)


def test_counts_are_those_of_the_tokens(text_teacher: Path, texts: dict[str, Path]) -> None:
    from collections import Counter

    teacher = TEXT.load(Checkpoint(str(text_teacher)))
    examples = load_examples(str(texts["calibrate"]), TEXT.features, {"text": "sentence"})
    counts = token_counts(teacher, examples)
    words = Counter(word for text in examples.rows(range(len(examples)))["text"] for word in text.split())
    ids = teacher.encode.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert {word: counts[ids[word]] for word in words} == dict(words)
    assert counts[ids["[CLS]"]] == len(examples)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    encode = teacher_of("bytes", tmp_path).encode
    tokenizer: Any = encode.tokenizer  # type: ignore[attr-defined]

    class Backend:
        no_truncation = no_padding = staticmethod(lambda: None)
        to_str = staticmethod(lambda: '{"model": {"type": "Other"}, "added_tokens": []}')

    class Odd:
        backend_tokenizer, all_special_ids = Backend(), tokenizer.all_special_ids

    with pytest.raises(
        InputError, match="vocabulary= cuts WordPiece, BPE and Unigram tokenizers, and this one is Other"
    ):
        tokens_to_keep(Odd(), np.ones(3, dtype=np.int64), "used", None)


def test_an_image_model_has_no_tokens(image_teacher: Path, pictures: dict[str, Path]) -> None:
    teacher = IMAGE.load(Checkpoint(str(image_teacher)))
    examples = load_examples(str(pictures["train"]), IMAGE.features, {}).with_labels(teacher.labels)
    with pytest.raises(InputError, match="vocabulary= cuts what a model's fast tokenizer gives"):
        Student(vocabulary="used")(teacher, IMAGE, {}, 0, examples)


def test_a_model_that_writes_tokens_is_refused(text_teacher: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    teacher = TEXT.load(Checkpoint(str(text_teacher)))
    config = BertConfig(**teacher.core.config.to_dict())
    writer = dataclasses.replace(teacher, core=BertForMaskedLM(config))
    with pytest.raises(InputError, match=r"this bert writes tokens too \(an output embedding\)"):
        Student(vocabulary="used")(writer, TEXT, {}, 0, examples_of(["the film"]))


def test_a_model_without_an_embedding_of_tokens_is_refused(text_teacher: Path, image_teacher: Path) -> None:
    from potstill.compress.anatomy import embedding

    with pytest.raises(InputError, match="a vit reads no tokens, so vocabulary= has nothing to cut"):
        embedding(IMAGE.load(Checkpoint(str(image_teacher))).core)


def test_the_encoder_keeps_its_length(text_teacher: Path) -> None:
    teacher = TEXT.load(Checkpoint(str(text_teacher)), max_length=7)
    encode = cut_encoder(teacher.encode, [0, 1, 2, 3, 4, 5])
    assert isinstance(encode, TextEncoder)
    assert (encode.max_length, encode.truncated) == (7, 0)
    assert encode({"text": ["good " * 9]})["input_ids"].tolist() == [[2, 5, 5, 5, 5, 5, 3]]


@pytest.mark.data
def test_on_the_real_teacher(real_data: Path) -> None:
    teacher = TEXT.load(Checkpoint(str(real_data / "sst2-teacher")))
    examples = load_examples(str(real_data / "sst2" / "train.tsv"), TEXT.features, {"text": "sentence"})
    some = examples.with_labels(teacher.labels).take([*range(0, len(examples), 100)], "every hundredth")
    student = Student(vocabulary="used")(teacher, TEXT, {}, 0, some)
    assert student.parameters < 0.75 * teacher.parameters
    rows = some.rows(range(64))
    with torch.inference_mode():
        ours, theirs = (m.module(*m.batch(rows, CPU)) for m in (student, teacher))
    assert torch.equal(ours, theirs)
