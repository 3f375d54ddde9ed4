"""Compile an ONNX file for a Snapdragon's NPU and run it on the emulated one: a program of its own.

It needs numpy, onnxruntime and onnxruntime-qnn. Called with a request in JSON; its last line is the reply in JSON.
A process of its own, because a provider's library cannot be unloaded and may end the process that it is in.
Source: onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md.
"""

import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import

import numpy as np
import onnxruntime
import onnxruntime_qnn

PROVIDER = "QNNExecutionProvider"


def compile_and_run(request: dict[str, Any]) -> dict[str, Any]:
    """Write the context binary, and run the samples.

    The request: `model` and `context` (paths of ONNX files), `options` of the provider, `trace_folder`, and `samples`,
    each with `file`, `dtype` and `shape` by the name of an input. The reply: `versions`; `assigned`, nodes by provider;
    `left`, name and operator of those on the CPU; `outputs`, the first output of each sample as nested lists.
    """
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    trace = {"enable_framework_op_trace": "1", "framework_op_trace_dir": request["trace_folder"]}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_provider_for_devices(devices, {**request["options"], **trace})
    for key, value in {
        "ep.context_enable": "1",
        "ep.context_file_path": request["context"],
        "ep.context_embed_mode": "0",
        "session.record_ep_graph_assignment_info": "1",
    }.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(request["model"], options)
    taken: Counter[str] = Counter()
    left = []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        taken[part.ep_name] += len(nodes)
        if part.ep_name != PROVIDER:
            left += [{"name": node.name, "operator": node.op_type} for node in nodes]
    return {
        "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")},
        "assigned": dict(taken),
        "left": left,
        "outputs": [session.run(None, _inputs(sample))[0].tolist() for sample in request["samples"]],
    }


def _inputs(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: np.fromfile(one["file"], dtype=one["dtype"]).reshape(one["shape"]) for name, one in sample.items()}


if __name__ == "__main__":
    print(json.dumps(compile_and_run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
    os._exit(0)  # the provider's library writes to the output, or fails, when it is taken down
