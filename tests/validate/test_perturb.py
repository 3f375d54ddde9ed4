"""Perturbations against independent references: what they do, how much of it, and that a row is always the same."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageFilter
from scipy.signal import periodogram

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Arrays, Examples, Pairs
from potstill.validate.perturb import LEVEL_DB, NEIGHBOURS, SNR_DB, TYPOS, in_words, perturbations_of, perturbed
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS
from tests.predicted import predicted

PICTURES = ("noise", "blur", "jpeg")
CPU = torch.device("cpu")


def of(table: Any) -> Examples:
    return Examples("set", table, np.zeros(len(table), dtype=int), ("a", "b"), "digest")


def of_columns(**columns: Any) -> Examples:
    return of(datasets.Dataset.from_dict(columns))


def of_texts(n: int, seed: int = 0) -> Examples:
    """Texts of 20 words of 4 to 8 letters, the first with a capital and a comma; a double space between the others."""
    rng = np.random.default_rng(seed)
    words = [
        ["".join(rng.choice(list("abcdefghij"), size=int(rng.integers(4, 9)))) for _ in range(20)] for _ in range(n)
    ]
    return of_columns(text=[" ".join(f"{one[0].title()}, {'  '.join(one[1:])}".split(" ")) for one in words])


def of_pictures(n: int, *shape: int) -> Examples:
    """Smooth pictures of bytes, far enough from black and white that little is cut off."""
    rng = np.random.default_rng(1)
    x = rng.integers(90, 166, size=(n, *shape)).astype(np.uint8)
    return of(Arrays({"x": x}))


def of_sounds(n: int, rate: int = 16_000) -> Examples:
    rng = np.random.default_rng(2)
    return of_columns(audio=[wav((0.1 * rng.normal(size=8000)).astype(np.float32), rate) for _ in range(n)])


def wav(samples: np.ndarray, rate: int) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": "a.wav"}


SETS: dict[str, Any] = {
    "text-classification": lambda: of_texts(12),
    "token-classification": lambda: of_columns(tokens=[text.split() for text in of_texts(12).table["text"]]),
    "question-answering": lambda: of_columns(
        question=of_texts(12).table["text"], context=of_texts(12, 1).table["text"],
        answers=[{"text": ["a"], "answer_start": [0]}] * 12,
    ),
    "feature-extraction": lambda: of(
        Pairs(datasets.Dataset.from_dict({"text": of_texts(12).table["text"], "text2": of_texts(12, 1).table["text"]}))
    ),
    "image-classification": lambda: of_columns(
        image=[Image.fromarray(x) for x in of_pictures(12, 20, 24, 3).rows(range(12))["x"]]
    ),
    "audio-classification": lambda: of_sounds(12),
    "module": lambda: of_pictures(12, 32, 32, 3),
    "floats": lambda: of(Arrays({"x": np.random.default_rng(3).normal(5, 2, (12, 40)).astype(np.float32)})),
}  # fmt: skip
EACH = [
    (kind, name)
    for kind, make in SETS.items()
    for name in perturbations_of("module" if kind == "floats" else kind, make())
]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same to the byte, and of one type."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, str | list):
        return type(one) is type(other) and one == other
    a, b = np.asarray(one), np.asarray(other)
    return type(one) is type(other) and (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


# Every kind of row.


def test_what_fits() -> None:
    found = {kind: perturbations_of("module" if kind == "floats" else kind, make()) for kind, make in SETS.items()}
    texts = dict.fromkeys(
        ("text-classification", "token-classification", "question-answering", "feature-extraction"), ("typos", "case")
    )
    assert found == texts | {
        "image-classification": PICTURES, "audio-classification": ("level", "noise"), "module": PICTURES,
        "floats": ("noise",),
    }  # fmt: skip


@pytest.mark.parametrize(
    "x", [np.zeros((2, 9), int), np.zeros((2, 30), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 9, 9))]
)
def test_what_fits_nothing(x: np.ndarray) -> None:
    assert perturbations_of("module", of(Arrays({"x": x}))) == ()
    with pytest.raises(InputError, match="no perturbation is known for what set holds, so leave out 'noise'"):
        perturbed(of(Arrays({"x": x})), "noise", "module")


def test_a_name_that_does_not_fit_is_told() -> None:
    with pytest.raises(InputError, match="'typo' does not perturb what set holds; did you mean 'typos'?"):
        perturbed(of_texts(2), "typo", "text-classification")
    with pytest.raises(InputError, match="'jpeg' does not perturb what set holds; known: case, typos"):
        in_words(of_texts(2), "jpeg", "text-classification")


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_row_is_the_same_in_any_order(kind: str, name: str) -> None:
    examples, task = SETS[kind](), "module" if kind == "floats" else kind
    harder = perturbed(examples, name, task)
    column = next(column for column, values in harder.rows([0]).items() if not same(values, examples.rows([0])[column]))
    each = 2 if kind == "feature-extraction" else 1
    alone = [harder.rows([i])[column] for i in range(12)]
    assert all(len(values) == each for values in alone)
    order = [7, 3, 3, 11, 0]
    some = harder.rows(order)[column]
    for place, i in enumerate(order):
        assert all(same(a, b) for a, b in zip(some[place * each : (place + 1) * each], alone[i], strict=True))
    taken = harder.take([9, 7, 2], "some").take([2, 1], "fewer")
    for place, i in enumerate([2, 7]):
        assert all(same(a, b) for a, b in zip(taken.rows([place])[column], alone[i], strict=True))
    assert len(harder) == 12
    assert len(taken) == len(taken.table) == 2
    assert isinstance(some, np.ndarray) == (task == "module")
    others = {other for other in harder.rows([0]) if other != column}
    assert all(same(harder.rows([4])[other], examples.rows([4])[other]) for other in others)


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_names_and_digests(kind: str, name: str) -> None:
    examples, task = SETS[kind](), "module" if kind == "floats" else kind
    offsets = np.arange(13)
    harder = perturbed(replace(examples, offsets=offsets), name, task)
    assert harder.name == f"set, {in_words(examples, name, task)}"
    assert harder.labels is examples.labels
    assert harder.offsets is offsets
    assert harder.label_names == ("a", "b")
    others = [perturbed(examples, other, task).digest for other in perturbations_of(task, examples)]
    assert len({*others, examples.digest}) == len(others) + 1
    assert harder.digest in others
    assert harder.digest != perturbed(replace(examples, digest="another"), name, task).digest


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_row_reads_that_row_only(kind: str, name: str) -> None:
    class Counted:
        def __init__(self, table: Any) -> None:
            self.table, self.read = table, list[int]()

        def __len__(self) -> int:
            return len(self.table)

        def __getitem__(self, indices: Any) -> Any:
            self.read += list(indices)
            return self.table[indices]

    counted = Counted(SETS[kind]().table)
    harder = perturbed(of(counted), name, "module" if kind == "floats" else kind)
    counted.read.clear()
    harder.rows([5])
    harder.rows([8, 2])
    assert counted.read == [5, 8, 2]


def test_no_rows() -> None:
    assert perturbed(of_texts(3), "typos", "text-classification").rows([]) == {"text": []}


def test_the_draws_are_of_this_version() -> None:
    """Other draws of the same version would be taken for the old ones: raise VERSION with what stands here."""
    text = "Generators whose streams seldom change"
    found = perturbed(of_columns(text=[text] * 3), "typos", "text-classification").rows([0, 1, 2])["text"]
    assert [[word for word in one.split() if word not in text] for one in found] == [["srteams"], ["cuange"], []]
    noisy = perturbed(of(Arrays({"x": np.full((2, 8, 8), 100, np.uint8)})), "noise", "module").rows([1])["x"]
    assert noisy[0, 0].tolist() == [135, 71, 121, 138, 102, 109, 63, 136]


# Pictures.


@pytest.mark.parametrize(
    ("shape", "noise", "blur", "jpeg"),
    [
        ((28, 28), 0.08, 0.7, 58), ((3, 32, 48), 0.08, 0.7, 58), ((64, 64, 3), 0.12, 1.0, 50),
        ((96, 96, 1), 0.12, 1.0, 50), ((224, 224, 3), 0.18, 3.0, 15), ((1, 300, 130), 0.18, 3.0, 15),
    ],
)  # fmt: skip
def test_pictures_are_as_in_the_benchmark_of_their_size(
    shape: tuple[int, ...], noise: float, blur: float, jpeg: int
) -> None:
    """The severities 3 of CIFAR-10-C, Tiny ImageNet-C and ImageNet-C, in every layout."""
    examples = of_pictures(2, *shape)
    x = examples.rows([0, 1])["x"]
    found = {name: perturbed(examples, name, "module").rows([0, 1])["x"] for name in PICTURES}
    assert all(y.shape == x.shape and y.dtype == np.uint8 for y in found.values())
    added = found["noise"].astype(float) - x
    assert added.std() == pytest.approx(255 * noise, rel=0.05)
    assert abs(added.mean()) < 255 * noise * 5 / np.sqrt(x.size)
    planes = [0] if len(shape) == 2 else list(range(3 if 3 in shape else 1))
    for plane in planes:
        before, blurred, again = (plane_of(y[0], plane) for y in (x, found["blur"], found["jpeg"]))
        np.testing.assert_allclose(blurred, blurred_by_hand(before, blur), atol=0.55)  # rounding, and where it ends
        by_boxes = np.asarray(Image.fromarray(before).filter(ImageFilter.GaussianBlur(blur))).astype(float)
        assert np.abs(blurred - by_boxes).max() < 8
        assert np.abs(blurred - before.astype(float)).mean() > 5
        if len(planes) == 1:
            assert same(again, encoded(Image.fromarray(before), jpeg))
    if len(planes) == 3:
        colours = np.moveaxis(x[0], 0, 2) if shape[0] == 3 else x[0]
        again = np.moveaxis(found["jpeg"][0], 0, 2) if shape[0] == 3 else found["jpeg"][0]
        np.testing.assert_array_equal(again, encoded(Image.fromarray(np.ascontiguousarray(colours)), jpeg))
    words = (f"of {noise * 100:.0f} % of the range", f"of {blur:g} pixels", f"JPEG quality {jpeg}")
    assert all(in_words(examples, name, "module").endswith(end) for name, end in zip(PICTURES, words, strict=True))


def plane_of(picture: np.ndarray, plane: int) -> np.ndarray:
    if picture.ndim == 2:
        return picture
    return np.ascontiguousarray(picture[plane] if picture.shape[0] in (1, 3) else picture[..., plane])


def blurred_by_hand(plane: np.ndarray, sigma: float) -> np.ndarray:
    """By the sampled Gaussian, first along rows and then along columns, on a picture continued by its own edges."""
    reach = np.arange(-20, 21)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    wide = np.pad(plane.astype(float), 20, mode="edge")
    for axis in (0, 1):
        wide = np.apply_along_axis(np.convolve, axis, wide, kernel / kernel.sum(), mode="valid")
    return wide


def encoded(image: Image.Image, quality: int) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return np.array(Image.open(file))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    ("mode", "size", "after"),
    [("L", (30, 20), "L"), ("RGBA", (30, 20), "RGB"), ("P", (30, 20), "RGB"), ("RGB", (1024, 600), "RGB")],
)
def test_pictures_of_pil(name: str, mode: str, size: tuple[int, int], after: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    (found,) = perturbed(of_columns(image=[image]), name, "image-classification").rows([0])["image"]
    assert found.mode == after
    assert found.size == (size if size[1] == 20 else (437, 256))  # a large one is as ImageNet-C's
    assert not same(np.asarray(found), np.asarray(image.convert(after).resize(found.size, Image.Resampling.BILINEAR)))


def test_noise_is_another_one_for_each_picture_and_colour() -> None:
    examples = of(Arrays({"x": np.full((2, 40, 40, 3), 128, np.uint8)}))
    a, b = perturbed(examples, "noise", "module").rows([0, 1])["x"].astype(float).reshape(2, -1)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert abs(np.corrcoef(a[::3], a[1::3])[0, 1]) < 0.1


# Sounds, and arrays of floats.


def test_noise_of_a_sound_has_its_ratio_and_is_white() -> None:
    examples = of_sounds(4, rate=8000)
    for row in range(4):
        clean, rate = soundfile.read(io.BytesIO(examples.rows([row])["audio"][0]["bytes"]))
        found = perturbed(examples, "noise", "audio-classification").rows([row])["audio"][0]
        assert found["sampling_rate"] == rate == 8000
        assert found["array"].dtype == np.float32
        noise = found["array"] - clean
        assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(SNR_DB, abs=0.2)
        power = periodogram(noise)[1][1:].reshape(-1, 1)[:3996].reshape(4, -1).mean(axis=1)
        assert power.max() / power.min() < 1.3


def test_half_of_the_sounds_are_louder_and_half_quieter() -> None:
    examples, shares = of_sounds(200), []
    clean = [soundfile.read(io.BytesIO(one["bytes"]))[0] for one in examples.rows(range(200))["audio"]]
    found = perturbed(examples, "level", "audio-classification").rows(range(200))["audio"]
    for before, after in zip(clean, (one["array"] for one in found), strict=True):
        uncut = np.abs(after) < 1
        shares.append(10 * np.log10((after[uncut] ** 2).sum() / (before[uncut] ** 2).sum()))
        assert np.abs(after).max() <= 1
    assert {round(share, 3) for share in shares} == {-LEVEL_DB, LEVEL_DB}
    assert 70 <= sum(share > 0 for share in shares) <= 130
    assert any((np.abs(one["array"]) == 1).any() for one in found)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_noise_of_an_array_is_by_its_own_deviation(kind: Any) -> None:
    scales = np.array([0.01, 1, 100])
    x = (7 + scales[:, None, None] * np.random.default_rng(0).normal(size=(3, 50, 80))).astype(kind)
    found = perturbed(of(Arrays({"x": x})), "noise", "module").rows([0, 1, 2])["x"]
    assert found.dtype == kind
    added = (found.astype(float) - x).std(axis=(1, 2))
    np.testing.assert_allclose(added[1:], scales[1:] * 0.316, rtol=0.05)  # 10 dB: a power of a tenth
    same_value = of(Arrays({"x": np.full((1, 9), 5, dtype=kind)}))
    np.testing.assert_array_equal(perturbed(same_value, "noise", "module").rows([0])["x"], np.full((1, 9), 5))


# Texts.


def edits(a: str, b: str) -> int:
    """Optimal string alignment (Damerau 1964): letters put in, left out, replaced, or swapped with the next."""
    d = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    d[:, 0], d[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
    return int(d[-1, -1])


def test_typos_are_one_edit_in_a_tenth_of_the_words() -> None:
    examples = of_texts(500)
    harder = perturbed(examples, "typos", "text-classification")
    before, after = (one.rows(range(500))["text"] for one in (examples, harder))
    assert [re.findall(r"\s+", text) for text in before] == [re.findall(r"\s+", text) for text in after]
    pairs = [list(zip(a.split(), b.split(), strict=True)) for a, b in zip(before, after, strict=True)]
    assert {sum(a != b for a, b in pair) for pair in pairs} == {round(TYPOS * 20)}
    changed = [(a, b) for pair in pairs for a, b in pair if a != b]
    assert {edits(a, b) for a, b in changed} == {1}
    assert all(a[0] == b[0] and a[-1] == b[-1] for a, b in changed)
    longer = [len(b) - len(a) for a, b in changed]
    shares = [longer.count(by) / len(longer) for by in (-1, 1, 0)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.06)
    level = [(a, b) for a, b in changed if len(a) == len(b)]
    swapped = [sorted(a.lower()) == sorted(b.lower()) for a, b in level]
    assert 0.35 < np.mean(swapped) < 0.65
    for (a, b), was in zip(level, swapped, strict=True):
        if not was:
            ((old, new),) = ((x, y) for x, y in zip(a, b, strict=True) if x != y)
            assert new in NEIGHBOURS[old]


def test_the_number_of_typos_is_rounded_by_chance() -> None:
    examples = of_columns(text=["thirteen words"] * 1000)
    found = perturbed(examples, "typos", "text-classification").rows(range(1000))["text"]
    counts = [sum(a != b for a, b in zip(text.split(), ("thirteen", "words"), strict=True)) for text in found]
    assert set(counts) == {0, 1}
    assert 0.16 < np.mean(counts) < 0.24  # a tenth of two words


def test_what_has_no_typos() -> None:
    texts = ["", "  ", "a an the 12345 !!! :-)", "abc def ghi jkl mno pqr stu vwx yza bcd"]
    assert perturbed(of_columns(text=texts), "typos", "text-classification").rows(range(4))["text"] == texts


def test_typos_of_other_alphabets_and_of_capitals() -> None:
    examples = of_columns(text=["КОНФЕРЕНЦИЯ"] * 300 + ["CONFERENCE"] * 300)
    found = perturbed(examples, "typos", "text-classification").rows(range(600))["text"]
    assert 10 < sum(text != "КОНФЕРЕНЦИЯ" for text in found[:300]) < 60
    assert all(text.isupper() for text in found)
    assert {edits(text, "КОНФЕРЕНЦИЯ") for text in found[:300]} == {0, 1}


def test_neighbours_are_those_of_a_keyboard() -> None:
    assert {letter: "".join(sorted(NEIGHBOURS[letter])) for letter in "qagpm"} == {
        "q": "aw", "a": "qswz", "g": "bfhtvy", "p": "lo", "m": "jkn",
    }  # fmt: skip
    assert len(NEIGHBOURS) == 26
    assert all(one in NEIGHBOURS[other] for one, others in NEIGHBOURS.items() for other in others)


def test_case() -> None:
    texts = ["New York is LOUD.", "all low", "iPhone", "12", "Straße"]
    found = perturbed(of_columns(text=texts), "case", "text-classification").rows(range(5))["text"]
    assert found == ["new york is loud.", "ALL LOW", "iphone", "12", "straße"]
    words = of_columns(tokens=[["New", "york"], ["new", "york"]])
    assert perturbed(words, "case", "token-classification").rows([0, 1])["tokens"] == [["new", "york"], ["NEW", "YORK"]]


@pytest.mark.parametrize("name", ["typos", "case"])
def test_labels_stay_true(name: str) -> None:
    tokens, asked = SETS["token-classification"](), SETS["question-answering"]()
    assert perturbed(tokens, name, "token-classification").lengths("tokens").tolist() == [20] * 12
    harder = perturbed(asked, name, "question-answering").rows(range(12))
    before = asked.rows(range(12))
    assert harder["context"] == before["context"]
    assert harder["answers"] == before["answers"]
    assert all(a != b for a, b in zip(harder["question"], before["question"], strict=True))


def test_both_texts_of_a_pair_are_perturbed_each_in_its_own_way() -> None:
    texts = of_texts(200).table["text"]
    pairs = of(Pairs(datasets.Dataset.from_dict({"text": texts, "text2": texts})))
    found = perturbed(pairs, "typos", "feature-extraction")
    rows = found.rows(range(200))["text"]
    assert all(a != text != b for a, b, text in zip(rows[::2], rows[1::2], texts, strict=True))
    assert sum(a != b for a, b in zip(rows[::2], rows[1::2], strict=True)) > 190
    np.testing.assert_array_equal(found.lengths("text"), [max(map(len, rows[2 * i : 2 * i + 2])) for i in range(200)])


# The encoders that the tasks really have.


@pytest.mark.parametrize(
    ("task", "teacher", "files", "columns"),
    [
        ("text-classification", "text_teacher", "texts", {"text": "sentence"}),
        ("token-classification", "tag_teacher", "tag_files", {}),
        ("question-answering", "span_teacher", "span_files", {}),
        ("feature-extraction", "text_teacher", "pair_files", {}),
        ("image-classification", "image_teacher", "pictures", {}),
        ("audio-classification", "sound_teacher", "sounds", {}),
    ],
)
def test_models_take_them_and_are_worse(
    task: str, teacher: str, files: str, columns: dict[str, str], request: pytest.FixtureRequest
) -> None:
    of_task = TASKS[task]
    folder: Path = request.getfixturevalue(teacher)
    model = of_task.load(Checkpoint(str(folder)))
    source = request.getfixturevalue(files)["eval"]
    examples = of_task.checked(of_task.examples(str(source), columns, judging=True), model.labels, judging=True)
    clean = predicted(TorchPredictor(model, "teacher", CPU), examples, of_task.length_of)
    value = of_task.judge(clean, clean, examples, model.encode).value
    for name in perturbations_of(task, examples):
        harder = perturbed(examples, name, task)
        rows = predicted(TorchPredictor(model, "teacher", CPU), harder, of_task.length_of)
        card = of_task.judge(rows, rows, harder, model.encode)
        assert card.data == harder.name
        assert card.value <= value + 0.02
        if name == "typos" and task != "question-answering":  # those questions have no long words
            assert card.value < value
        if name == "case":  # these tokenizers do not look at case
            np.testing.assert_array_equal(rows, clean)


def test_a_module_takes_them() -> None:
    for kind in ("module", "floats"):
        examples = SETS[kind]()
        for name in perturbations_of("module", examples):
            found = ArrayEncoder()(perturbed(examples, name, "module").rows(range(12)))["x"]
            assert found.dtype == np.float32
            assert found.shape == examples.rows(range(12))["x"].shape
