"""Decoders in blocks of 4 and 8 bits: every algorithm, the embedding and the head, in a search's hands."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from potstill.export import package
from potstill.export.block_weights import Algorithm, Blocks, decoder_in_blocks, products, untie
from potstill.export.language import language_graph
from potstill.export.net import Net, attribute
from potstill.export.quantize import prepare, quantize, scheme_for
from potstill.export.sensitivity import sensitivities
from potstill.targets.target import DECODER, Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.decoder import Decoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples
from potstill.validate.model import Model
from potstill.validate.session import open_session
from potstill.validate.task import TASKS
from tests.conftest import story_tokenizer
from tests.export.decoders import TEXTS, WORDS, model, saver

HIGH, TOKENS = 64, 50
LONG = np.random.default_rng(1).integers(3, WORDS, size=(16, 60)).tolist()
TABLE = np.random.default_rng(0).normal(size=(TOKENS, HIGH)).astype(np.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float graph of a small Llama with a tied embedding; its checkpoint is beside it."""
    folder, core = tmp_path_factory.mktemp("llama"), model("llama")
    language_graph(core, saver(core), folder / "model.onnx", TEXTS, 20)
    saver(core)(folder / "checkpoint")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def opened(llama: Path) -> Model:
    return TASKS["text-generation"].load(Checkpoint(str(llama.parent / "checkpoint")))


@pytest.fixture(scope="module")
def texts(opened: Model, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    path, task = tmp_path_factory.mktemp("texts") / "texts.txt.csv", TASKS["text-generation"]
    words = [story_tokenizer().convert_ids_to_tokens(text[1:]) for text in TEXTS]
    path.write_text("text\n" + "".join(f"{' '.join(some)}\n" for some in words))
    return task.checked(task.examples(str(path), {}), (), encode=opened.encode)


def ends(path: Path, turned: str) -> Path:
    """A graph that gives a tied matrix's rows, and a product with it; the Transpose is on one of the two sides."""
    table, head, held = ("w", "t", TABLE) if turned == "head" else ("t", "w", TABLE.T.copy())
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("Gather", [table, "ids"], ["rows"], "embedding"),
        helper.make_node("MatMul", ["x", head], ["logits"], "head"),
    ]
    ids = helper.make_tensor_value_info("ids", 7, ["n"])
    x = helper.make_tensor_value_info("x", 1, ["n", HIGH])
    outs = [helper.make_tensor_value_info(name, 1, None) for name in ("rows", "logits")]
    graph = helper.make_graph(nodes, "ends", [ids, x], outs, [numpy_helper.from_array(held, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("turned", ["head", "embedding"])
@pytest.mark.parametrize(("bits", "algorithm"), [(4, "rtn"), (4, "k_quant"), (8, "rtn")])
def test_an_embedding_reads_the_blocks_of_the_head(turned: str, bits: Any, algorithm: Any, tmp_path: Path) -> None:
    path, out = ends(tmp_path / "float.onnx", turned), tmp_path / "out.onnx"
    decoder_in_blocks(path, out, Blocks(bits, algorithm))
    feeds = {"ids": np.arange(TOKENS), "x": np.eye(HIGH, dtype=np.float32)}
    rows, logits = open_session(out).run(None, feeds)
    np.testing.assert_allclose(rows, logits.T, atol=2e-3)  # the product has its inputs in 8 bits
    assert 0 < np.abs(rows - TABLE).max() < (0.5 if bits == 4 else 0.03)
    assert [node.op_type for node in onnx.load(str(out)).graph.node] == (
        ["Reshape", "GatherBlockQuantized", "MatMulNBits"]
    )
    assert out.stat().st_size < TABLE.nbytes * (bits / 32 + 3 / 32) + 2000  # one matrix, with scales and zeros


def test_blocks_that_end_inside_a_row_and_zeros_in_float_are_not_shared(tmp_path: Path) -> None:
    path, out = ends(tmp_path / "float.onnx", "head"), tmp_path / "out.onnx"
    for blocks in (Blocks(4, "rtn", 128), Blocks(4, "hqq", 32)):
        decoder_in_blocks(path, out, blocks)
        rows, _ = open_session(out).run(None, {"ids": np.arange(TOKENS), "x": np.eye(HIGH, dtype=np.float32)})
        assert 0 < np.abs(rows - TABLE).max() < 0.5
        net = Net.read(out)
        assert attribute(net.nodes["embedding"], "block_size", 0) == 16  # its own, by row
        assert len(net.tensors) == (5 if blocks.algorithm == "hqq" else 4)


def test_the_embedding_or_the_head_alone_may_ask_for_8_bits_or_none(tmp_path: Path) -> None:
    path, out = ends(tmp_path / "float.onnx", "head"), tmp_path / "out.onnx"
    for name in ("embedding", "head"):
        decoder_in_blocks(path, out, Blocks(eight=(name,)))
        assert {attribute(node, "bits", 0) for node in Net.read(out).model.graph.node} == {0, 8}
    decoder_in_blocks(path, out, Blocks(in_float=("embedding", "head")))
    assert [node.op_type for node in onnx.load(str(out)).graph.node] == ["Gather", "MatMul"]
    decoder_in_blocks(path, out, Blocks(in_float=("head",)))
    assert [node.op_type for node in onnx.load(str(out)).graph.node] == ["GatherBlockQuantized", "MatMul"]


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_a_decoder_in_4_bits_reads_at_once_as_step_by_step(algorithm: Any, llama: Path, tmp_path: Path) -> None:
    out, ids = tmp_path / "model.onnx", np.array([TEXTS[2]])
    decoder_in_blocks(llama, out, Blocks(4, algorithm), TEXTS)
    session, steps = open_session(out), Decoder(open_session(out))
    at_once = Decoder(session)(ids)
    one_by_one = np.concatenate([steps(ids[:, i : i + 1]) for i in range(ids.shape[1])], axis=1)
    float_ = Decoder(open_session(llama))(ids)
    assert np.abs(at_once - one_by_one).max() < 1e-3 * np.abs(at_once).max()
    assert 0 < np.abs(at_once - float_).max() < np.abs(float_).max()
    assert not products(Net.read(out))
    assert out.stat().st_size < 0.45 * llama.stat().st_size


def error(path: Path, float_: Path) -> float:
    """Mean squared difference of the logits to the float graph's, over long texts."""
    sessions = [open_session(one) for one in (path, float_)]
    found = [[Decoder(session)(np.array([text])).ravel() for text in LONG] for session in sessions]
    mine, theirs = (np.concatenate(one) for one in found)
    return float(np.square(mine - theirs).mean())


def test_gptq_beats_the_nearest_in_the_same_bytes_and_8_bits_beat_both(llama: Path, tmp_path: Path) -> None:
    errors, sizes = {}, {}
    names = [node.name for node in products(Net.read(llama))]
    for word, blocks in {
        "rtn": Blocks(), "gptq": Blocks(4, "gptq"), "some": Blocks(4, "gptq", eight=tuple(names[:4])), "8": Blocks(8),
    }.items():  # fmt: skip
        out = tmp_path / "model.onnx"
        decoder_in_blocks(llama, out, blocks, LONG)
        errors[word], sizes[word] = error(out, llama), out.stat().st_size
    assert errors["8"] < errors["some"] < errors["gptq"] < errors["rtn"]
    assert errors["8"] < errors["rtn"] / 50
    assert sizes["rtn"] == sizes["gptq"] < sizes["some"] < sizes["8"]


def test_what_k_quant_cannot_store_is_refused(llama: Path, tmp_path: Path) -> None:
    """ONNX Runtime 1.31.1 packs two zeros of a column into a byte; an odd number of blocks breaks it off."""
    words = "is 96 high, an odd number of blocks of 32, which k_quant does not store; choose another block_size, or"
    core = model("llama", num_hidden_layers=1, intermediate_size=96)
    language_graph(core, saver(core), tmp_path / "model.onnx", TEXTS[:1], 20)
    with pytest.raises(InputError, match=words):
        decoder_in_blocks(tmp_path / "model.onnx", tmp_path / "out.onnx", Blocks(4, "k_quant"))


def test_gptq_wants_texts(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gptq needs texts to calibrate on; give them, or say algorithm: k_quant"):
        decoder_in_blocks(llama, tmp_path / "out.onnx", Blocks(4, "gptq"))


def test_a_target_says_how_a_decoder_is_stored(llama: Path, opened: Model, texts: Examples, tmp_path: Path) -> None:
    target, out = load_target("laptop-x86-vnni"), tmp_path / "model.onnx"
    own = target.quantize.model_copy(update={"decoder": Scheme(method="float32", why="test")})
    assert scheme_for(llama, target.model_copy(update={"quantize": own})).method == "float32"
    scheme = scheme_for(llama, target)
    assert (scheme.weight, scheme.algorithm, scheme.more_bits) == ("int4", "gptq", "int8_blocks")
    names = [node.name for node in products(Net.read(llama))]
    made = quantize(llama, out, scheme, texts, opened.encode, 0, keep_float=names[:3])
    assert made.scheme == "int4 weights in blocks of 32, by gptq"
    assert (made.weighted, made.left_float, made.more_bits, made.calibration_examples) == (11, 0, 3, 4)
    plain = scheme.model_copy(update={"more_bits": None})
    made = quantize(llama, out, plain, texts, opened.encode, 0, keep_float=names[:3])
    assert (made.weighted, made.left_float, made.more_bits) == (11, 3, 0)


def test_a_decoder_in_float16_computes_the_same(llama: Path, opened: Model, texts: Examples, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    made = quantize(llama, out, Scheme(method="float16", why="test"), texts, opened.encode, 0)
    assert made.scheme == "float16"
    assert error(out, llama) < 1e-4 * error(out, ends_of(llama, tmp_path))
    assert out.stat().st_size < 0.55 * llama.stat().st_size


def ends_of(llama: Path, folder: Path) -> Path:
    """The same graph with all logits 0, so that an error against it is the power of the logits."""
    silent = onnx.load(str(llama))
    (head,) = (one for one in silent.graph.initializer if one.name.startswith("lm_head"))
    head.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(head)), head.name))
    onnx.save(silent, folder / "silent.onnx")
    return folder / "silent.onnx"


def test_other_formats_and_other_graphs_are_refused(
    llama: Path, opened: Model, texts: Examples, tmp_path: Path
) -> None:
    dynamic = load_target("laptop-x86-vnni").quantize.matmul
    with pytest.raises(InputError, match=r"stored in blocks, float16 or float32, and the target wants dynamic int8"):
        quantize(llama, tmp_path / "out.onnx", dynamic, texts, opened.encode, 0)
    path, hqq = ends(tmp_path / "ends.onnx", "head"), Scheme(method="weights", weight="int4", algorithm="hqq", why="t")
    with pytest.raises(InputError, match="algorithm: hqq is for language models; leave it out of the target's scheme"):
        quantize(path, tmp_path / "out.onnx", hqq, None, opened.encode, 0)


def test_a_target_with_fixed_shapes_is_refused(llama: Path, opened: Model, tmp_path: Path) -> None:
    target = load_target("phone-iphone")
    with pytest.raises(InputError, match="phone-iphone takes fixed shapes, and what a language model keeps grows with"):
        package._suited(opened.encode, llama, tmp_path, target, DECODER, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "weights", "weight": "int8", "algorithm": "gptq"}, "algorithm gptq is for int4 weights: leave it"),
        ({"method": "weights", "weight": "int8", "more_bits": "int8_blocks"}, "weights has no more_bits; only dynamic"),
    ],
)
def test_a_scheme_that_means_nothing_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme(**given, why="test")


def test_a_search_ranks_what_4_bits_cost(llama: Path, opened: Model, texts: Examples, tmp_path: Path) -> None:
    """Each node's cost is the divergence of a file in which its matrix alone is in 4 bits."""
    out, prepared, scheme = tmp_path / "model.onnx", tmp_path / "prepared.onnx", Scheme(
        method="weights", weight="int4", why="test"
    )  # fmt: skip
    quantize(llama, out, scheme, texts, opened.encode, 0)
    prepare(llama, prepared)
    ranked = {one.node: one.cost for one in sensitivities(prepared, out, opened, texts)}
    names = [node.name for node in products(Net.read(prepared))]
    assert set(names) < set(ranked)  # and the embedding
    assert len(ranked) == len(names) + 1
    name = max(names, key=lambda one: ranked[one])
    alone = tuple(one for one in [*ranked] if one != name)
    decoder_in_blocks(llama, out, replace(Blocks(), in_float=alone))
    rows = [[logits(path, text) for text in TEXTS] for path in (llama, out)]
    apart = [kl(mine, other) for mine, other in zip(*rows, strict=True)]
    assert ranked[name] == pytest.approx(np.mean(apart), rel=0.02)


def logits(path: Path, text: list[int]) -> NDArray[np.float32]:
    """Of the tokens that have a next one, (T − 1, V)."""
    return Decoder(open_session(path))(np.array([text]))[0, :-1]


def kl(mine: NDArray[Any], other: NDArray[Any]) -> float:
    """Mean KL divergence over the rows, by torch."""
    one, two = (torch.log_softmax(torch.from_numpy(part).double(), dim=1) for part in (mine, other))
    return float(torch.nn.functional.kl_div(two, one, log_target=True, reduction="batchmean"))


def test_a_matrix_that_is_read_both_ways_becomes_two(llama: Path) -> None:
    net = Net.read(llama)
    assert untie(net) == {"/model/embed_tokens/Gather": "/lm_head/MatMul"}
    assert "Transpose" not in {node.op_type for node in net.model.graph.node}
    assert untie(net) == {}
