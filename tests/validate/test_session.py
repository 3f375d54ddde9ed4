"""A session has the options that it was asked for."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from potstill.validate.session import CPU, open_session


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "made", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_options_reach_onnx_runtime(graph: Path) -> None:
    session = open_session(graph, {"session.x64quantprecision": "1"}, intra_op_num_threads=3)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert (options.intra_op_num_threads, options.log_severity_level) == (3, 3)
    assert session.get_providers() == [CPU]


def test_a_setting_that_is_none_is_an_error(graph: Path) -> None:
    with pytest.raises(AttributeError, match="threads"):
        open_session(graph, threads=3)
