"""Graphs of language models: ONNX Runtime and its GenAI write what torch writes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.export import decoder_graph, genai, language
from potstill.export.block_weights import Blocks, decoder_in_blocks
from potstill.export.decoder_graph import one_token
from potstill.export.genai import generate
from potstill.export.graph import Parity
from potstill.export.language import LanguageGraph, finish, language_graph
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.decoder import Decoder, empty_past, greedy, runs_of
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.files import read_json, sha256_file
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.session import open_session
from potstill.validate.task import TASKS
from tests.export.decoders import TEXTS, continued, model, saver

Made = tuple[Any, Path, LanguageGraph]


def written(kind: str, folder: Path) -> Made:
    core = model(kind)
    made = language_graph(core, saver(core), folder / "model.onnx", TEXTS, 20)
    shutil.copyfile(folder / "model.onnx", folder / "before.onnx")
    finish(folder / "model.onnx", folder / "model.onnx")
    return core, folder, made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return written("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return written("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return written("mamba", tmp_path_factory.mktemp("mamba"))


def test_the_builder_writes_what_it_knows_and_torch_the_rest(llama: Made, gpt2: Made, mamba: Made) -> None:
    assert (llama[2].by, llama[2].why) == ("onnxruntime-genai", None)
    for made in (gpt2[2], mamba[2]):
        assert (made.by, made.why) == ("torch", "onnxruntime-genai's builder does not know the architecture")
    operators = {node.op_type for node in onnx.load(str(llama[1] / "model.onnx")).graph.node}
    assert "GroupQueryAttention" in operators


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_64_tokens_are_those_of_torch(kind: str, request: pytest.FixtureRequest) -> None:
    """By GenAI, by plain ONNX Runtime, and by transformers; several prompts, and texts that do not stand still."""
    core, folder, made = request.getfixturevalue(kind)
    session, texts = open_session(folder / "model.onnx"), set[tuple[int, ...]]()
    for prompt in TEXTS:
        wanted = continued(core, prompt, 64)
        assert len(wanted) == 64
        assert generate(folder, prompt, 64) == greedy(session, prompt, 64) == wanted
        texts.add(tuple(wanted))
    assert len(texts) > 1
    assert max(len(set(text)) for text in texts) > 2
    assert made.parity.max_difference < made.parity.tolerance / 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_logits_are_those_of_torch_at_once_in_pieces_and_below_one_another(
    kind: str, request: pytest.FixtureRequest
) -> None:
    core, folder, _ = request.getfixturevalue(kind)
    session, ids = open_session(folder / "model.onnx"), np.array([TEXTS[2], TEXTS[2][::-1]])
    with torch.inference_mode():
        wanted = core(input_ids=torch.from_numpy(ids)).logits.numpy()
    near, pieces = {"rtol": 0, "atol": 2e-5 * np.abs(wanted).max()}, Decoder(session)
    np.testing.assert_allclose(Decoder(session, batch=2)(ids), wanted, **near)
    cut = [pieces(part) for part in (ids[:1, :5], ids[:1, 5:6], ids[:1, 6:])]
    np.testing.assert_allclose(np.concatenate(cut, axis=1), wanted[:1], **near)
    assert pieces.seen == ids.shape[1]


def test_the_same_model_is_the_same_file(llama: Made, tmp_path: Path) -> None:
    written("llama", tmp_path)
    for name in ("model.onnx", "genai_config.json"):
        assert sha256_file(tmp_path / name) == sha256_file(llama[1] / name)


def test_nothing_of_the_builder_is_said_or_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    core = model("llama", num_hidden_layers=1)
    language_graph(core, saver(core), tmp_path / "model.onnx", TEXTS[:1], 20)
    assert capfd.readouterr() == ("", "")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["genai_config.json", "model.onnx"]
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_graph_says_all_that_feeds_it(llama: Made, mamba: Made) -> None:
    past = empty_past(open_session(llama[1] / "model.onnx"))
    assert {array.shape for array in past.values()} == {(1, 2, 0, 16)}
    states = empty_past(open_session(mamba[1] / "model.onnx"), batch=3)
    assert {name: array.shape for name, array in states.items()} == {
        "past_key_values.0.conv_state": (3, 64, 4),
        "past_key_values.0.recurrent_state": (3, 64, 8),
    }


def test_genai_gets_the_names_and_the_longest_text(gpt2: Made) -> None:
    found = read_json(gpt2[1] / "genai_config.json")["model"]
    assert (found["type"], found["context_length"], found["vocab_size"]) == ("decoder", 128, 24)
    assert found["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert (found["decoder"]["head_size"], found["decoder"]["num_key_value_heads"]) == (16, 2)


def test_a_builders_graph_that_does_not_run_gives_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """GroupQueryAttention rotates heads of 16, 32, … values alone."""
    core = model("llama", num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    made = language_graph(core, saver(core), tmp_path / "model.onnx", TEXTS[:2], 20)
    assert made.by == "torch"
    assert made.why == (
        "ONNX Runtime does not run the graph of onnxruntime-genai's builder (head_size shall be a multiple of 16. Got "
        "head_size % 16 == 8)"
    )
    assert generate(tmp_path, TEXTS[0], 20) == continued(core, TEXTS[0], 20)
    assert capfd.readouterr().err == ""


def test_a_builders_graph_that_computes_something_else_gives_way(
    llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(core: Any, path: Path, opset: int) -> None:
        path.write_bytes((llama[1] / "model.onnx").read_bytes())

    monkeypatch.setattr(language, "export_decoder", exported)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(llama[0].config)
    made = language_graph(llama[0], saver(other), tmp_path / "model.onnx", TEXTS, 20)
    assert made.by == "torch"
    assert str(made.why).startswith("a logit of the graph of onnxruntime-genai's builder differs from torch's by ")


def test_a_builder_that_breaks_off_gives_way(llama: Made, tmp_path: Path) -> None:
    assert str(genai.build(tmp_path, tmp_path)).startswith("onnxruntime-genai's builder breaks off (")


def test_a_graph_that_computes_something_else_is_refused(
    llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "compare", lambda *_: Parity(0.5, 0.1, 4))
    monkeypatch.setattr(language, "_fault", lambda *_: None)
    words = (
        "graph of LlamaForCausalLM does not compute what torch does: a logit differs by 0.5 on 4 texts, allowed is 0.1"
    )
    with pytest.raises(PotstillError, match=words):
        language_graph(llama[0], saver(llama[0]), tmp_path / "model.onnx", TEXTS, 20)


def test_a_model_that_keeps_something_else_is_refused(tmp_path: Path) -> None:
    words = "RwkvForCausalLM keeps nothing that transformers caches .* choose an architecture such as Llama, GPT-2 or"
    with pytest.raises(InputError, match=words):
        decoder_graph.export_decoder(model("rwkv"), tmp_path / "model.onnx", 20)


def test_what_torch_cannot_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("it broke")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot be exported to ONNX: .*it broke"):
        decoder_graph.export_decoder(model("gpt2"), tmp_path / "model.onnx", 20)


def test_a_model_without_an_end_of_texts_is_refused(gpt2: Made, tmp_path: Path) -> None:
    core = model("gpt2")
    (tmp_path / "model.onnx").write_bytes((gpt2[1] / "model.onnx").read_bytes())
    core.generation_config.eos_token_id, core.generation_config.pad_token_id = [2, 7], None
    genai.write_config(tmp_path, core)
    found = read_json(tmp_path / "genai_config.json")["model"]
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == ([2, 7], 2, 1)
    core.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="GPT2LMHeadModel names no token that ends texts, and .* take token 0 for it;"):
        genai.write_config(tmp_path, core)


def test_genai_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r'not installed: pip install "potstill\[genai\]"'):
        generate(tmp_path, [1], 1)


def test_what_is_no_package_or_too_long_is_refused(llama: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no genai_config.json; give the package of a language model"):
        generate(tmp_path, [1], 1)
    with pytest.raises(InputError, match=r"8 tokens and 121 more are 129, and the model reads at most 128; ask for"):
        generate(llama[1], [1] * 8, 121)


def test_writing_ends_where_the_text_ends(llama: Made) -> None:
    session = open_session(llama[1] / "model.onnx")
    whole = greedy(session, TEXTS[0], 10)
    end = whole.index(whole[3])
    assert greedy(session, TEXTS[0], 10, ends=[whole[3]]) == whole[: end + 1]


def test_a_predictor_feeds_the_graph_itself(llama: Made, tmp_path: Path) -> None:
    """What a task's encoder gives is enough; the rows are those of torch."""
    core, folder, _ = llama
    saver(core)(tmp_path)
    opened = TASKS["text-generation"].load(Checkpoint(str(tmp_path)))
    predictor = OnnxPredictor(folder / "model.onnx", opened.encode, "the graph", read=opened.read)
    words = opened.encode.tokenizer.convert_ids_to_tokens(TEXTS[2][1:])  # type: ignore[attr-defined]
    rows = {"text": [" ".join(words), " ".join(words[:4])]}
    with torch.inference_mode():
        wanted = opened.answers(opened.tensors(rows, torch.device("cpu"))).numpy()
    np.testing.assert_allclose(predictor(rows), wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_graph_of_one_token_is_fed_with_its_own_past(mamba: Made) -> None:
    core, folder, _ = mamba
    assert one_token(folder / "before.onnx")
    assert not one_token(folder / "model.onnx")
    session = open_session(folder / "before.onnx")
    runs = runs_of(session, TEXTS[0])
    assert [int(run["input_ids"][0, 0]) for run in runs] == TEXTS[0]
    with torch.inference_mode():
        wanted = core(input_ids=torch.tensor([TEXTS[0]])).logits.numpy()
    found = np.concatenate([session.run(["logits"], run)[0] for run in runs], axis=1)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert len(runs_of(session, [1] * 100)) == 64


def test_a_recurrent_state_goes_through_a_file_in_blocks(mamba: Made, tmp_path: Path) -> None:
    """Stored token by token, then put over texts; 8 bits are nearer to float than 4."""
    shutil.copyfile(mamba[1] / "before.onnx", tmp_path / "before.onnx")
    shutil.copyfile(mamba[1] / "genai_config.json", tmp_path / "genai_config.json")
    folder, apart, ids = tmp_path / "package", {}, np.array([TEXTS[0]])
    folder.mkdir()
    for bits, algorithm in ((8, "rtn"), (4, "gptq")):
        blocks = Blocks(bits, algorithm)  # type: ignore[arg-type]
        decoder_in_blocks(tmp_path / "before.onnx", folder / "model.onnx", blocks, TEXTS)
        finish(tmp_path / "before.onnx", folder / "model.onnx")
        session = open_session(folder / "model.onnx")
        apart[bits] = float(
            np.square(Decoder(session)(ids) - Decoder(open_session(mamba[1] / "model.onnx"))(ids)).mean()
        )
        assert generate(folder, TEXTS[0], 20) == greedy(session, TEXTS[0], 20)
    assert 0 < apart[8] < apart[4] / 2


@pytest.mark.data
def test_a_real_model_writes_the_same_story(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "stories260k" / "checkpoint"
    opened = TASKS["text-generation"].load(Checkpoint(str(folder)))
    texts = opened.encode.tokenizer(["Once upon a time", "Lily and Tom went to", "The dog"])["input_ids"]  # type: ignore[attr-defined]
    made = language_graph(opened.core, opened.save, tmp_path / "model.onnx", texts, 20)
    assert made.by == "torch"
    for text in texts:
        assert generate(tmp_path, text, 64) == continued(opened.core, text, 64)
