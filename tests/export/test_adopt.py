"""A user's own ONNX file as the graph of packages, against the file itself in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

from potstill.export.graph import export_graph
from potstill.export.quantize import quantize, scheme_for
from potstill.targets.target import Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.model import Model
from potstill.validate.task import TASKS


def images(n: int = 8) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def own_export(path: Path, opset: int = 17, batch: int = 2, free: dict[int, str] | None = None) -> Path:
    """A net as a user would export it: other names than Potstill's."""
    torch.onnx.export(
        net(), (torch.rand(batch, 3, 12, 12),), str(path), input_names=["image"], output_names=["scores"],
        dynamic_axes={"image": free} if free else None, opset_version=opset, dynamo=False,
    )  # fmt: skip
    return path


def loaded(path: Path) -> Model:
    return TASKS["module"].load(Checkpoint(str(path)), example=images().rows([0]))


def shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path).graph
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}


def test_it_computes_what_the_file_and_torch_do(tmp_path: Path) -> None:
    model = loaded(own_export(tmp_path / "net.onnx", free={0: "N", 2: "H", 3: "W"}))
    parity = export_graph(model, images(), tmp_path / "g.onnx", 20)
    assert parity.max_difference <= 1e-6
    assert shapes(tmp_path / "g.onnx") == {"image": ["batch", 3, 12, 12]}
    x = images().rows(range(8))["x"]
    (ours,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(["scores"], {"image": x})
    with torch.inference_mode():
        np.testing.assert_allclose(ours, net()(torch.from_numpy(x)).numpy(), atol=1e-5)
    assert (model.parameters, model.output, model.labels) == (8 * 27 + 8 + 8 * 4 + 4, "scores", ("0", "1", "2", "3"))


@pytest.mark.parametrize(("opset", "kept"), [(11, 20), (13, 13), (17, 17)])
def test_only_an_old_opset_is_converted(tmp_path: Path, opset: int, kept: int) -> None:
    export_graph(loaded(own_export(tmp_path / "net.onnx", opset, free={0: "N"})), images(), tmp_path / "g.onnx", 20)
    assert onnx.load(tmp_path / "g.onnx").opset_import[0].version == kept


def test_an_old_opset_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError("No Adapter From Version 9 for Upsample")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    model = loaded(own_export(tmp_path / "net.onnx", 11, free={0: "N"}))
    with pytest.raises(InputError, match="net.onnx is of opset 11, and at least 13 .*No Adapter.*: export it again"):
        export_graph(model, images(), tmp_path / "g.onnx", 20)


def test_a_file_that_takes_one_example_at_a_time(tmp_path: Path) -> None:
    model = loaded(own_export(tmp_path / "net.onnx", batch=1))
    assert export_graph(model, images(), tmp_path / "g.onnx", 20).examples == 8
    assert shapes(tmp_path / "g.onnx") == {"image": [1, 3, 12, 12]}
    with torch.inference_mode():
        rows = model.module(torch.from_numpy(images().rows(range(8))["x"])).numpy()
        np.testing.assert_allclose(rows, net()(torch.from_numpy(images().rows(range(8))["x"])).numpy(), atol=1e-5)


def test_functions_are_inlined_and_other_outputs_dropped(tmp_path: Path) -> None:
    path = own_export(tmp_path / "net.onnx", free={0: "N"})
    model = onnx.load(path)
    double = helper.make_node("Double", ["scores"], ["logits"], domain="mine")
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("mine", "Double", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node.append(double)
    model.graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    export_graph(loaded(path), images(), tmp_path / "g.onnx", 20)
    made = onnx.load(tmp_path / "g.onnx")
    assert [value.name for value in made.graph.output] == ["logits"]
    assert not made.functions
    x = images().rows(range(2))["x"]
    (ours,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, {"image": x})
    with torch.inference_mode():
        np.testing.assert_allclose(ours, 2 * net()(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_a_graph_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    path = own_export(tmp_path / "net.onnx", 11, free={0: "N"})
    model = loaded(path)
    changed = onnx.load(path)
    bias = next(t for t in changed.graph.initializer if list(t.dims) == [4])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(changed, path)
    with pytest.raises(PotstillError, match="does not compute what the file does: a logit differs by 1"):
        export_graph(model, images(), tmp_path / "g.onnx", 20)


def test_weights_that_nodes_hold_are_weights(tmp_path: Path) -> None:
    """A file whose weights are all Constant nodes gets the scheme and the integers of the same with initializers."""
    path = own_export(tmp_path / "net.onnx", free={0: "N"})
    model = onnx.load(path)
    constants = [helper.make_node("Constant", [], [one.name], value=one) for one in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    (tmp_path / "held").mkdir()
    onnx.save(model, tmp_path / "held/net.onnx")
    static = Scheme(method="static", activation="uint8", weight="int8", per_channel=True, why="test")
    found = []
    for file in (path, tmp_path / "held/net.onnx"):
        graph, out = file.with_name("g.onnx"), file.with_name("q.onnx")
        export_graph(loaded(file), images(), graph, 20)
        assert scheme_for(graph, load_target("laptop-x86-vnni")).method == "static"
        found.append(quantize(graph, out, static, images(), loaded(file).encode, 0))
    assert found[0] == found[1]
    assert (found[1].weighted, found[1].left_float) == (2, 0)
    x = images().rows(range(8))["x"]
    first, second = (
        onnxruntime.InferenceSession(one.with_name("q.onnx")).run(None, {"image": x})[0]
        for one in (path, tmp_path / "held/net.onnx")
    )
    np.testing.assert_array_equal(first, second)


def test_a_file_with_its_functions_and_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are inlined without the weights, which may be more than one protobuf file can hold."""
    path = own_export(tmp_path / "net.onnx", free={0: "N"})
    before = loaded(path)
    export_graph(before, images(), tmp_path / "g.onnx", 20)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    sizes, inline = list[int](), onnx.inliner.inline_local_functions

    def watched(model: onnx.ModelProto) -> onnx.ModelProto:
        sizes.append(sum(len(one.raw_data) for one in model.graph.initializer))
        return inline(model)

    monkeypatch.setattr(onnx.inliner, "inline_local_functions", watched)
    export_graph(loaded(path), images(), tmp_path / "h.onnx", 20)
    assert sizes == [0]
    x = images().rows(range(8))["x"]
    mine, theirs = (onnxruntime.InferenceSession(tmp_path / f"{g}.onnx").run(None, {"image": x})[0] for g in "hg")
    np.testing.assert_array_equal(mine, theirs)


@pytest.fixture
def bert_file(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> Path:
    """A BERT in the layout of optimum: model.onnx, config and tokenizer."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = tmp_path / "bert"
    core = BertForSequenceClassification.from_pretrained(text_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(text_teacher)
    core.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    core.config.return_dict = False
    encoded = tokenizer(["a good film", "bad"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in names}
    torch.onnx.export(
        core, tuple(encoded[name] for name in names), str(folder / "model.onnx"), input_names=names,
        output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    return folder


def test_a_folder_as_optimum_writes_it(
    bert_file: Path, text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    sentences = load_examples(str(texts["eval"]), ("text",), {"text": "sentence"})
    ours, torchs = (TASKS["text-classification"].load(Checkpoint(str(f))) for f in (bert_file, text_teacher))
    assert ours.encode.same_as(torchs.encode)
    assert ours.labels == torchs.labels == ("negative", "positive")
    export_graph(ours, sentences, tmp_path / "g.onnx", 20)
    assert shapes(tmp_path / "g.onnx") == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    rows, cpu = sentences.rows(range(20)), torch.device("cpu")
    with torch.inference_mode():
        expected = torchs.answers(torchs.tensors(rows, cpu)).numpy()
    np.testing.assert_allclose(ours.answers(ours.tensors(rows, cpu)).numpy(), expected, atol=1e-4)
    inputs = {name: array for name, array in ours.encode(rows).items() if name in ours.input_names}
    (found,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_texts_are_padded_to_a_fixed_length(bert_file: Path) -> None:
    from potstill.export.graph import fix_shapes

    model = TASKS["text-classification"].load(Checkpoint(str(bert_file)))
    file = onnx.load(bert_file / "model.onnx")
    for dim in [value.type.tensor_type.shape.dim[1] for value in file.graph.input]:
        dim.dim_param = "sequence"
    for dim in [value.type.tensor_type.shape.dim[0] for value in file.graph.input]:
        dim.dim_param = "batch"
    onnx.save(file, bert_file / "free.onnx")
    fix_shapes(bert_file / "free.onnx", bert_file / "model.onnx", model.encode, 24)
    fixed = TASKS["text-classification"].load(Checkpoint(str(bert_file)))
    assert {array.shape for array in fixed.encode({"text": ["good"]}).values()} == {(1, 24)}


def test_what_the_folder_must_hold(bert_file: Path, text_teacher: Path, tmp_path: Path) -> None:
    load = TASKS["text-classification"].load
    alone = bert_file / "model.onnx"
    moved = alone.rename(tmp_path / "alone.onnx")
    with pytest.raises(InputError, match="has no config.json, .* give --preprocessing FOLDER, or use --task module"):
        load(Checkpoint(str(moved)))
    assert load(Checkpoint(str(moved), preprocessing=text_teacher)).labels == ("negative", "positive")
    with pytest.raises(InputError, match="no such folder: .*nowhere"):
        Checkpoint(str(moved), preprocessing=tmp_path / "nowhere")
    with pytest.raises(InputError, match="which is no ONNX file; a checkpoint brings its own"):
        Checkpoint(str(text_teacher), preprocessing=text_teacher)


def test_other_classes_than_the_config_names(bert_file: Path) -> None:
    import json

    config = json.loads((bert_file / "config.json").read_text())
    (bert_file / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(InputError, match="gives 2 classes, and the config in .* names 3"):
        TASKS["text-classification"].load(Checkpoint(str(bert_file)))


def test_class_names_of_a_bare_file(tmp_path: Path) -> None:
    path = own_export(tmp_path / "net.onnx", free={0: "N"})
    (tmp_path / "labels.json").write_text('["a", "b", "c", "d"]')
    assert loaded(path).labels == ("a", "b", "c", "d")
    (tmp_path / "labels.json").write_text('["a"]')
    with pytest.raises(InputError, match=r"gives 4 classes, and .*labels.json names 1"):
        loaded(path)


def test_the_digest_is_of_the_file_and_what_feeds_it(bert_file: Path) -> None:
    found = {Checkpoint(str(bert_file)).digest()}
    assert found == {Checkpoint(str(bert_file / "model.onnx")).digest()}
    (bert_file / "config.json").write_text("{}")
    found.add(Checkpoint(str(bert_file)).digest())
    model = onnx.load(bert_file / "model.onnx")
    onnx.save(model, bert_file / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    found.add(Checkpoint(str(bert_file)).digest())
    data = bytearray((bert_file / "w.data").read_bytes())
    data[0] ^= 1
    (bert_file / "w.data").write_bytes(data)
    found.add(Checkpoint(str(bert_file)).digest())
    assert len(found) == 4


@pytest.mark.parametrize(
    ("word", "teacher", "files"),
    [
        ("token-classification", "tag_teacher", "tag_files"),
        ("question-answering", "span_teacher", "span_files"),
        ("feature-extraction", "text_teacher", "pair_files"),
        ("image-classification", "image_teacher", "pictures"),
        ("audio-classification", "sound_teacher", "sounds"),
    ],
)
def test_each_task(word: str, teacher: str, files: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    task, folder = TASKS[word], request.getfixturevalue(teacher)
    examples = task.examples(str(request.getfixturevalue(files)["eval"]), {}, judging=True)
    torchs = task.load(Checkpoint(str(folder)))
    export_graph(torchs, examples, tmp_path / "model.onnx", 20)
    ours = task.load(Checkpoint(str(tmp_path / "model.onnx"), preprocessing=folder))
    assert (ours.labels, ours.output, ours.input_names) == (torchs.labels, torchs.output, torchs.input_names)
    rows, cpu = examples.rows([0, 1, 2]), torch.device("cpu")
    with torch.inference_mode():
        expected = torchs.answers(torchs.tensors(rows, cpu)).numpy()
    np.testing.assert_allclose(ours.answers(ours.tensors(rows, cpu)).numpy(), expected, atol=1e-4)


def test_a_vector_for_each_token_is_no_embedding(text_teacher: Path, tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])
    y = helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, ["b", "s", 8])
    table = onnx.numpy_helper.from_array(np.ones((64, 8), dtype=np.float32), "table")
    graph = helper.make_graph([helper.make_node("Gather", ["table", "input_ids"], [y.name])], "g", [x], [y], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"gave \(1, 3, 8\) for one example; expected outputs of shape \(exam"):
        TASKS["feature-extraction"].load(Checkpoint(str(tmp_path / "model.onnx"), preprocessing=text_teacher))


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_a_graph_without_weights_is_not_called_integers(method: str, tmp_path: Path) -> None:
    torch.onnx.export(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)), (torch.rand(2, 3, 12, 12),),
        str(tmp_path / "net.onnx"), input_names=["image"], dynamic_axes={"image": {0: "N"}}, opset_version=17,
        dynamo=False,
    )  # fmt: skip
    model = loaded(tmp_path / "net.onnx")
    export_graph(model, images(), tmp_path / "g.onnx", 20)
    kind = {"activation": "uint8"} if method == "static" else {}
    scheme = Scheme.model_validate({"method": method, "weight": "int8", "why": "test", **kind})
    words = f"the graph has no convolution, matrix product .* wants {method} .*; give it a scheme with method: float16"
    with pytest.raises(InputError, match=words):
        quantize(tmp_path / "g.onnx", tmp_path / "q.onnx", scheme, images(), model.encode, 0)
    assert not (tmp_path / "q.onnx").exists()
