"""The house: imports go down only, every folder is in the wheel, every public name is documented."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"validate": 0, "targets": 1, "export": 2, "compress": 2, "pipeline": 3}
FILES = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))
AGENT = ROOT / "targets" / "agent.py"


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 30
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("potstill.")}
    upward = {room for room in rooms if FLOORS[room] > FLOORS[folder]}
    beside = {room for room in rooms if room != folder and FLOORS[room] == FLOORS[folder]}
    assert not upward | beside


def test_the_agent_needs_only_the_standard_library_numpy_and_onnxruntime() -> None:
    import sys

    tops = {name.partition(".")[0] for name in imported(AGENT)}
    assert tops - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_each_folder_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted({str(path.parent.relative_to(ROOT)) for path in FILES})
    assert sorted(settings["packages"]) == [f"potstill.{folder.replace('/', '.')}" for folder in folders]
    assert settings["package-dir"] == {f"potstill.{folder.replace('/', '.')}": folder for folder in folders}
    patterns = settings["package-data"]["*"]
    for folder in FLOORS:
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert any(inside.match(pattern) for pattern in patterns), inside


@pytest.mark.parametrize("folder", FLOORS)
def test_each_folder_is_typed_and_says_what_it_is(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (470 if path == AGENT else 420)  # a device gets one file
