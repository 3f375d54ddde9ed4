from pathlib import Path

import pytest

from potstill.targets.device import Made, files_in, with_names
from potstill.targets.devices import Reach, clean, open_device
from potstill.targets.local import Local
from potstill.targets.ssh import Ssh
from potstill.validate.errors import InputError

REQUEST = {"models": [{"path": Path("a.onnx"), "inputs": {"x": {"file": Path("x.bin"), "shape": (1, 2)}}}], "runs": 3}


def test_files_are_found_and_named_wherever_they_are() -> None:
    request = {**REQUEST, "operators": Made(Path("out.json"))}
    assert list(files_in(request)) == [Path("a.onnx"), Path("x.bin"), Made(Path("out.json"))]
    named = with_names(request, lambda one: f"made/{one.path}" if isinstance(one, Made) else f"there/{one}")
    assert named == {
        "models": [{"path": "there/a.onnx", "inputs": {"x": {"file": "there/x.bin", "shape": [1, 2]}}}],
        "runs": 3,
        "operators": "made/out.json",
    }
    assert request["models"] is REQUEST["models"]  # the request itself stays as it was


def test_a_device_by_its_word() -> None:
    assert open_device("local") == Local()
    assert open_device("local", Reach(python="/opt/python")) == Local(("/opt/python",))
    there = open_device("ssh://pi@kitchen:2222", Reach(python="~/venv/bin/python"))
    assert there == Ssh("kitchen", "pi", 2222, python="~/venv/bin/python")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("lokal", "no device is called 'lokal'; expected local"),
        ("", "no device is called ''"),
        ("ssh://[::1", "'ssh://\\[::1' is no address"),
        ("local://kitchen", "local has no address, and 'local://kitchen' gives one"),
    ],
)
def test_no_such_device(where: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_device(where)


@pytest.mark.parametrize(
    ("where", "reach", "words"),
    [
        ("browser", Reach(python="python3"), "browser has no Python to choose; leave out --python"),
        ("local", Reach(serve=True), "--serve is for a browser that comes by itself, and the device is local"),
    ],
)
def test_what_does_not_go_with_a_device(where: str, reach: Reach, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_device(where, reach)


def test_nothing_to_clean() -> None:
    with pytest.raises(InputError, match="nothing is kept on local; only hosts over ssh and phones keep files"):
        clean("local")
    with pytest.raises(InputError, match="nothing is kept on emulate"):
        clean("emulate")
