"""A causal language model of transformers as an ONNX graph with its past as inputs and outputs, by torch's exporter.

For architectures that ONNX Runtime GenAI's builder does not know. Names are those of validate/decoder.py. A graph with
keys and values reads any number of tokens at once. One with a recurrent state (Mamba) reads one token; `over_tokens`
puts it into a Scan.

Shapes: B sequences, T tokens of each, P tokens before them, L layers.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import compose, helper
from torch import Tensor, nn

from potstill.export.graph import save_model, tidy
from potstill.export.untraced import why_not
from potstill.validate.decoder import IDS, MASK, PAST, PRESENT, takes_past
from potstill.validate.errors import InputError

KINDS = {"keys": "key", "values": "value", "conv_states": "conv_state", "recurrent_states": "recurrent_state"}
BATCH, TOKENS, BEFORE, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
INSIDE = "token."  # before the names inside a Scan
AXIS = "potstill.axis"  # the name of a constant


class _Attending(nn.Module):
    """Logits (B, T, V) and keys and values of all P + T tokens, of tokens and keys and values of P."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.positions = "position_ids" in inspect.signature(core.forward).parameters

    def forward(self, ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = {"position_ids": places} if self.positions else {}
        found = self.core(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        layers = found.past_key_values.layers
        return found.logits, *[part for layer in layers for part in (layer.keys, layer.values)]


class _Recurring(nn.Module):
    """Logits (B, 1, V) and states after a token, of the token and the states before it."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.core.config)
        for i, layer in enumerate(cache.layers):
            conv, state = past[2 * i].clone(), past[2 * i + 1].clone()  # they are written in place
            layer.dtype, layer.device = conv.dtype, conv.device
            layer.conv_states[0], layer.recurrent_states[0] = conv, state
            layer.conv_kernel_size = {0: conv.shape[-1]}
            for known in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
                getattr(layer, known)[0] = True
        found = self.core(input_ids=ids, cache_params=cache, use_cache=True)
        return found.logits, *[part for one in cache.layers for part in (one.conv_states[0], one.recurrent_states[0])]


def export_decoder(core: nn.Module, path: Path, opset: int) -> None:
    """Write the float32 graph of a model; one with a recurrent state reads one token at a time.

    Args:
        core: of `AutoModelForCausalLM`, with float32 weights.
        path: the `.onnx` file to write.
        opset: of the ONNX standard.

    Raises:
        InputError: its cache is of neither kind, or it cannot be exported.
    """
    core = core.cpu().eval()
    kinds, past = _past_of(core)
    names = [f"{i}.{KINDS[kind]}" for i in range(len(past) // 2) for kind in kinds]
    ids = torch.arange(6).reshape(2, 3)
    if kinds[0] == "keys":
        mask = torch.ones(2, 3 + past[0].shape[2], dtype=torch.int64)
        mask[0, 0] = 0  # without padding the mask would vanish from the graph
        inputs: tuple[Any, ...] = (ids, mask, past)
        shapes: Any = ({0: BATCH, 1: TOKENS}, {0: BATCH, 1: ALL}, [{0: BATCH, 2: BEFORE}] * len(past))
        module: nn.Module = _Attending(core)
        first = [IDS, MASK]
    else:
        inputs, shapes = (ids[:, :1], past), ({0: BATCH}, [{0: BATCH}] * len(past))
        module, first = _Recurring(core), [IDS]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                inputs,
                input_names=[*first, *(f"{PAST}{name}" for name in names)],
                output_names=["logits", *(f"{PRESENT}{name}" for name in names)],
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"{type(core).__name__} cannot be exported to ONNX: {why_not(core, error)}") from error
    assert program is not None
    program.save(str(path), external_data=True)
    tidy(path)


def _past_of(core: Any) -> tuple[tuple[str, str], list[Tensor]]:
    """What the layers of a model keep, and such a past (2, …) of two sequences, to trace with: 2 · L tensors.

    Raises:
        InputError: it keeps something else than keys and values, or a convolution's and a recurrent state.
    """
    with torch.no_grad():
        found = core(input_ids=torch.arange(8).reshape(2, 4), use_cache=True)
    cache = getattr(found, "past_key_values", None) or getattr(found, "cache_params", None)
    layers = getattr(cache, "layers", [])
    attending = [isinstance(getattr(layer, "keys", None), Tensor) for layer in layers]
    recurring = [isinstance(getattr(layer, "conv_states", None), dict) for layer in layers]
    if layers and all(attending) and not any(recurring):
        return ("keys", "values"), [part for layer in layers for part in (layer.keys, layer.values)]
    if layers and all(recurring) and not any(attending) and all(len(layer.conv_states) == 1 for layer in layers):
        states = [part for layer in layers for part in (layer.conv_states[0], layer.recurrent_states[0])]
        return ("conv_states", "recurrent_states"), states
    kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers)) or "nothing that transformers caches"
    raise InputError(
        f"{type(core).__name__} keeps {kinds} from token to token; a decoder's graph is made of keys and values alone, "
        "or of a convolution's and a recurrent state alone: choose an architecture such as Llama, GPT-2 or Mamba"
    )


def is_decoder(path: Path) -> bool:
    """Whether a graph is a language model's, which takes its past."""
    return takes_past(onnx.load(str(path), load_external_data=False).graph.input)


def one_token(path: Path) -> bool:
    """Whether a decoder's graph reads one token at a time."""
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    ids = [one.type.tensor_type.shape.dim for one in inputs if one.name == IDS]
    return takes_past(inputs) and ids[0][1].dim_value == 1


def over_tokens(path: Path, out: Path) -> None:
    """Write a graph that reads T tokens of one that reads one: a Scan over them (ONNX, operators, Scan).

    Its constants become those of the whole graph. Names inside get a prefix, since none may be there twice.
    """
    step = compose.add_prefix(onnx.load(str(path)), INSIDE)
    ids, logits, token, row = (f"{INSIDE}{name}" for name in (IDS, "logits", "id", "row"))
    states = [one for one in step.graph.input if one.name != ids]
    after = [one for one in step.graph.output if one.name != logits]
    width = onnx.load(str(path), load_external_data=False).graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    body = helper.make_graph(
        [
            helper.make_node("Unsqueeze", [token, AXIS], [ids], f"{token}.row"),
            *step.graph.node,
            helper.make_node("Squeeze", [logits, AXIS], [row], f"{row}.out"),
        ],
        "token",
        [*states, helper.make_tensor_value_info(token, onnx.TensorProto.INT64, [BATCH])],
        [*after, helper.make_tensor_value_info(row, onnx.TensorProto.FLOAT, [BATCH, width])],
    )
    before, behind = [_outside(one) for one in states], [_outside(one) for one in after]
    scan = helper.make_node(
        "Scan", [*(one.name for one in before), IDS], [*(one.name for one in behind), "logits"], "over_tokens",
        body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
    )  # fmt: skip
    whole = helper.make_graph(
        [scan],
        "tokens",
        [helper.make_tensor_value_info(IDS, onnx.TensorProto.INT64, [BATCH, TOKENS]), *before],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [BATCH, TOKENS, width]), *behind],
        [*step.graph.initializer, helper.make_tensor(AXIS, onnx.TensorProto.INT64, [1], [1])],
    )
    made = helper.make_model(
        whole, opset_imports=step.opset_import, ir_version=step.ir_version, producer_name="potstill"
    )
    save_model(made, out)


def _outside(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """An input or output of a step by its name outside of the Scan."""
    found = onnx.ValueInfoProto()
    found.CopyFrom(value)
    found.name = value.name.removeprefix(INSIDE)
    return found
