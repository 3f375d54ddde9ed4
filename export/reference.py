"""A model's own float32 graph, to time packages against."""

from pathlib import Path

import onnx

from potstill.export.checked import tolerance
from potstill.export.golden import GOLDEN, write_golden
from potstill.export.graph import save_model
from potstill.export.language import finish, float_graph
from potstill.export.package import MANIFEST, MODEL
from potstill.targets.target import Hardware, ModelForm, Quantize, Runtime, Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.files import write_json
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.session import CPU
from potstill.validate.task import Model


def write_reference(folder: Path, model: Model, examples: Examples, opset: int, graph: Path | None = None) -> None:
    """A float32 graph with golden samples and the least of a manifest: something to time packages against.

    `graph` is the model's own, where it is written already.

    Raises:
        InputError, PotstillError: as `float_graph`.
    """
    folder.mkdir(parents=True)
    if graph:
        save_model(onnx.load(str(graph)), folder / MODEL)
    else:
        float_graph(model, examples, folder / MODEL, opset)
    finish(graph or folder / MODEL, folder / MODEL)
    predictor = OnnxPredictor(folder / MODEL, model.encode, "the teacher's graph")
    write_golden(folder / GOLDEN, predictor, examples, tolerance("float32").largest, model.output)
    write_json(folder / MANIFEST, {"format": "potstill-package/1", "target": REFERENCE.model_dump(mode="json")})


_FLOAT32 = Scheme(method="float32", why="the reference is not quantised")
REFERENCE = Target(
    id="teacher",
    title="the teacher's float32 graph on a CPU",
    hardware=Hardware(kind="laptop", arch="x86_64", accelerator="cpu"),
    runtime=Runtime(name="onnxruntime", providers=[CPU]),
    model=ModelForm(shapes="dynamic"),
    quantize=Quantize(convolution=_FLOAT32, matmul=_FLOAT32),
)
