"""ONNX Runtime GenAI: its builder's graph of a checkpoint, its config file, and what it generates."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import onnx

from potstill.export.graph import save_model, tidy
from potstill.validate.decoder import IDS, MASK, PAST, PRESENT
from potstill.validate.errors import InputError, told
from potstill.validate.files import read_json, write_json
from potstill.validate.model import quiet_transformers

CONFIG = "genai_config.json"
GET_IT = 'pip install "potstill[genai]" and try again'
ANY = "decoder"  # what GenAI calls a model that it feeds by the names in the config alone


def build(checkpoint: Path, folder: Path) -> str | None:
    """Write the float32 graph that GenAI's builder makes of a checkpoint, with its config; why not, where it does not.

    The graph has GroupQueryAttention with the rotation inside. The width of keys and values, which the builder leaves
    open, is written into it, so that the file says all that feeds it. No code of the checkpoint is run.

    Args:
        checkpoint: the folder that transformers wrote.
        folder: to write `model.onnx` and `genai_config.json` to.

    Raises:
        InputError: onnxruntime-genai is not installed.
    """
    _check_there()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".builder.") as place, _quiet():
        from onnxruntime_genai.models import builder

        made, given = Path(place) / "made", ("", str(checkpoint), f"{place}/made", "fp32", "cpu", f"{place}/cache")
        try:
            options = builder.parse_extra_options(*given, ["hf_token=false"])
            builder.create_model(*given, **options)
        except NotImplementedError:
            return "onnxruntime-genai's builder does not know the architecture"
        except Exception as error:  # it checks nothing: a config that it cannot read ends in any kind
            return f"onnxruntime-genai's builder breaks off ({told(error)})"
        graph = onnx.load(str(made / "model.onnx"))
        config = read_json(made / CONFIG)
        _say_width(graph, config["model"]["decoder"]["head_size"])
        save_model(graph, folder / "model.onnx")
        tidy(folder / "model.onnx")
        write_json(folder / CONFIG, config)
    return None


def _say_width(model: onnx.ModelProto, width: int) -> None:
    """Write how wide keys and values are where a graph leaves it open."""
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.name.startswith((PAST, PRESENT)) and value.name.endswith((".key", ".value")) and dims[-1].dim_param:
            dims[-1].dim_value = width


def write_config(folder: Path, core: Any) -> None:
    """Write `genai_config.json` for a graph of export/decoder_graph.py, which GenAI runs as a `decoder`.

    Args:
        folder: with the graph, `model.onnx`.
        core: the model, of transformers.

    Source: ONNX Runtime GenAI, "Config reference"; a recurrent state is found by its names, as `present.0.conv_state`.

    Raises:
        InputError: the model names no token that ends texts.
    """
    text = core.config.get_text_config()
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    past = [one for one in graph.input if one.name.startswith(PAST)]
    inputs, outputs = {"input_ids": IDS}, {"logits": "logits"}
    if any(one.name == MASK for one in graph.input):
        inputs["attention_mask"] = MASK
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "inputs": inputs,
        "outputs": outputs,
    }
    if past[0].name.endswith(".key"):
        heads, width = (past[0].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
        decoder |= {"head_size": width, "num_attention_heads": text.num_attention_heads, "num_key_value_heads": heads}
        for kind in ("key", "value"):
            inputs[f"past_{kind}_names"], outputs[f"present_{kind}_names"] = f"{PAST}%d.{kind}", f"{PRESENT}%d.{kind}"
    length = getattr(text, "max_position_embeddings", None) or 2**15  # a recurrent state has no limit of its own
    model = {"type": ANY, "context_length": length, "vocab_size": text.vocab_size, "decoder": decoder}
    search = {"do_sample": False, "max_length": length, "past_present_share_buffer": False}
    write_json(folder / CONFIG, {"model": model | _special(core), "search": search})


def _special(core: Any) -> dict[str, Any]:
    """The ids of the tokens that begin, end and pad texts, as transformers' `generate` takes them."""
    given = {name: getattr(core.generation_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ends = given["eos"]
    if ends is None:
        raise InputError(
            f"{type(core).__name__} names no token that ends texts, and ONNX Runtime GenAI would take token 0 for it; "
            "set eos_token_id in its config.json or generation_config.json"
        )
    if given["pad"] is None:
        given["pad"] = ends[0] if isinstance(ends, list) else ends
    return {f"{name}_token_id": value for name, value in given.items() if value is not None}


def generate(package: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely continuation of a prompt, by ONNX Runtime GenAI.

    Args:
        package: a folder with `genai_config.json` and the model that it names.
        prompt: token ids, one at least.
        tokens: how many to add at most; fewer come where the model ends its text.

    Raises:
        InputError: onnxruntime-genai is not installed, the folder is no such package, or all would be too long for it.
    """
    _check_there()
    import onnxruntime_genai as og

    if not (package / CONFIG).is_file():
        raise InputError(f"{package} has no {CONFIG}; give the package of a language model")
    most = read_json(package / CONFIG)["model"]["context_length"]
    if len(prompt) + tokens > most:
        raise InputError(
            f"{len(prompt)} tokens and {tokens} more are {len(prompt) + tokens}, and the model reads at most {most}; "
            "ask for less"
        )
    model = og.Model(str(package))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def _check_there() -> None:
    if find_spec("onnxruntime_genai") is None:
        raise InputError(f"language models are exported and run by onnxruntime-genai, which is not installed: {GET_IT}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the builder prints and logs to itself."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), quiet_transformers():
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
