"""A language model's checkpoint as a float32 graph that takes its past, the same as torch; what quantises it is beside.

GenAI's builder writes the graph where it knows the architecture and its graph computes what torch does; else torch's
exporter does (export/decoder_graph.py). Both are run by ONNX Runtime GenAI, and by plain ONNX Runtime.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization.onnx_model import ONNXModel
from pydantic.dataclasses import dataclass

from potstill.export.decoder_graph import export_decoder, is_decoder, one_token, over_tokens
from potstill.export.genai import CONFIG, build, write_config
from potstill.export.graph import PARITY, Parity, export_graph, save_model
from potstill.validate.data import Examples
from potstill.validate.decoder import IDS, Decoder
from potstill.validate.errors import PotstillError, told
from potstill.validate.model import Model, quiet_transformers
from potstill.validate.session import open_session
from potstill.validate.tokens import TokensEncoder
from potstill.validate.units import counted

FATAL = 4  # of ONNX Runtime's log
COMPARED = 16  # texts


@dataclass(frozen=True)
class LanguageGraph:
    """How a model's graph was made.

    Attributes:
        by: `onnxruntime-genai` or `torch`.
        why: why a decoder's is not by onnxruntime-genai's builder.
        parity: how it compares with torch.
    """

    by: str
    why: str | None
    parity: Parity


def language_graph(
    core: Any, save: Callable[[Path], None], path: Path, samples: Sequence[Sequence[int]], opset: int
) -> LanguageGraph:
    """Write a model's float32 graph, with `genai_config.json` beside it, and compare it with torch.

    A model with a recurrent state gets a graph of one token; see `finish`.

    Args:
        core: of transformers, in float32.
        save: writes its checkpoint, with the tokenizer, into a folder, for the builder.
        path: the file to write, `model.onnx` in a folder.
        samples: real texts as token ids, to compare with.
        opset: of the ONNX standard, of a graph by torch; the builder has its own.

    Raises:
        InputError: the model cannot be exported, or onnxruntime-genai is not installed.
        PotstillError: torch and ONNX Runtime disagree.
    """
    core = core.cpu().eval()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".checkpoint.") as checkpoint:
        with quiet_transformers():
            save(Path(checkpoint))
        why = build(Path(checkpoint), path.parent) or _fault(core, path, samples)
    if why:
        export_decoder(core, path, opset)
        _as_products(path)
        write_config(path.parent, core)
    parity = compare(core, path, samples)
    if not parity.max_difference <= parity.tolerance:
        raise PotstillError(
            f"the ONNX graph of {type(core).__name__} does not compute what torch does: a logit differs by "
            f"{parity.max_difference:.2g} on {counted(parity.examples, 'text')}, allowed is {parity.tolerance:.2g}; "
            "nothing was packed"
        )
    return LanguageGraph("torch" if why else "onnxruntime-genai", why, parity)


def float_graph(model: Model, examples: Examples, path: Path, opset: int) -> LanguageGraph:
    """The float32 graph of a model: a decoder's by `language_graph`, compared on `COMPARED` examples, else by torch.

    Raises:
        InputError, PotstillError: see `language_graph` and `export_graph`.
    """
    if not isinstance(model.encode, TokensEncoder):
        return LanguageGraph("torch", None, export_graph(model.in_float(), examples, path, opset))
    rows = [model.encode(examples.rows([i]))[IDS][0] for i in range(min(COMPARED, len(examples)))]
    return language_graph(model.core, model.save, path, [row.tolist() for row in rows], opset)


def compare(core: Any, path: Path, samples: Sequence[Sequence[int]]) -> Parity:
    """Compare torch's logits with those of a graph that reads each text at once, and then in three pieces."""
    session = open_session(path, log_severity_level=FATAL)  # what fails is told by the error
    worst, largest = 0.0, 1.0
    for sample in samples:
        ids = np.asarray([sample], dtype=np.int64)
        with torch.inference_mode():
            wanted = core(input_ids=torch.from_numpy(ids)).logits.float().numpy()
        middle, pieces = ids.shape[1] // 2, Decoder(session)
        cut = [ids[:, :middle], ids[:, middle : middle + 1], ids[:, middle + 1 :]]
        found = Decoder(session)(ids), np.concatenate([pieces(part) for part in cut if part.size], axis=1)
        worst = max(worst, *(float(np.nan_to_num(np.abs(one - wanted), nan=np.inf).max()) for one in found))
        largest = max(largest, float(np.abs(wanted).max()))
    return Parity(worst, PARITY * largest, len(samples))


def _fault(core: Any, path: Path, samples: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with the builder's graph; None where it computes what torch does."""
    try:
        parity = compare(core, path, samples)
    except Exception as error:  # ONNX Runtime's own kinds have no common base but this
        what = told(error).rpartition("Status Message: ")[2]
        return f"ONNX Runtime does not run the graph of onnxruntime-genai's builder ({what})"
    if parity.max_difference <= parity.tolerance:
        return None
    return (
        f"a logit of the graph of onnxruntime-genai's builder differs from torch's by {parity.max_difference:.2g}, "
        f"allowed is {parity.tolerance:.2g}"
    )


def _as_products(path: Path) -> None:
    """Write each Gemm as a product and a sum, in place: only products have weights in blocks."""
    model = ONNXModel(onnx.load(str(path)))
    model.replace_gemm_with_matmul()
    save_model(model.model, path)


def finish(graph: Path, path: Path) -> None:
    """Make a decoder's model file, in place, read any number of tokens, and put `genai_config.json` beside it.

    Args:
        graph: that it was made of; of another model nothing is done.
        path: `model.onnx` of the package.
    """
    if is_decoder(graph):
        if graph != path:
            shutil.copyfile(graph.with_name(CONFIG), path.with_name(CONFIG))
        if one_token(path):
            over_tokens(path, path)
