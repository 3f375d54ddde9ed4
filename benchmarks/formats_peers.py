"""One int8 file by onnxruntime.quantization or optimum, as their documentation says; run by the Python that has it.

    formats_peers.py SETTING.json

SETTING.json holds `side`, `graph` (a float ONNX file), `checkpoint` and `task` (of a transformers model, else null),
`calibrate` (an .npz of inputs, each array named INDEX/INPUT), `folder` to work in and `out`, the file to write.

onnxruntime     quant_pre_process, then quantize_static with its defaults (QDQ, int8 activations and weights) or as its
                documentation says for x86 with VNNI (uint8 × int8, per channel), or quantize_dynamic, which it advises
                for transformers. Without symbolic shape inference, which fails on graphs of torch's exporter
optimum         its own export of a transformers model (`export=True`), or the float graph; ORTQuantizer with
                AutoQuantizationConfig.avx512_vnni or .avx2, dynamic, or static with AutoCalibrationConfig.minmax
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx


def examples(path: Path) -> Iterator[dict[str, Any]]:
    """The inputs of each calibration example, in order."""
    with np.load(path) as archive:
        found: dict[int, dict[str, Any]] = {}
        for key in archive.files:
            index, _, name = key.partition("/")
            found.setdefault(int(index), {})[name] = archive[key]
    yield from (found[index] for index in sorted(found))


class Feed:
    """Examples as `quantize_static` takes them: one by one, those inputs that the graph has."""

    def __init__(self, path: Path, graph: str) -> None:
        names = {one.name for one in onnx.load(graph, load_external_data=False).graph.input}
        self._examples = ({k: v for k, v in one.items() if k in names} for one in examples(path))

    def get_next(self) -> dict[str, Any] | None:
        """The next one."""
        return next(self._examples, None)


def by_onnxruntime(setting: dict[str, Any]) -> None:
    """Write the file of a side whose name is `onnxruntime` and a way."""
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    way, prepared = setting["side"].partition(" ")[2], str(Path(setting["folder"], "prepared.onnx"))
    quant_pre_process(setting["graph"], prepared, skip_symbolic_shape=True)
    if way == "dynamic":
        drop_weights_shapes(prepared)
        quantize_dynamic(prepared, setting["out"])
        return
    documented = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(
        prepared,
        setting["out"],
        Feed(Path(setting["calibrate"]), prepared),
        **(documented if way == "U8S8 per channel" else {}),
    )


def drop_weights_shapes(path: str) -> None:
    """Take the shapes of weights out of `value_info`: `quantize_dynamic` stumbles over them after torch's exporter."""
    model = onnx.load(path)
    weights = {one.name for one in model.graph.initializer}
    kept = [one for one in model.graph.value_info if one.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, path)


def by_optimum(setting: dict[str, Any]) -> None:
    """Write the file of a side whose name is `optimum`, an instruction set and `static` or `dynamic`."""
    from optimum.onnxruntime import (
        AutoCalibrationConfig,
        AutoQuantizationConfig,
        ORTModelForImageClassification,
        ORTModelForSequenceClassification,
        ORTQuantizer,
    )

    _, isa, way = setting["side"].split()
    folder = Path(setting["folder"], "float")
    folder.mkdir(parents=True)
    if setting["checkpoint"]:
        opens = {"text-classification": ORTModelForSequenceClassification}
        opens["image-classification"] = ORTModelForImageClassification
        opens[setting["task"]].from_pretrained(setting["checkpoint"], export=True).save_pretrained(folder)
    else:
        shutil.copy(setting["graph"], folder / "model.onnx")
    quantizer = ORTQuantizer.from_pretrained(folder)
    config, ranges = getattr(AutoQuantizationConfig, isa)(is_static=way == "static"), None
    if way == "static":
        ranges = optimum_ranges(quantizer, config, setting, str(folder / "model.onnx"), AutoCalibrationConfig.minmax)
    quantizer.quantize(config, setting["folder"], calibration_tensors_range=ranges)
    shutil.move(Path(setting["folder"], "model_quantized.onnx"), setting["out"])


def optimum_ranges(quantizer: Any, config: Any, setting: dict[str, Any], graph: str, method: Any) -> Any:
    """What optimum's `fit` finds over a dataset of the calibration examples."""
    from datasets import Dataset

    feed = Feed(Path(setting["calibrate"]), graph)
    rows = [{name: array[0] for name, array in one.items()} for one in iter(feed.get_next, None)]
    data = Dataset.from_list(rows).with_format("numpy")
    return quantizer.fit(
        dataset=data,
        calibration_config=method(data),
        operators_to_quantize=config.operators_to_quantize,
        onnx_augmented_model_name=str(Path(setting["folder"], "augmented.onnx")),
    )


if __name__ == "__main__":
    order = json.loads(Path(sys.argv[1]).read_text())
    (by_optimum if order["side"].startswith("optimum") else by_onnxruntime)(order)
