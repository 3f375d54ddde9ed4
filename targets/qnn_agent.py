"""Compile an ONNX file for a Snapdragon's NPU and run it on the simulated one: a program of its own.

It needs numpy, onnxruntime and onnxruntime-qnn. Called with a request in JSON; its last line is the reply in JSON.
A process of its own, because a provider's library cannot be unloaded and may end the process that it is in.
Source: onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md.

Two kinds of request. One with `context` writes the context binary; see `compile_and_run`. Any other is one of
`agent.py` for one model, with `trace_folder`, a folder for the compiler's trace: the sessions are the NPU's, and
`models` or `answer` in the reply have `versions`; `provider_nodes`, nodes by provider; and `left`, those on the CPU.
"""

import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import

import numpy as np
import onnxruntime
import onnxruntime_qnn

PROVIDER = "QNNExecutionProvider"
RECORD = {"session.record_ep_graph_assignment_info": "1"}


def main() -> None:
    """Answer the request in the file that the command line names."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "context" in request:
        print("\n" + json.dumps(compile_and_run(request)), flush=True)
    else:
        agent_here().main()


def compile_and_run(request: dict[str, Any]) -> dict[str, Any]:
    """Write the context binary, and run the samples.

    The request: `model` and `context` (paths of ONNX files), `options` of the provider, `trace_folder`, and `samples`,
    each with `file`, `dtype` and `shape` by the name of an input. The reply: `versions`; `assigned`, nodes by provider;
    `left`, name and operator of those on the CPU; `outputs`, the first output of each sample as nested lists.
    """
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": request["context"],
        "ep.context_embed_mode": "0",
    }
    session = on_npu(request["model"], request["options"], request["trace_folder"], entries)
    assigned, left = assignment(session)
    return {
        "versions": versions(),
        "assigned": assigned,
        "left": left,
        "outputs": [session.run(None, _inputs(sample))[0].tolist() for sample in request["samples"]],
    }


def agent_here() -> Any:
    """`agent.py` as a module, whose sessions are the NPU's."""
    place = spec_from_file_location("agent", Path(__file__).with_name("agent.py"))
    if place is None or place.loader is None:
        sys.exit("agent: agent.py does not lie beside qnn_agent.py")
    agent: Any = module_from_spec(place)
    place.loader.exec_module(agent)
    used = agent.used

    def open_session(spec: dict[str, Any]) -> Any:
        options = spec["provider_options"][PROVIDER]
        try:
            return on_npu(spec["path"], options, spec["trace_folder"], spec.get("session_options", {}), spec["threads"])
        except Exception as error:  # ONNX Runtime's own have no common class
            sys.exit(f"onnxruntime-qnn refused the graph: {error}")

    def used_there(spec: dict[str, Any], session: Any) -> dict[str, Any]:
        nodes, left = assignment(session)
        return {**used(spec, session), "provider_nodes": nodes, "left": left, "versions": versions()}

    agent.open_session, agent.used = open_session, used_there
    return agent


def on_npu(model: str, given: dict[str, str], trace: str, entries: dict[str, str], threads: int = 1) -> Any:
    """A session with the provider's options; its trace goes into a folder, `entries` are further session options."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    to_trace = {"enable_framework_op_trace": "1", "framework_op_trace_dir": trace}
    options.add_provider_for_devices(devices, {**given, **to_trace})
    for key, value in {**entries, **RECORD}.items():
        options.add_session_config_entry(key, str(value))
    return onnxruntime.InferenceSession(model, options)


def assignment(session: Any) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Nodes by provider; name and operator of those on the CPU."""
    taken: Counter[str] = Counter()
    left = []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        taken[part.ep_name] += len(nodes)
        if part.ep_name != PROVIDER:
            left += [{"name": node.name, "operator": node.op_type} for node in nodes]
    return dict(taken), left


def versions() -> dict[str, str]:
    """Of what compiles and runs."""
    return {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")}


def _inputs(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: np.fromfile(one["file"], dtype=one["dtype"]).reshape(one["shape"]) for name, one in sample.items()}


if __name__ == "__main__":
    main()
    os._exit(0)  # the provider's library writes to the output, or fails, when it is taken down
