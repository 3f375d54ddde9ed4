"""What a device wants: a profile in YAML, inherited from others, every value with its source."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from potstill.validate.errors import InputError, did_you_mean
from potstill.validate.units import PARSERS

OPSETS = range(17, 24)  # from LayerNormalization to Attention; all of them tried on ONNX Runtime 1.31.1
QNN = "QNNExecutionProvider"
Calibration = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
Repair = Literal["equalize", "smooth", "adaround", "bias"]


def _default_calibration(known: Mapping[str, Any]) -> Calibration | None:
    return "minmax" if known.get("method") == "static" else None


def _default_block_size(known: Mapping[str, Any]) -> int | None:
    return 32 if known.get("method") == "weights" else None


class _Part(BaseModel):
    """A piece of a profile: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scheme(_Part):
    """The numbers a graph is stored and computed in.

    `static`: activation ranges are calibrated and written into the graph (QDQ). `dynamic`: activations are
    quantised to uint8 at run time, weights ahead. `weights`: only weights are stored in integers, in blocks of
    `block_size` of a column's values; see export/weight_only.py. `float16`, `float32`: nothing is quantised.
    `reduce_range`: weights use 7 of their 8 bits, so that a pair of products fits into 16 bits.
    `calibration`: how a static scheme's ranges follow from the calibration examples; see export/thresholds.py.
    `embedding`: integers with scales for each row of an embedding table; see export/embeddings.py. Without it static
    and dynamic schemes have one scale for a whole table, and `weights` leaves tables in float32.
    `more_bits`: what the products get that a search takes out of a dynamic scheme's integers, or out of a language
    model's 4-bit weights: `int8_blocks`, 8-bit weights as by `weights`; without it float32.
    `algorithm`: what chooses the integers of 4-bit `weights` of a language model; see export/block_weights.py.
    `repairs`: what is done to a static scheme's float graph, so that its integers lose less; see export/repairs.py.
    Raises ValueError when the number types do not fit the method.
    Source: ONNX Runtime, docs/performance/model-optimizations/quantization.md.
    """

    method: Literal["static", "dynamic", "weights", "float16", "float32"]
    activation: Literal["uint8", "int8", "uint16", "int16"] | None = None
    weight: Literal["int8", "uint8", "int4"] | None = None
    per_channel: bool = False
    reduce_range: bool = False
    calibration: Calibration | None = Field(default_factory=_default_calibration)
    block_size: int | None = Field(default_factory=_default_block_size)
    embedding: Literal["int8", "int4"] | None = None
    more_bits: Literal["int8_blocks"] | None = None
    algorithm: Literal["rtn", "k_quant", "hqq", "gptq"] = "rtn"
    repairs: list[Repair] = []
    why: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method in ("float16", "float32"):
            if self.activation or self.weight or self.embedding or self.per_channel or self.reduce_range:
                raise ValueError(f"method {self.method} quantises nothing: leave out activation, weight and ranges")
        elif self.method == "weights":
            if self.weight not in ("int8", "int4"):
                raise ValueError("method weights needs a weight type: int8 or int4")
            if self.activation or self.per_channel or self.reduce_range:
                raise ValueError("method weights has blocks: leave out activation, per_channel and reduce_range")
        elif self.weight not in ("int8", "uint8"):
            raise ValueError(f"method {self.method} needs a weight type: int8 or uint8")
        if self.method != "static" and self.calibration:
            raise ValueError(f"method {self.method} has no ranges to calibrate: leave out calibration")
        if self.method == "static":
            self._fits_static()
        self._fits_repairs()
        if self.method == "dynamic" and self.activation not in (None, "uint8"):
            raise ValueError("method dynamic has uint8 activations (DynamicQuantizeLinear): leave out activation")
        if self.method != "dynamic" and self.weight != "int4" and self.more_bits:
            raise ValueError(f"method {self.method} has no more_bits; only dynamic and int4 weights have: leave it out")
        if self.weight != "int4" and self.algorithm != "rtn":
            raise ValueError(f"algorithm {self.algorithm} is for int4 weights: leave it out")
        self._fits_blocks()
        return self

    def _fits_static(self) -> None:
        if self.activation is None:
            raise ValueError("method static needs an activation type: uint8, int8, uint16 or int16")
        if (self.activation, self.weight) == ("int8", "uint8"):
            raise ValueError("int8 activations need int8 weights: ONNX Runtime quantises no int8 × uint8")

    def _fits_repairs(self) -> None:
        if self.method != "static" and self.repairs:
            raise ValueError(f"method {self.method} takes no repairs, they need calibrated ranges: leave out repairs")
        if "adaround" in self.repairs and self.weight != "int8":
            raise ValueError("adaround needs weights around zero: say weight: int8, or leave it out of repairs")
        if len(set(self.repairs)) < len(self.repairs):
            raise ValueError(f"repairs names one twice: {', '.join(self.repairs)}")

    def _fits_blocks(self) -> None:
        if self.method != "weights" and self.block_size:
            raise ValueError(f"method {self.method} has no blocks: leave out block_size")
        if self.block_size and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise ValueError("block_size is a power of two from 16 on")


DECODER = Scheme(
    method="weights",
    weight="int4",
    algorithm="gptq",
    more_bits="int8_blocks",
    why="writing reads every weight for each token, so that their bytes are its time; docs/decisions.md, 60",
)


class Quantize(_Part):
    """`convolution` is for graphs whose weights are mostly in Conv, `matmul` for MatMul and Gemm.

    `decoder` is for language models, whatever the two say; null is `DECODER`.
    """

    convolution: Scheme
    matmul: Scheme
    decoder: Scheme | None = None


class Hardware(_Part):
    """The processor. `isa` and `without` are flags as Linux names them in /proc/cpuinfo.

    Each entry of `isa` must be there, an entry `a|b` by one of its names; no entry of `without` may be.
    """

    kind: Literal["phone", "laptop", "browser"]
    arch: Literal["arm64", "x86_64", "wasm32"]
    isa: list[str] = []
    without: list[str] = []
    accelerator: Literal["cpu", "npu", "gpu"]


class Runtime(_Part):
    """The runtime, its execution providers in order of preference, and their options by provider.

    `min_version`: the oldest ONNX Runtime that the device may have; `older`: what is made of an older one, an error
    where nothing is said.
    Raises ValueError for a version that is no numbers with dots between.
    """

    name: str
    providers: list[str]
    provider_options: dict[str, dict[str, str]] = {}
    session_options: dict[str, str] = {}
    min_version: str | None = None
    older: Literal["error", "warning"] | None = None

    @field_validator("min_version")
    @classmethod
    def _numbered(cls, version: str | None) -> str | None:
        if version is not None and not re.fullmatch(r"\d+(\.\d+)*", version):
            raise ValueError("a version is numbers with dots between, like 1.24.2")
        return version


class ModelForm(_Part):
    """The form of the file: preferred opset, shapes, and the largest file in MB (10^6 bytes).

    `ort`: a copy in ONNX Runtime's own format too, with the operators that a reduced build of the runtime needs.
    `compiler`: what compiles the file ahead for the one chip that the provider's options name.
    `max_fallback`: the largest share, such as `0%`, of nodes and of multiply-adds that may leave the first provider.
    Raises ValueError for an opset that cannot be written.
    """

    opset: int | None = None
    shapes: Literal["dynamic", "static"]
    max_file_mb: int | None = None
    ort: bool = False
    compiler: Literal["onnxruntime-qnn"] | None = None
    max_fallback: str | None = None

    @field_validator("max_fallback")
    @classmethod
    def _is_a_share(cls, limit: str | None) -> str | None:
        if limit is not None:
            try:
                PARSERS["max_fallback"](limit)
            except InputError as error:
                raise ValueError(str(error)) from None
        return limit

    @field_validator("opset")
    @classmethod
    def _writable(cls, opset: int | None) -> int | None:
        if opset is not None and opset not in OPSETS:
            raise ValueError(f"graphs are written in opsets {OPSETS.start} to {OPSETS.stop - 1}")
        return opset


class Profile(_Part):
    """How the device is timed: threads inside one operator."""

    threads: int | None = None


class Emulate(_Part):
    """The program and the CPU model that compute as the device does, more slowly."""

    binary: str = Field(pattern=r"^qemu-[a-z0-9_]+$")  # a program on the PATH, never a path: a package may say it
    cpu: str


class Target(_Part):
    """A device profile with its ancestors merged in.

    `sources` maps each dotted field to where its value comes from; `inherited` maps those fields whose value
    an ancestor gave to the id of that ancestor. `None` is a value nobody knows.
    """

    id: str
    title: str
    extends: str | None = None
    hardware: Hardware
    runtime: Runtime
    model: ModelForm
    quantize: Quantize
    profile: Profile = Profile()
    emulate: Emulate | None = None
    sources: dict[str, str] = {}
    inherited: dict[str, str] = {}

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        options = self.runtime.provider_options.get(QNN, {})
        if self.model.compiler and (self.runtime.providers[:1] != [QNN] or "soc_model" not in options):
            raise ValueError(f"model.compiler {self.model.compiler} needs {QNN} first, with a soc_model in its options")
        if self.model.compiler and self.model.shapes != "static":
            raise ValueError(f"model.compiler {self.model.compiler} needs model.shapes static: it takes no other graph")
        return self


_HEAD = ("id", "title", "extends", "sources", "inherited")


def target_names(folders: Sequence[Path] = ()) -> list[str]:
    """Names of the profiles in the user's folders and in the package, sorted."""
    return sorted(_files(folders))


def load_target(name: str, folders: Sequence[Path] = ()) -> Target:
    """A profile by its name, or by the path of a `.yaml` file; ancestors are merged in, the child wins.

    The user's folders are searched in order and before the packaged profiles.
    Raises InputError for an unknown name, a circle in `extends`, malformed YAML, an unknown key or a bad value.
    """
    files = _files(folders)
    chain: list[tuple[str, dict[str, Any]]] = []
    wanted: str | None = name
    while wanted is not None:
        file, profile = _read(wanted, files)
        seen = [own["id"] for _, own in chain]
        if profile["id"] in seen:
            raise InputError(f"{file}: extends goes in a circle: {' -> '.join([*seen, profile['id']])}; break it")
        chain.append((file, profile))
        wanted = profile.get("extends")
    return _resolve(chain[::-1])


def describe(target: Target) -> list[tuple[str, str, str]]:
    """Rows (dotted field, value, source) of a target.

    The value is "unknown" where nobody knows it; the source is "" where none is given and ends with
    "(from ID)" where an ancestor gave the value.
    """
    rows = []
    for field, value in _leaves(target.model_dump(exclude=set(_HEAD))):
        source, origin = target.sources.get(field, ""), target.inherited.get(field)
        rows.append((field, _text(field, value), f"{source} (from {origin})".strip() if origin else source))
    return rows


def _text(field: str, value: Any) -> str:
    if value is None:  # a scheme, a compiler, an emulator or a limit that is left out is a choice, not a gap
        return (
            "none"
            if field in ("emulate", "runtime.older", "model.compiler", "model.max_fallback")
            or field.startswith("quantize.")
            else "unknown"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, dict)):
        return ", ".join(value) or "none"
    return str(value)


def _files(folders: Sequence[Path]) -> dict[str, Any]:
    """Name to file; `Any` stands for Path and for importlib's Traversable, which share `read_text`."""
    packaged = resources.files("potstill.targets").joinpath("profiles")
    found: dict[str, Any] = {}
    for folder in [packaged, *reversed(folders)]:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give a folder of target profiles (*.yaml)")
        for file in folder.iterdir():
            stem, dot, suffix = file.name.rpartition(".")
            if dot and stem and suffix in ("yaml", "yml"):
                found[stem] = file
    return found


def _read(name: str, files: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The file's name and the mapping in it, its head checked."""
    file = Path(name) if name.endswith((".yaml", ".yml")) and Path(name).is_file() else files.get(name)
    if file is None:
        hint = did_you_mean(name, list(files))
        known = "" if hint.startswith("; known") else f"; known: {', '.join(sorted(files))}"
        raise InputError(f"no target named {name!r}{hint}{known}")
    try:
        profile = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    stem = file.name.rpartition(".")[0]
    if not isinstance(profile, dict) or profile.get("id") != stem:
        raise InputError(f"{file}: expected a mapping with `id: {stem}`, the name of the file")
    if not isinstance(profile.get("extends"), str | None):
        raise InputError(f"{file}: extends: expected the name of one profile, got {profile['extends']!r}")
    if not isinstance(profile.setdefault("sources", {}), dict):
        raise InputError(f"{file}: sources: expected a mapping from a dotted field to a text")
    if "inherited" in profile:
        raise InputError(f"{file}: inherited: this key is worked out from `extends`; leave it out")
    return str(file), profile


def _resolve(chain: Sequence[tuple[str, dict[str, Any]]]) -> Target:
    """Merge profiles, oldest ancestor first. A value that a child sets loses its ancestor's source."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    strays: list[str] = []
    givers: dict[str, str] = {}  # leaf -> the youngest profile that set it or vouched for it with a source
    for file, profile in chain:
        body = {key: value for key, value in profile.items() if key not in _HEAD}
        own = dict(_leaves(body))
        merged = _merge(merged, body)
        unused = set(profile["sources"])
        for leaf, _ in _leaves(merged):
            key = _covering(leaf, profile["sources"])
            unused.discard(key or "")
            if leaf in own or key == leaf:
                givers[leaf] = profile["id"]
                sources.pop(leaf, None)
                if key:
                    sources[leaf] = str(profile["sources"][key])
        strays += [f"{file}: sources: {key!r} names no field that this profile has" for key in sorted(unused)]
    file, child = chain[-1]
    merged |= {key: child[key] for key in ("id", "title", "extends") if key in child}
    try:
        target = Target.model_validate(merged)
    except ValidationError as error:
        raise InputError(f"{file}: {'; '.join(_explain(error))}") from None
    if strays:
        raise InputError("; ".join(strays))
    leaves = [leaf for leaf, _ in _leaves(target.model_dump(exclude=set(_HEAD)))]
    for leaf in (leaf for leaf in leaves if leaf not in givers):  # left out everywhere: the source of its group counts
        for _, profile in chain:
            if key := _covering(leaf, profile["sources"]):
                givers[leaf], sources[leaf] = profile["id"], str(profile["sources"][key])
    inherited = {leaf: givers[leaf] for leaf in leaves if givers.get(leaf, child["id"]) != child["id"]}
    kept = {leaf: sources[leaf] for leaf in leaves if leaf in sources}
    return target.model_copy(update={"sources": kept, "inherited": inherited})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _leaves(value: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of all that is not a mapping, and of empty mappings."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _covering(leaf: str, sources: Mapping[str, str]) -> str | None:
    """The longest key of `sources` that is this field or a group that holds it."""
    keys = [key for key in sources if leaf == key or leaf.startswith(f"{key}.")]
    return max(keys, key=len, default=None)


def _explain(error: ValidationError) -> Iterator[str]:
    """One clause for each fault, naming the key."""
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if not where:
            yield fault["msg"].removeprefix("Value error, ")
        elif fault["type"] == "extra_forbidden":
            yield f"{where}: unknown key{did_you_mean(str(fault['loc'][-1]), _keys_at(fault['loc'][:-1]))}"
        else:
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"


def _keys_at(loc: Sequence[int | str]) -> list[str]:
    """The keys that a profile may have at a place."""
    part: type[BaseModel] = Target
    for name in loc:
        kind = part.model_fields[str(name)].annotation
        part = next(choice for choice in (kind, *get_args(kind)) if isinstance(choice, type))
    return list(part.model_fields)
