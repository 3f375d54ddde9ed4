"""YAML with the line of every value, checked against a type, so that an error can say where and what it is.

Plain data only: mappings, lists and scalars. Keys are kept as the text that was written (`on` stays `on`).
Beside YAML 1.1, `1e-3` and `5e-5` are numbers, as people write learning rates; dates stay text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

import yaml
from pydantic import TypeAdapter, ValidationError

from potstill.validate.errors import InputError, PotstillError, did_you_mean

Place: TypeAlias = tuple[str | int, ...]
"""The keys and indices that lead to a value, such as `("stages", 0, "distill")`."""

MAX_DEPTH, MAX_VALUES = 32, 10_000  # a recipe has dozens of values; aliases can spell out billions

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class YamlError(ValueError):
    """The text is not YAML that can be read; `line` is where, when known."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


class Problem(NamedTuple):
    """What is wrong with one value: its line when known, its name, and what to do."""

    line: int | None
    where: str
    text: str

    def __str__(self) -> str:
        line = f"line {self.line}" if self.line else ""
        return "  " + ": ".join(filter(None, (line, self.where, self.text)))


class Document(NamedTuple):
    """What `load` returns: the data, the 1-based line of each path, and the keys given twice."""

    data: Any
    lines: dict[Place, int]
    repeated: list[Problem]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own class attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    pass


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load(text: str) -> Document:
    """Read one YAML document; raises YamlError. An empty text gives None as data."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None, {}, [])
        return document if node is None else document._replace(data=_build(loader, node, (), document))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = "; ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"not valid YAML: {said}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"not valid YAML: a character that is not allowed, U+{ord(text[error.position]):04X}", line
        ) from None
    except RecursionError:
        raise YamlError("nested too deep", None) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(data: Any) -> str:
    """Write plain data as YAML that `load` reads back as it was, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _build(loader: _Loader, node: yaml.Node, path: Place, document: Document) -> Any:
    """The data of one node; its line, and those of the nodes below, go into the document."""
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if len(path) > MAX_DEPTH or len(document.lines) > MAX_VALUES:
        raise YamlError(f"more than {MAX_DEPTH} levels or {MAX_VALUES} values", line)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), document) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:
            raise YamlError(f"{node.value!r} cannot be read: {error}", line) from None
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, key_line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise YamlError("a key must be one word, not a list or a mapping", key_line)
        here = (*path, key)
        if key in data:
            text = f"given twice, first in line {document.lines[here]}"
            document.repeated.append(Problem(key_line, dotted(here), text))
        document.lines[here] = key_line
        data[key] = _build(loader, value_node, here, document)
    return data


def as_error(title: str, problems: Iterable[Problem]) -> InputError:
    """All problems as one error, in the order of their lines, each once."""
    found = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line is None, problem.line or 0))
    count = f"{len(found)} problem{'s' if len(found) != 1 else ''}"
    return InputError("\n".join([f"{title}: {count}", *map(str, found)]))


def parse(kind: Any, value: Any) -> Any:
    """Plain data as an object of a type, by the rules of strict JSON; raises pydantic's ValidationError.

    A whole number passes for a number, a list for a tuple, text for a path; no text passes for a number.
    """
    return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True, extra="forbid")


def check(kind: Any, value: Any) -> tuple[Any, list[tuple[Place, str]]]:
    """The object, or None and what is wrong with the value, each with its path."""
    try:
        return parse(kind, value), []
    except ValidationError as error:
        return None, [(fault["loc"], _explain(kind, fault)) for fault in error.errors()]
    except PotstillError as error:  # a stage may refuse its settings with an error of ours
        return None, [((), str(error))]


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "path_type": "the path of a file",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
}


def _explain(kind: Any, fault: Any) -> str:
    """One fault that pydantic found, in plain words: what was expected and what was given."""
    path, given = fault["loc"], fault["input"]
    match fault["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            known = _field_names(kind, path[:-1])
            return "unknown key" + (did_you_mean(str(path[-1]), known) if known else "")
        case "missing":
            return "missing: this key is required"
        case "literal_error":
            known = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
            return f"expected {fault['ctx']['expected']}; given {in_words(given)}{close_to(given, known)}"
        case "value_error":
            return str(fault["ctx"]["error"])
        case known_type if known_type in _EXPECTED:
            return f"expected {_EXPECTED[known_type]}; given {in_words(given)}"
    return f"{fault['msg'].replace('Input should', 'should', 1)}; given {in_words(given)}"


def close_to(word: Any, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word is close, else nothing."""
    close = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _field_names(kind: Any, path: Sequence[str | int]) -> list[str]:
    """The names of the fields of the model or dataclass that stands at a path below another."""
    for key in path:
        field = getattr(kind, "__pydantic_fields__", {}).get(key)
        options = (field.annotation, *getattr(field.annotation, "__args__", ())) if field else ()
        kind = next((option for option in options if hasattr(option, "__pydantic_fields__")), None)
    return [name for name, field in getattr(kind, "__pydantic_fields__", {}).items() if field.init is not False]


def in_words(value: Any) -> str:
    """A value in words, cut to a length that fits a line."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
        case list():
            return "a list"
    return "a mapping"


def dotted(path: Sequence[str | int]) -> str:
    """A path as people write it: `stages.0.distill`."""
    return ".".join(map(str, path))
