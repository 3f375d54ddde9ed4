"""The bill of materials beside a checkpoint and in a package: CycloneDX 1.6, for machine learning (ECMA-424).

It says what the record says, in the form that other tools read: models, data and libraries as components with hashes
and licences, and what was made of what. The same record gives the same bytes. cyclonedx-python-lib writes it; model
cards, which it does not know yet, are put into what it wrote, as the schema wants them.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from potstill.export.package import BOM
from potstill.pipeline.lineage.record import LEARNED_FROM
from potstill.validate.files import read_json, sha256_json

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

README = "README.md"
OWN = (README, BOM)  # written after, from the same record
_SHA256 = re.compile(r"[0-9a-f]{64}")


def package_bom(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The bill of materials of a package; None for one whose lineage has no chain, as those before 2026-11-24."""
    record, target = manifest["lineage"], manifest["target"]["id"]
    if "chain" not in record:
        return None
    files = {name: found["sha256"] for name, found in manifest["files"].items() if name not in OWN}
    metrics = [_metric(manifest["scorecard"])] if manifest["scorecard"] else []
    return _bom(record, f"{record['teacher']['source']} for {target}", "package", files, _architecture(folder), metrics)


def checkpoint_bom(folder: Path, record: dict[str, Any]) -> str | None:
    """The bill of materials of a checkpoint; None for one whose record has no chain."""
    if "chain" not in record:
        return None
    files = record["stages"][-1].get("files", {}) if record["stages"] else {}
    return _bom(record, f"student of {record['teacher']['source']}", "student", files, _architecture(folder), [])


def _architecture(folder: Path) -> str | None:
    """The class of a model of transformers, by its config."""
    config: dict[str, Any] = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("architectures") or [None]
    return str(named[0]) if named[0] else None


def _metric(scorecard: dict[str, Any]) -> dict[str, Any]:
    low, high = scorecard["interval"]["low"], scorecard["interval"]["high"]
    within = {"lowerBound": str(low), "upperBound": str(high)}
    return {"type": scorecard["metric"], "value": str(scorecard["value"]), "confidenceInterval": within}


def _bom(
    record: dict[str, Any],
    name: str,
    kind: str,
    files: dict[str, str],
    architecture: str | None,
    metrics: list[dict[str, Any]],
) -> str:
    """The document; `kind` is what it is of, `files` are SHA-256 by name."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    weights = files.get("model.onnx") or files.get("model.safetensors")
    main = _model(kind, name, (weights or record["chain"][-1])[:12], weights)
    main.components = [_part("FILE", f"{kind}/{one}", one, sha256=found) for one, found in files.items()]
    begun, libraries = _models(record), _libraries(record)
    learned, judged = _data(record, learned=True), _data(record, learned=False)
    between = _between(record) if kind == "package" else []
    bom = Bom(metadata=BomMetaData(component=main, timestamp=datetime.fromisoformat(record["made"])))
    last = between[-1] if between else main
    if last is main:
        last.properties = _stages(record)
    bom.register_dependency(main, [*(between or begun), *judged, *libraries])
    bom.register_dependency(last, [*begun, *learned])
    for part in (*begun, *between, *learned, *judged, *libraries):
        bom.components.add(part)
        bom.register_dependency(part)
    written = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    del written["serialNumber"]  # the library's is drawn
    written["metadata"]["component"]["modelCard"] = _card(record, record["data"], architecture, metrics)
    for part in written["components"]:
        if part["bom-ref"] == "student":
            part["modelCard"] = _card(record, [name for name in record["data"] if name in LEARNED_FROM], None, [])
    written["serialNumber"] = uuid5(NAMESPACE_URL, sha256_json(written)).urn
    return json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _between(record: dict[str, Any]) -> list["Component"]:
    """The checkpoint that a package was made of, where a stage made one."""
    if not record["stages"]:
        return []
    sha256 = record["stages"][-1].get("files", {}).get("model.safetensors")
    student = _model("student", f"student of {record['teacher']['source']}", record["chain"][-1][:12], sha256)
    student.properties = _stages(record)
    return [student]


def _models(record: dict[str, Any]) -> list["Component"]:
    """Teachers, and the checkpoint that the student began as."""
    named = {"teacher": record["teacher"]}
    named |= {f"teacher-{i}": one for i, one in enumerate(record["other_teachers"], 2)}
    named |= {"origin": record["student"]} if record["student"] else {}
    found = []
    for ref, one in named.items():
        model = _model(ref, one["source"], one["revision"], one["sha256"], one["licence"])
        model.components = [_part("FILE", f"{ref}/{name}", name, sha256=sha) for name, sha in one["files"].items()]
        if one["api"]:
            model.properties = [_property("api", f"{one['api']['model']} at {one['api']['service']}")]
        found.append(model)
    return found


def _data(record: dict[str, Any], learned: bool) -> list["Component"]:
    """The sets of examples that were learned from, or the others."""
    found = []
    for name, one in record["data"].items():
        if (name in LEARNED_FROM) == learned:
            part = _part("DATA", f"data/{name}", one["name"], sha256=one["sha256"], licence=one["licence"])
            part.properties = [_property("role", name), _property("examples", one["examples"])]
            part.description = "SHA-256 of the examples as they are read, not of the file"
            found.append(part)
    return found


def _libraries(record: dict[str, Any]) -> list["Component"]:
    """What made the model: Potstill and the libraries, by the versions that are installed."""
    from packageurl import PackageURL

    found = []
    for name, version in record["versions"].items():
        if version != "not installed":
            part = _part("LIBRARY", f"library/{name}", name, version)
            part.purl = PackageURL("pypi", None, name, version)
            if name == "potstill":
                told = {key: value for key, value in record["code"].items() if value is not None}
                part.properties = [_property(f"code:{key}", value) for key, value in told.items()]
            found.append(part)
    return found


def _stages(record: dict[str, Any]) -> list[Any]:
    """The stages as properties, in order, with the seed and the links of the chain."""
    links = zip(record["stages"], record["chain"][1:], strict=True)
    told = [("seed", record["seed"]), ("chain:0", record["chain"][0])]
    for number, (stage, link) in enumerate(links, 1):
        plain = {name: value for name, value in stage.items() if name != "files"}
        told += [(f"stage:{number}", json.dumps(plain, sort_keys=True)), (f"chain:{number}", link)]
    return [_property(name, value) for name, value in told]


def _card(
    record: dict[str, Any], data: Iterable[str], architecture: str | None, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The model card of the schema: task, architecture, data by reference, and what was measured."""
    parameters = {"task": record["task"], "datasets": [{"ref": f"data/{name}"} for name in data]}
    parameters |= {"modelArchitecture": architecture} if architecture else {}
    measured = {"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}
    return {"modelParameters": parameters, **measured}


def _model(ref: str, name: str, version: str | None, sha256: str | None, licence: str | None = None) -> "Component":
    return _part("MACHINE_LEARNING_MODEL", ref, name, version, sha256, licence)


def _part(
    kind: str, ref: str, name: str, version: str | None = None, sha256: str | None = None, licence: str | None = None
) -> "Component":
    """A component; what is no SHA-256 (the name that stands for a model of the hub) is no hash of it."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    hashed = sha256 is not None and _SHA256.fullmatch(sha256)
    return Component(
        type=ComponentType[kind],
        bom_ref=ref,
        name=name,
        version=version,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 and hashed else [],
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
    )


def _property(name: str, value: Any) -> Any:
    from cyclonedx.model import Property

    return Property(name=f"potstill:{name}", value=str(value))


def differs(expected: Any, found: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two documents differ, with what was expected and found there; None where they are equal.

    Components are known by their `bom-ref`, and other parts of lists by their order.
    """
    if isinstance(expected, list) and isinstance(found, list):
        expected, found = _keyed(expected), _keyed(found)
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return None if expected == found else (where, expected, found)
    for name in [*expected, *(one for one in found if one not in expected)]:
        inner = differs(expected.get(name), found.get(name), f"{where}.{name}" if where else str(name))
        if inner:
            return inner
    return None


def _keyed(parts: list[Any]) -> dict[str, Any]:
    return {str(one.get("bom-ref", i) if isinstance(one, dict) else i): one for i, one in enumerate(parts)}
