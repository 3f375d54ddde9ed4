import re
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.targets.target import Scheme, describe, load_target, target_names
from potstill.validate.errors import InputError

PACKAGED = [
    "browser-wasm",
    "browser-webgpu",
    "laptop-amd-vitisai",
    "laptop-apple",
    "laptop-apple-cpu",
    "laptop-directml",
    "laptop-intel-openvino",
    "laptop-snapdragon-x",
    "laptop-x86-avx-vnni",
    "laptop-x86-avx2",
    "laptop-x86-avx512",
    "laptop-x86-avx512-vnni",
    "laptop-x86-vnni",
    "phone-arm64",
    "phone-arm64-dotprod",
    "phone-arm64-i8mm",
    "phone-arm64-xnnpack",
    "phone-iphone",
    "phone-iphone-cpu",
    "phone-snapdragon-v69",
    "phone-snapdragon-v73",
    "phone-snapdragon-v75",
    "phone-snapdragon-v79",
    "phone-snapdragon-v81",
]

BASE = """
id: base
title: a base
hardware: {kind: laptop, arch: x86_64, accelerator: cpu}
runtime: {name: onnxruntime, providers: [CPUExecutionProvider], session_options: {session.x64quantprecision: "1"}}
model: {shapes: dynamic}
quantize:
  convolution: {method: static, activation: uint8, weight: int8, why: fast}
  matmul: {method: float32, why: exact}
sources: {quantize.convolution: measured on base, model.shapes: read on base}
"""

QNN = "[QNNExecutionProvider], provider_options: {QNNExecutionProvider: {soc_model: '57'}}"
COMPILED = BASE.replace("[CPUExecutionProvider]", QNN)
COMPILED = COMPILED.replace("{shapes: dynamic}", "{shapes: static, compiler: onnxruntime-qnn}")

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def profile(name: str, text: str) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        return file

    return profile


def test_packaged_names() -> None:
    assert target_names() == PACKAGED


@pytest.mark.parametrize("name", PACKAGED)
def test_each_set_value_of_a_packaged_profile_has_a_source(name: str) -> None:
    rows = [row for row in describe(load_target(name)) if row[0].startswith(("quantize.", "model.", "runtime."))]
    assert len(rows) >= 18
    assert [field for field, value, source in rows if value not in ("unknown", "none") and not source] == []


@pytest.mark.parametrize("name", PACKAGED)
def test_sources_do_not_point_at_fields_without_meaning(name: str) -> None:
    target = load_target(name)
    assert set(target.sources) <= {field for field, _, _ in describe(target)}


def test_dotprod_inherits_and_overrides() -> None:
    target = load_target("phone-arm64-dotprod")
    assert target.hardware.isa == ["asimd", "asimddp"]
    assert target.quantize.convolution.activation == "int8"
    assert target.quantize.matmul == load_target("phone-arm64").quantize.matmul
    assert target.emulate is not None
    assert (target.emulate.binary, target.emulate.cpu) == ("qemu-aarch64", "cortex-a76")


def test_child_wins_and_takes_no_source_of_a_value_it_changed(write: Write, tmp_path: Path) -> None:
    write("base", BASE)
    write(
        "child",
        "id: child\ntitle: a child\nextends: base\n"
        "quantize: {convolution: {activation: int8}}\nruntime: {session_options: {more: '2'}}\n"
        "sources: {model.shapes: read on child}\n",
    )
    target = load_target("child", [tmp_path])
    rows = {field: (value, source) for field, value, source in describe(target)}
    assert target.runtime.session_options == {"session.x64quantprecision": "1", "more": "2"}
    assert rows["quantize.convolution.activation"] == ("int8", "")
    assert rows["quantize.convolution.weight"] == ("int8", "measured on base (from base)")
    assert rows["model.shapes"] == ("dynamic", "read on child")
    assert rows["runtime.min_version"] == ("unknown", "")
    assert rows["emulate"] == ("none", "")


def test_a_target_that_is_compiled_ahead(write: Write) -> None:
    assert load_target(str(write("base", COMPILED))).model.compiler == "onnxruntime-qnn"
    assert {field: value for field, value, _ in describe(load_target("phone-arm64"))}["model.compiler"] == "none"


def test_a_snapdragon_changes_the_chip_alone() -> None:
    parent, child = load_target("phone-snapdragon-v75"), load_target("laptop-snapdragon-x")
    assert child.runtime.provider_options["QNNExecutionProvider"] == {
        "backend_type": "htp", "soc_model": "60", "htp_arch": "73",
    }  # fmt: skip
    assert (child.quantize, child.model) == (parent.quantize, parent.model)


def test_user_folder_comes_before_the_package(write: Write, tmp_path: Path) -> None:
    write("phone-arm64", BASE.replace("id: base", "id: phone-arm64") + "emulate: {binary: qemu-a, cpu: b}")
    assert load_target("phone-arm64", [tmp_path]).title == "a base"
    assert load_target("phone-arm64-dotprod", [tmp_path]).hardware.arch == "x86_64"


def test_all_faults_at_once(write: Write) -> None:
    file = write("base", BASE.replace("kind: laptop", "kind: toaster") + "hardwear: 1")
    with pytest.raises(InputError, match=r"hardware\.kind: .*; hardwear: unknown key"):
        load_target(str(file))


def test_the_profile_of_the_documents_is_one(write: Write) -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    target = load_target(str(write("kiosk", text)))
    assert f"the {len(PACKAGED)} that come along" in page
    assert (target.model.max_fallback, target.model.max_file_mb, target.extends) == ("5%", 20, "phone-iphone")
    assert [name for name in PACKAGED if not re.search(rf"`{name}`|`-{name.rpartition('-')[2]}`", page)] == []


def test_a_file_by_its_path(write: Write) -> None:
    assert load_target(str(write("base", BASE))).id == "base"


def test_resolved_target_survives_json() -> None:
    target = load_target("phone-arm64-dotprod")
    assert type(target).model_validate_json(target.model_dump_json()) == target


def test_unknown_name_says_what_was_meant() -> None:
    with pytest.raises(
        InputError, match=r"no target named 'phone-arm46'; did you mean 'phone-arm64'\?; known: browser"
    ):
        load_target("phone-arm46")


def test_unknown_name_lists_the_known_once() -> None:
    with pytest.raises(InputError, match=r"^no target named 'toaster'; known: browser-wasm[^;]*$"):
        load_target("toaster")


def test_circle(write: Write, tmp_path: Path) -> None:
    write("a", "id: a\nextends: b\n")
    write("b", "id: b\nextends: a\n")
    with pytest.raises(InputError, match="circle: a -> b -> a"):
        load_target("a", [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: [", r"base\.yaml: not YAML"),
        ("- 1", "expected a mapping with `id: base`"),
        ("id: other", "expected a mapping with `id: base`"),
        ("id: base\nextends: [a]", "extends: expected the name of one profile"),
        ("id: base\nsources: none", "sources: expected a mapping"),
        (BASE + "inherited: {}", "inherited: this key is worked out"),
        (BASE.replace("shapes: dynamic", "shape: dynamic"), r"base\.yaml: .*model\.shape: unknown key.*'shapes'"),
        (BASE.replace("weight: int8", "wieght: int8"), r"quantize\.convolution\.wieght: unknown key.*'weight'"),
        (BASE + "hardwear: 1", r"hardwear: unknown key.*'hardware'"),
        (
            BASE.replace("{shapes: dynamic}", "{shapes: dynamic, max_fallback: 5}"),
            "max_fallback: .*valid string, got 5",
        ),
        (
            BASE.replace("{shapes: dynamic}", "{shapes: dynamic, max_fallback: 5pp}"),
            "'5pp' is not a limit here; write a num",
        ),
        (BASE + "emulate: {binary: qemu-a, cpu: b, gpu: c}", r"emulate\.gpu: unknown key; did you mean 'cpu'"),
        (BASE.replace("kind: laptop", "kind: toaster"), r"hardware\.kind: .*got 'toaster'"),
        (
            BASE + "model: {shapes: static, compiler: onnxruntime-qnn}",
            "onnxruntime-qnn needs QNNExecutionProvider first",
        ),
        (COMPILED.replace("{soc_model: '57'}", "{htp_arch: '75'}"), "with a soc_model in its options$"),
        (COMPILED.replace("shapes: static", "shapes: dynamic"), "needs model.shapes static: it takes no other graph$"),
        (BASE.replace("read on base}", "x, model.colour: y}"), "'model.colour' names no field"),
        (BASE.replace("{shapes: dynamic}", "{shapes: dynamic, opset: 16}"), r"opset: graphs are .* 17 to 23, got 16"),
        (BASE.replace("{shapes: dynamic}", "{shapes: dynamic, opset: 24}"), r"opset: graphs are .* 17 to 23, got 24"),
        (BASE + "runtime: {min_version: newest}", r"min_version: .* dots between, like 1.24.2, got 'newest'"),
    ],
)
def test_bad_profile(write: Write, tmp_path: Path, text: str, message: str) -> None:
    write("base", text)
    with pytest.raises(InputError, match=message):
        load_target("base", [tmp_path])


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; give a folder of target profiles"):
        target_names([tmp_path / "missing"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "float16", "weight": "int8"}, "method float16 quantises nothing"),
        ({"method": "float32", "per_channel": True}, "method float32 quantises nothing"),
        ({"method": "dynamic"}, "method dynamic needs a weight type"),
        ({"method": "static", "weight": "int8"}, "method static needs an activation type"),
        ({"method": "dynamic", "weight": "int8", "activation": "int8"}, "method dynamic has uint8 activations"),
        ({"method": "dynamic", "weight": "int4"}, "method dynamic needs a weight type: int8 or uint8"),
        ({"method": "static", "activation": "int8", "weight": "uint8"}, "int8 activations need int8 weights"),
        ({"method": "float32", "embedding": "int8"}, "method float32 quantises nothing"),
        ({"method": "weights"}, "method weights needs a weight type: int8 or int4"),
        ({"method": "weights", "weight": "uint8"}, "method weights needs a weight type: int8 or int4"),
        ({"method": "weights", "weight": "int8", "per_channel": True}, "method weights has blocks: leave out"),
        ({"method": "weights", "weight": "int8", "block_size": 24}, "block_size is a power of two from 16 on"),
        ({"method": "weights", "weight": "int8", "block_size": 8}, "block_size is a power of two from 16 on"),
        ({"method": "dynamic", "weight": "int8", "block_size": 32}, "method dynamic has no blocks"),
        ({"method": "weights", "weight": "int8", "more_bits": "int8_blocks"}, "method weights has no more_bits"),
    ],
)
def test_scheme_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.model_validate({**fields, "why": "a test"})
