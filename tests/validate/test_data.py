"""Every kind of source, and every way it can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.validate.data import (
    IGNORED,
    Arrays,
    Examples,
    check_evaluation_set,
    join,
    load_columns,
    load_examples,
    split_key,
)
from potstill.validate.errors import InputError, Unreachable
from potstill.validate.leaks import shared

ROWS = [("a fine film", 1), ('dull "plot', 0), ("null", 1)]
COLUMNS = {"text": "sentence"}


def write(path: Path) -> Path:
    """The rows in the format of the file's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"sentence": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"sentence": t, "label": y}) + "\n" for t, y in ROWS))
    elif path.suffix == ".csv":
        path.write_text("sentence,label\n" + "".join('"' + t.replace('"', '""') + f'",{y}\n' for t, y in ROWS))
    else:
        path.write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in ROWS))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_with_named_columns(tmp_path: Path, suffix: str) -> None:
    examples = load_examples(str(write(tmp_path / f"rows{suffix}")), ("text",), COLUMNS)
    assert examples.rows([2, 0, 1])["text"] == ["null", "a fine film", 'dull "plot']
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.take([1], "one").rows([0])["text"] == ['dull "plot']


@pytest.mark.parametrize(("stem", "key"), [("test_x", "test"), ("x_test", "test"), ("x", None)])
def test_arrays(tmp_path: Path, stem: str, key: str | None) -> None:
    x, y = np.arange(24.0).reshape(6, 4), np.arange(6) % 2
    path = tmp_path / "a.npz"
    np.savez(path, **{stem: x, stem.replace("x", "y"): y, "other_x": x})
    examples = load_examples(f"{path}:{key}" if key else str(path), ("x",), {})
    assert np.array_equal(examples.rows([5, 0])["x"], x[[5, 0]])
    assert np.array_equal(examples.take([2, 3], "two").rows([1])["x"], x[[3]])


def test_a_folder_of_class_folders(pictures: dict[str, Path]) -> None:
    examples = load_examples(str(pictures["eval"]), ("image",), {})
    assert examples.label_names == ("quarter0", "quarter1", "quarter2", "quarter3")
    assert len(examples) == 80
    assert examples.rows([0])["image"][0].size == (12, 12)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.tsv"), write(tmp_path / "two.tsv")
    first = load_examples(str(one), ("text",), COLUMNS)
    assert first.digest == load_examples(str(two), ("text",), COLUMNS).digest
    two.write_text(two.read_text().replace("fine", "bad"))
    assert first.digest != load_examples(str(two), ("text",), COLUMNS).digest
    assert first.take([0], "a").digest != first.take([1], "a").digest


def test_split_key() -> None:
    assert split_key("a/b.npz:train") == ("a/b.npz", "train")
    assert split_key("a/b.tsv") == ("a/b.tsv", None)


def test_labels_by_name_follow_the_models_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,neg\ny,pos\n")
    assert load_examples(str(path), ("text",), {}).with_labels(["pos", "neg"]).labels.tolist() == [1, 0]


def test_class_folders_follow_the_models_order(pictures: dict[str, Path]) -> None:
    examples = load_examples(str(pictures["eval"]), ("image",), {})
    turned = examples.with_labels([f"quarter{i}" for i in (3, 2, 1, 0)])
    assert np.array_equal(turned.labels, 3 - examples.with_labels([f"quarter{i}" for i in range(4)]).labels)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("text,label\nx,2\ny,0\n", r"has the label 2 in row 1; the model has 2 classes, 0 to 1"),
        ("text,label\nx,good\ny,pos\n", r"labels that the model does not know: 'good'; .* 'neg', 'pos'"),
        ("text,label\nx,0.5\ny,1\n", "labels of a.csv are float"),
    ],
)
def test_labels_outside_the_models_classes(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=match):
        load_examples(str(tmp_path / "a.csv"), ("text",), {}).with_labels(["neg", "pos"])


def test_class_folders_of_other_classes(pictures: dict[str, Path]) -> None:
    examples = load_examples(str(pictures["eval"]), ("image",), {})
    with pytest.raises(
        InputError, match=r"names the classes 'quarter0'.*the model 'cat', 'dog'; they must be the same"
    ):
        examples.with_labels(["cat", "dog"])
    with pytest.raises(InputError, match=r"has 4 classes .*, the model 2"):
        examples.with_labels(["LABEL_0", "LABEL_1"])


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "sentnce,label\nx,1\n", r"has no column 'sentence'; did you mean 'sentnce'\?; say which columns"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", "{not json}\n", "cannot read"),
        ("a.parquet", "no parquet", "cannot read"),
        ("a.npz", "no zip", "cannot read .*expected an .npz of plain arrays"),
        ("a.csv", "sentence,label\nx,1\ny\n", "labels|missing values|cannot read"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=match):
        load_examples(str(tmp_path / name), ("text",), COLUMNS).with_labels(["neg", "pos"])


@pytest.mark.parametrize("source", ["./none.csv", "none.csv", "none.npz", "/no/such/folder", "a.xlsx"])
def test_files_that_are_not_there(source: str) -> None:
    with pytest.raises(InputError, match="no such"):
        load_examples(source, ("text",), {})


def test_a_hub_name_offline() -> None:
    with pytest.raises(Unreachable, match="is no file here, and the hub did not give it"):
        load_examples("someone/some-dataset", ("text",), {})


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, train_x=np.zeros((3, 2)), train_y=np.zeros(4, dtype=int))
    with pytest.raises(InputError, match="train_x|x has 3 rows and y 4"):
        load_examples(f"{path}:train", ("x",), {})
    with pytest.raises(InputError, match="has no arrays test_x and test_y; it holds 'train_x', 'train_y'"):
        load_examples(f"{path}:test", ("x",), {})
    np.savez(path, x=np.array([[np.nan], [1.0]]), y=np.array([0, 1]))
    with pytest.raises(InputError, match="x holds values that are not finite"):
        load_examples(str(path), ("x",), {})
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    with pytest.raises(InputError, match="plain arrays"):
        load_examples(str(path), ("x",), {})


def test_sets_that_cannot_judge(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,1\n")
    examples = load_examples(str(tmp_path / "a.csv"), ("text",), {}).with_labels(["neg", "pos"])
    with pytest.raises(InputError, match=r"holds one class only \(1\)"):
        check_evaluation_set(examples)
    with pytest.raises(InputError, match="is empty"):
        check_evaluation_set(examples.take([], "none"))


def test_names_that_differ_only_in_case_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,negative\ny,POSITIVE\n")
    examples = load_examples(str(tmp_path / "a.csv"), ("text",), {})
    assert examples.with_labels(["NEGATIVE", "positive"]).labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="does not know: 'negative'"):
        examples.with_labels(["POSITIVE", "positive"])


def test_shared_examples_are_counted_whatever_the_format(tmp_path: Path, pictures: dict[str, Path]) -> None:
    tables = [load_examples(str(write(tmp_path / f"rows{s}")), ("text",), COLUMNS) for s in (".tsv", ".jsonl")]
    assert len(shared(*tables)) == 3
    assert len(shared(tables[0], tables[1].take([1], "one"))) == 1
    x = np.arange(12.0).reshape(6, 2)
    one = Examples("a", Arrays({"x": x}), np.zeros(6), None, "a")
    assert len(shared(one, Examples("b", Arrays({"x": x[::-1][:4] + 0}), np.zeros(4), None, "b"))) == 4
    train, test = (load_examples(str(pictures[name]), ("image",), {}) for name in ("train", "eval"))
    assert len(shared(test, test)) == 80
    assert len(shared(test, train)) == 0


def test_unlabelled_examples_join_the_labelled(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"sentence": "unseen"}) + "\n" + json.dumps({"sentence": "new"}) + "\n")
    with pytest.raises(InputError, match="no column 'label'"):
        load_examples(str(more), ("text",), COLUMNS)
    labelled = load_examples(str(write(tmp_path / "rows.tsv")), ("text",), COLUMNS).with_labels(["bad", "good"])
    unlabelled = load_examples(str(more), ("text",), COLUMNS, labelled=False).with_labels(["bad", "good"])
    both = join(labelled, unlabelled)
    assert both.labels.tolist() == [1, 0, 1, IGNORED, IGNORED]
    assert both.rows([4, 0, 3])["text"] == ["new", "a fine film", "unseen"]
    assert both.take([3, 1], "two").labels.tolist() == [IGNORED, 0]
    assert both.digest not in (labelled.digest, unlabelled.digest)
    assert both.digest != join(unlabelled, labelled).digest


def test_several_labels_an_example_are_joined_and_taken() -> None:
    one = Examples("one", Arrays({"x": np.arange(2)}), np.array([5, 6, 7]), None, "a", np.array([0, 1, 3]))
    other = Examples("other", Arrays({"x": np.array([9])}), np.array([8, 8]), None, "b", np.array([0, 2]))
    both = join(one, other)
    assert [both.labels_of([i]).tolist() for i in range(3)] == [[5], [6, 7], [8, 8]]
    picked = both.take([2, 0], "two")
    assert (len(picked), picked.labels.tolist()) == (2, [8, 8, 5])
    assert picked.offsets is not None
    assert picked.offsets.tolist() == [0, 2, 3]
    assert picked.rows([0])["x"].tolist() == [9]


def test_arrays_of_another_shape_do_not_join() -> None:
    one = Examples("one", Arrays({"x": np.zeros((2, 3))}), np.zeros(2, dtype=int), None, "a")
    with pytest.raises(InputError, match="one and two cannot be joined"):
        join(one, Examples("two", Arrays({"x": np.zeros((2, 4))}), np.zeros(2, dtype=int), None, "b"))


def test_a_set_without_labels_cannot_judge() -> None:
    with pytest.raises(InputError, match="has no labels"):
        check_evaluation_set(Examples("e", Arrays({"x": np.zeros(2)}), np.full(2, IGNORED), None, "a"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_stay_on_disk(tmp_path: Path, save: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = np.asfortranarray(rng.normal(size=(30, 4, 2))), rng.integers(3, size=30)
    save(tmp_path / "a.npz", x=x, y=y)
    examples = load_examples(str(tmp_path / "a.npz"), ("x",), {})
    assert isinstance(examples.table, Arrays)
    assert isinstance(examples.table.columns["x"], np.memmap)
    some = examples.take([7, 3, 9], "some").take([2, 0], "fewer")
    assert some.table.columns is examples.table.columns  # type: ignore[attr-defined]
    assert (some.rows([0, 1])["x"] == x[[9, 7]]).all()
    assert (some.labels == y[[9, 7]]).all()
    assert len(shared(some, examples)) == 2
    assert (join(some, examples).rows([1, 2])["x"] == x[[7, 0]]).all()


def test_an_npz_without_rows_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 3)), y=np.zeros(0, dtype=np.int64))
    assert len(load_examples(str(tmp_path / "none.npz"), ("x",), {})) == 0


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_columns_to_slice_by(tmp_path: Path, suffix: str) -> None:
    source = str(write(tmp_path / f"rows{suffix}"))
    assert load_columns(source, ["label", "sentence"]) == {"label": [1, 0, 1], "sentence": [text for text, _ in ROWS]}
    assert load_columns(source, []) == {}
    with pytest.raises(InputError, match="data.slices: rows.* has no column 'sentense'; did you mean 'sentence'?"):
        load_columns(source, ["sentense"])


def test_arrays_to_slice_by(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((3, 2)), y=np.arange(3), test_x=np.zeros((2, 2)), test_who=np.array(["f", "m"]))
    assert load_columns(f"{path}:test", ["who"]) == {"who": ["f", "m"]}
    assert load_columns(str(path), ["y"]) == {"y": [0, 1, 2]}
    with pytest.raises(InputError, match=r"'x' has the shape \(3, 2\), expected \(examples,\)"):
        load_columns(str(path), ["x"])


def test_class_folders_to_slice_by(pictures: dict[str, Path]) -> None:
    found = load_columns(str(pictures["eval"]), ["label"])["label"]
    examples = load_examples(str(pictures["eval"]), ("image",), {})
    assert examples.label_names
    assert found == [examples.label_names[i] for i in examples.labels]
    with pytest.raises(InputError, match="column 'image' holds Image.*, expected one word or number for each"):
        load_columns(str(pictures["eval"]), ["image"])


def test_missing_values_to_slice_by(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "age": 3}\n{"text": "b", "age": null}\n')
    assert load_columns(str(path), ["age"]) == {"age": [3, None]}
