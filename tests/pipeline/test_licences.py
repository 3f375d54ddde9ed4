"""Licences: found by name and text, read from cards and files, and judged for what they are used for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from potstill.pipeline.lineage.licences import OWN, Licence, licence_named, recognised, service_at, table
from potstill.pipeline.lineage.origins import verdict_of_recipe
from potstill.pipeline.lineage.reading import private, read_checkpoint, read_data, read_folder, written_by
from potstill.pipeline.lineage.said import DECIDED_BY
from potstill.pipeline.lineage.terms import LEVELS, OTHERS, Verdict
from potstill.pipeline.recipe import Recipe, build_recipe
from potstill.pipeline.stages import STAGES
from potstill.validate.errors import GateFailed, InputError

ROOT = Path(__file__).resolve().parents[2]
MIT = """MIT License

Copyright (c) 2026 Nobody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
"""
LLAMA = "**LLAMA 3.1 COMMUNITY LICENSE AGREEMENT**\n\n Llama 3.1 Version Release Date: July 23, 2024\n"


@pytest.fixture(autouse=True)
def nobody_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DECIDED_BY)


def model(folder: Path, licence: str | None = None, text: str | None = None, **files: str) -> Path:
    """A folder with a card that names a licence, and a LICENSE file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    if text:
        (folder / "LICENSE").write_text(text)
    for name, said in files.items():
        (folder / name).write_text(said)
    return folder


def recipe(base: Path, teacher: Path | dict[str, Any], *, task: str = "text-classification", **changes: Any) -> Recipe:
    """A recipe that distils two layers of a teacher from one's own data."""
    for name in ("train", "eval"):
        (base / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": 0}) + "\n")
    mapping: dict[str, Any] = {
        "task": task, "teacher": teacher if isinstance(teacher, dict) else str(teacher),
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "student": {"layers": 2}, "stages": ["distill"], "licences": {"data": "own"},
    }  # fmt: skip
    return build_recipe(mapping | changes, stage_types=STAGES, target_names=["laptop-x86-vnni"], base=base)


def verdict(base: Path, teacher: Path | dict[str, Any], **changes: Any) -> Verdict:
    return verdict_of_recipe(recipe(base, teacher, **changes))


# The table.


def test_each_entry_says_where_and_when_it_was_read() -> None:
    licences = table().licences
    assert len({one.id for one in licences}) == len(licences) > 30
    for one in licences:
        if one.id != OWN:
            assert one.source.startswith("https://"), one.id
            assert licence_named(one.id, "here") == one
            assert all(licence_named(name, "here") == one for name in one.names)
        if one.seen == "no":  # what was not read is not known
            assert {one.outputs, one.weights, one.commercial} == {"unknown"}, one.id
        assert (one.commercial == "limited") == bool(one.limit), one.id
    for service in table().services:
        assert (service.outputs == "unknown") == (service.seen == "no"), service.id


def test_ids_are_those_of_spdx_where_it_has_them() -> None:
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    foreign = set()
    for one in table().licences:
        try:
            assert canonicalize_license_expression(one.id).lower() == one.id
        except InvalidLicenseExpression:
            foreign.add(one.id)
    assert not foreign & {"apache-2.0", "mit", "bsd-3-clause", "cc-by-sa-4.0", "mpl-2.0", "psf-2.0"}
    assert {"llama3.1", "gemma", OWN} <= foreign


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("apache 2.0", "apache-2.0"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0"),
        ("tongyi-qianwen-license-agreement", "tongyi-qianwen"),
        ("WTFPL", None),
        ("MIT OR Apache-2.0", None),
        ("other", None),
    ],
)
def test_a_name_finds_its_entry(name: str, found: str | None) -> None:
    licence = licence_named(name, "here")
    assert (licence.id if licence else None) == found


def test_a_name_that_nobody_knows_is_an_error() -> None:
    said = "a card: unknown licence 'apache2'; did you mean 'apache-2.0'?; expected an SPDX id, an id of the hub's, or"
    with pytest.raises(InputError, match=re.escape(said)):
        licence_named("apache2", "a card")
    with pytest.raises(InputError, match=r"unknown licence '\?\?\?'; expected an SPDX id"):
        licence_named("???", "a card")


COMMON = Path("/usr/share/common-licenses")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (ROOT / "LICENSE", "apache-2.0"),
        *[(COMMON / name, found) for name, found in {
            "Apache-2.0": "apache-2.0", "BSD": "bsd-3-clause", "CC0-1.0": "cc0-1.0", "GPL-3": "gpl-3.0",
            "LGPL-3": "lgpl-3.0", "MPL-2.0": "mpl-2.0",
        }.items()],
    ],
    ids=lambda one: getattr(one, "name", one),
)  # fmt: skip
def test_real_texts_are_recognised(path: Path, found: str) -> None:
    if not path.is_file():
        pytest.skip(f"no {path} here")
    assert [one.id for one in recognised(path.read_text(encoding="utf-8"))] == [found]


@pytest.mark.parametrize("version", ["3.1", "3.2", "3.3", "4"])
def test_versions_of_a_licence_are_told_apart(version: str) -> None:
    text = LLAMA.replace("3.1", version)
    assert [one.id for one in recognised(text)] == [f"llama{version}"]
    assert not recognised(text.replace("COMMUNITY", "FAMILY"))


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.openai.com:443", "openai"),
        ("api.openai.com.example.org", None),
        ("notapi.openai.com", None),
    ],
)
def test_a_service_is_known_by_its_host(host: str, found: str | None) -> None:
    service = service_at(host)
    assert (service.id if service else None) == found


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:8000", True), ("localhost:80", True), ("192.168.1.7", True), ("[::1]:8000", True), ("[::1]", True),
        ("gpu-box:8000", True), ("gpu.local", True), ("8.8.8.8:80", False), ("api.example.com", False),
    ],
)  # fmt: skip
def test_an_address_of_ones_own_network(host: str, own: bool) -> None:
    assert private(host) == own


# Reading.


def test_a_card_and_a_file_that_agree(tmp_path: Path) -> None:
    found = read_folder(model(tmp_path / "m", "mit", MIT, NOTICE="A notice."))
    assert isinstance(found.licence, Licence)
    assert (found.licence.id, found.where, found.why) == ("mit", "its card", None)
    assert found.texts == {"LICENSE": MIT, "NOTICE": "A notice."}


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    found = read_folder(model(tmp_path / "m", None, LLAMA))
    assert found.licence is not None
    assert (found.licence.id, found.where) == ("llama3.1", "its file LICENSE")


def test_a_card_that_contradicts_the_file_is_an_error(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "apache-2.0", LLAMA)
    said = (
        "m: its card says apache-2.0, and its file LICENSE is Llama 3.1 Community License; find out which, and say it"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        read_folder(folder)
    with pytest.raises(InputError, match="m: its card says apache-2.0"):
        verdict(tmp_path, folder)
    with pytest.raises(InputError, match="m: its card says apache-2.0"):
        verdict(tmp_path, folder, licences={"teacher": "llama3.1", "data": "own"})
    decided = verdict(tmp_path, folder, licences={"teacher": "llama3.1", "data": "own", "decided_by": "Ada"})
    assert decided.level == "allowed if"
    assert decided.findings[0].licence == "llama3.1"


def test_a_card_with_a_licence_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m: its card: unknown licence 'apache2.0'; did you mean 'apache-2.0'"):
        read_folder(model(tmp_path / "m", "apache2.0"))
    with pytest.raises(InputError, match="n: the header of its card cannot be read: "):
        read_folder(model(tmp_path / "n", "[a: b"))


def test_a_licence_of_its_own_name_is_unknown_and_no_error(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "other\nlicense_name: our-own-one")
    found = read_folder(folder)
    assert (found.licence, found.name) == (None, "our-own-one")
    assert found.why == "the table has no answers for 'our-own-one'"
    named = read_folder(model(tmp_path / "n", "other\nlicense_name: qwen-research"))
    assert named.licence is not None
    assert named.licence.id == "qwen-research"
    several = read_folder(model(tmp_path / "o", "[mit, apache-2.0]"))
    assert several.name == "mit and apache-2.0"


def test_what_no_file_says(tmp_path: Path) -> None:
    assert read_folder(model(tmp_path / "m")).why == "neither its card nor a file says"
    assert read_folder(model(tmp_path / "n", None, "Do what you like.")).why == "the text of LICENSE is not recognised"
    both = read_folder(model(tmp_path / "o", None, MIT + LLAMA))
    assert both.why == "LICENSE names several: MIT License and Llama 3.1 Community License"


def test_a_name_of_the_hub_that_cannot_be_read_is_unknown() -> None:
    found = read_checkpoint("somebody/no-such-model")
    assert (found.licence, found.where) == (None, "the hub")
    assert "its card could not be read" in str(found.why)


def test_a_name_of_the_hub_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type))
        assert "README.md" in allow_patterns
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model(tmp_path / "m", "cc-by-4.0")
    for found in (read_checkpoint("somebody/model"), read_data("somebody/data")):
        assert found.licence is not None
        assert found.licence.id == "cc-by-4.0"
    assert asked == [("somebody/model", "model"), ("somebody/data", "dataset")]


def test_a_factory_of_ones_own_code_is_ones_own(tmp_path: Path) -> None:
    own = read_checkpoint("models_of_mine:big")
    assert own.licence is not None
    assert own.licence.id == OWN
    foreign = read_checkpoint("transformers.models.bert:Thing")
    assert foreign.licence is None
    assert foreign.why == "its code is of the installed package transformers, and not one's own"
    weights = model(tmp_path / "w", None, MIT) / "weights.safetensors"
    weights.write_text("")
    beside = read_checkpoint("models_of_mine:big", weights)
    assert beside.licence is not None
    assert beside.licence.id == "mit"


def test_who_wrote_a_file_stands_in_its_record(tmp_path: Path) -> None:
    data, clean = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    settings = {"api": "https://api.openai.com/v1", "model": "gpt"}
    data.with_name("data.jsonl.record.json").write_text(json.dumps({"settings": settings}))
    clean.with_name("clean.jsonl.record.json").write_text(json.dumps({"settings": {}, "input": {"file": "data.jsonl"}}))
    assert written_by(str(data)) == written_by(str(clean)) == ("api.openai.com", "gpt")
    assert written_by(str(tmp_path / "other.jsonl")) is None
    data.with_name("data.jsonl.record.json").write_text("[1]")
    assert written_by(str(clean)) is None


# Verdicts.


@pytest.mark.parametrize(
    ("licence", "task", "more", "level", "told"),
    [
        ("cc0-1.0", "text-classification", {}, "allowed", "its answers may teach"),
        ("apache-2.0", "text-classification", {}, "allowed if", "its licence's text goes along"),
        ("llama3.1", "text-generation", {}, "allowed if", "the name of what is made begins with 'Llama'"),
        ("gemma", "text-generation", {}, "allowed if", "what is made is under gemma"),
        ("mrl", "text-generation", {}, "unknown", "whether its answers may teach was not read"),
        ("wtfpl", "text-generation", {}, "unknown", "the table has no answers for 'wtfpl'"),
        ("cc-by-nc-4.0", "text-generation", {}, "unknown", "it allows no commercial use; say licences.use"),
        ("cc-by-nc-4.0", "text-generation", {"use": "non-commercial"}, "allowed if", "no commercial use"),
        ("cc-by-nc-4.0", "text-generation", {"use": "commercial"}, "forbidden", "licences.use is commercial"),
    ],
)
def test_a_student_cut_from_a_teacher(
    licence: str, task: str, more: dict[str, str], level: str, told: str, tmp_path: Path
) -> None:
    found = verdict(tmp_path, model(tmp_path / "m"), task=task, licences={"teacher": licence, "data": "own"} | more)
    assert found.level == level
    assert told in found.findings[0].in_words()


@pytest.mark.parametrize("licence", ["llama2", "llama3", "tongyi-qianwen-research"])
def test_what_may_teach_its_own_kind_alone(licence: str, tmp_path: Path) -> None:
    teacher, said = model(tmp_path / "m", licence if licence.startswith("llama") else None), {"use": "non-commercial"}
    said |= {"teacher": licence, "data": "own"}
    other = {"checkpoint": str(model(tmp_path / "s", "apache-2.0"))}
    cut = verdict(tmp_path, teacher, task="text-generation", licences=said)
    assert cut.level == "allowed if"
    assert cut.licence is not None
    assert cut.licence.id == licence
    stranger = verdict(tmp_path, teacher, task="text-generation", licences=said, student=other)
    assert stranger.level == "forbidden"
    assert "its answers may improve no language model but those under its own licence" in stranger.in_words()[1]
    assert verdict(tmp_path, teacher, licences=said, student=other).level == "unknown"  # no language model
    family = verdict(
        tmp_path,
        teacher,
        task="text-generation",
        licences=said | {"student": licence, "decided_by": "A"},
        student=other,
    )
    assert family.level == "allowed if"


def test_forbidden_stops_whoever_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECIDED_BY, "Ada")
    other = {"checkpoint": str(model(tmp_path / "s", "apache-2.0"))}
    found = verdict(tmp_path, model(tmp_path / "m", "llama3"), task="text-generation", student=other)
    with pytest.raises(GateFailed, match=r"licences: forbidden, so nothing was run\. teacher m, llama3 \(its card\)"):
        found.check()


def test_unknown_goes_on_where_somebody_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m")
    unknown = verdict(tmp_path, folder)
    assert unknown.level == "unknown"
    with pytest.raises(
        GateFailed, match=r"licences: unknown, so nothing was run\. teacher m, no licence known"
    ) as found:
        unknown.check()
    assert "`own` for what you made yourself), or who decided" in str(found.value)
    assert "Potstill is no lawyer" in str(found.value)
    decided = verdict(tmp_path, folder, licences={"data": "own", "decided_by": "Ada", "decision": "asked them"})
    decided.check()
    assert decided.in_words()[0] == "licences: unknown, decided by Ada (asked them)"
    assert decided.to_json()["decided_by"] == "Ada"
    monkeypatch.setenv(DECIDED_BY, " Grace ")
    everywhere = verdict(tmp_path, folder)
    everywhere.check()
    assert everywhere.decided_by == "Grace"


def test_the_worst_source_decides(tmp_path: Path) -> None:
    """All pairs of a teacher's and a student's level, against their maximum."""
    of = {"cc0-1.0": "allowed", "apache-2.0": "allowed if", "mrl": "unknown"}
    for teacher in of:
        for student in of:
            folders = [model(tmp_path / f"{role}-{teacher}-{student}") for role in ("t", "s")]
            said = {"teacher": teacher, "student": student, "data": "own"}
            found = verdict(tmp_path, folders[0], licences=said, student={"checkpoint": str(folders[1])})
            taught = "allowed" if teacher == "apache-2.0" else of[teacher]  # its text goes with its weights alone
            assert found.level == max(taught, of[student], key=LEVELS.index), (teacher, student)


def test_who_only_judges_asks_for_nothing(tmp_path: Path) -> None:
    student = {"checkpoint": str(model(tmp_path / "s", "mit", MIT))}
    found = verdict(
        tmp_path, model(tmp_path / "m"), student=student, stages=[], targets=["laptop-x86-vnni"], licences={}
    )
    assert [(one.role, one.level) for one in found.findings] == [("teacher", "allowed"), ("student", "allowed if")]


def test_data_is_asked_too(tmp_path: Path) -> None:
    teacher = model(tmp_path / "m", "cc0-1.0")
    found = verdict(tmp_path, teacher, licences={"train": "cc-by-sa-4.0"})
    assert found.level == "allowed if"
    train = found.findings[1]
    assert train.must == ("the card names train.jsonl and its licence",)
    assert "is not settled" in train.why[0]
    assert verdict(tmp_path, teacher, licences={}).level == "unknown"
    assert verdict(tmp_path, teacher, licences={"data": "odc-by"}).level == "unknown"


def test_data_that_a_service_wrote_is_under_its_terms(tmp_path: Path) -> None:
    settings = {"api": "https://api.openai.com/v1", "model": "gpt"}
    (tmp_path / "train.jsonl.record.json").write_text(json.dumps({"settings": settings}))
    found = verdict(tmp_path, model(tmp_path / "m", "mit"))
    assert found.level == "forbidden"
    assert [one.role for one in found.findings] == ["teacher", "api", "train"]


def test_what_a_model_of_potstill_was_made_of_goes_on(tmp_path: Path) -> None:
    """A student under Apache that non-commercial data and a service taught: its licence alone would not tell."""
    findings = [
        {"role": "teacher", "name": "big", "licence": "apache-2.0"},
        {"role": "train", "name": "a.tsv", "licence": "cc-by-nc-4.0"},
        {"role": "api", "name": "api.x.ai", "licence": "xai"},
        {"role": "unlabelled", "name": "b.tsv", "licence": None},
    ]
    teacher = model(tmp_path / "m", "apache-2.0", (ROOT / "LICENSE").read_text())
    (teacher / "potstill.json").write_text(json.dumps({"licences": {"findings": findings}}))
    found = verdict(tmp_path, teacher)
    assert [(one.role, one.level) for one in found.findings] == [
        ("teacher", "allowed if"), ("train of m", "unknown"), ("api of m", "forbidden"),
        ("unlabelled of m", "unknown"), ("train", "allowed"),
    ]  # fmt: skip
    assert found.findings[3].why == ("it was not known when that was made",)
    package = model(tmp_path / "p", "mit", MIT)
    (package / "manifest.json").write_text(json.dumps({"lineage": {"licences": {"findings": findings[1:2]}}}))
    of_package = verdict(tmp_path, package, licences={"data": "own", "use": "commercial"})
    assert of_package.findings[1].level == "forbidden"
    (package / "manifest.json").write_text("[]")
    assert len(verdict(tmp_path, package).findings) == 2


def test_a_student_of_ones_own_models_is_ones_own(tmp_path: Path) -> None:
    for level, known in (("allowed", True), ("allowed if", True), ("unknown", False)):
        folder = model(tmp_path / level)
        (folder / "potstill.json").write_text(json.dumps({"licences": {"level": level, "licence": None}}))
        found = read_folder(folder)
        assert (found.licence is not None and found.licence.id == OWN) == known
    assert found.why == "neither its card nor a file says"


def test_two_licences_that_both_want_what_is_made(tmp_path: Path) -> None:
    student = {"checkpoint": str(model(tmp_path / "s", "gpl-3.0"))}
    found = verdict(tmp_path, model(tmp_path / "m", "gemma"), student=student)
    assert found.level == "unknown"
    assert found.findings[-1].why == ("gemma and gpl-3.0 each want what is made under them",)
    assert found.licence is None


def test_a_licence_of_ones_choice(tmp_path: Path) -> None:
    said = {"data": "own", "made": "mit"}
    free = verdict(tmp_path, model(tmp_path / "m", "cc0-1.0"), licences=said)
    assert free.licence is not None
    assert free.licence.id == "mit"
    bound = verdict(tmp_path, model(tmp_path / "g", "gemma"), licences=said)
    assert bound.level == "forbidden"
    assert bound.findings[-1].why == ("licences.made is mit, and gemma wants its own",)


def test_what_goes_along(tmp_path: Path) -> None:
    found = verdict(tmp_path, model(tmp_path / "m", "llama3.1", LLAMA, **{"Notice.txt": "Theirs."}))
    assert found.prefix == "Llama"
    assert found.credits == ("Built with Llama",)
    assert found.texts["LICENSE"] == LLAMA
    assert found.texts["NOTICE"].startswith("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright ©")
    assert found.texts["NOTICE"].endswith("Theirs.\n")
    student = {"checkpoint": str(model(tmp_path / "s", "mit", MIT))}
    mixed = verdict(
        tmp_path, model(tmp_path / "d", "deepseek", "DEEPSEEK LICENSE AGREEMENT\n\nVersion 1.0, 2023"), student=student
    )
    assert mixed.licence is not None
    assert mixed.licence.id == "deepseek"
    assert mixed.texts["LICENSE"].startswith("DEEPSEEK")
    assert MIT.strip() in mixed.texts[OTHERS]
    bare = verdict(tmp_path, model(tmp_path / "b", "mit"))
    assert bare.left == (
        "the text of MIT License is not beside b; add it from https://spdx.org/licenses/MIT.html",
    )  # fmt: skip


API: dict[str, Any] = {"api": "https://api.openai.com", "model": "gpt"}


def black_box(tmp_path: Path, address: str, **said: Any) -> Verdict:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    student = {"checkpoint": str(tmp_path / "s")}
    if not (tmp_path / "s").is_dir():
        model(tmp_path / "s", "apache-2.0", (ROOT / "LICENSE").read_text())
    data = {"prompts": "p.jsonl", "eval": "eval.jsonl"}
    return verdict(
        tmp_path, API | {"api": address}, task="text-generation", student=student, data=data,
        licences={"prompts": "own"} | said,
    )  # fmt: skip


def test_a_service_that_forbids_rivals(tmp_path: Path) -> None:
    found = black_box(tmp_path, "https://api.anthropic.com")
    assert found.level == "forbidden"
    assert black_box(tmp_path, "https://api.anthropic.com", competes=False).level == "forbidden"  # nobody says so
    said = black_box(tmp_path, "https://api.anthropic.com", competes=False, decided_by="Ada")
    assert said.level == "allowed if"
    assert "what is made does not compete with its owner, says Ada" in said.findings[0].must


def test_a_service_that_allows_it_or_that_nobody_knows(tmp_path: Path) -> None:
    assert black_box(tmp_path, "https://api.deepseek.com").level == "allowed if"  # of the student's own licence
    assert black_box(tmp_path, "https://api.cohere.com").level == "unknown"
    unknown = black_box(tmp_path, "https://api.example.com")
    assert unknown.findings[0].why == ("the table has no terms for api.example.com",)
    assert black_box(tmp_path, "https://api.example.com", api="openai").level == "forbidden"


def test_a_server_of_ones_own_asks_for_the_models_licence(tmp_path: Path) -> None:
    unsaid = black_box(tmp_path, "http://localhost:8000")
    assert unsaid.level == "unknown"
    assert unsaid.findings[0].name == "a server of one's own"
    assert unsaid.findings[1].why == ("which licence the served model has is not said",)
    assert black_box(tmp_path, "http://localhost:8000", teacher="apache-2.0").level == "allowed if"
    assert black_box(tmp_path, "http://localhost:8000", teacher="llama3").level == "forbidden"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"teacher": "apache2"}, "licences.teacher: unknown licence 'apache2'; did you mean 'apache-2.0'?"),
        ({"api": "opanai"}, "licences.api: unknown terms 'opanai'; did you mean 'openai'?"),
        ({"decision": "because"}, "licences.decision: a decision is somebody's: give decided_by too"),
        ({"techer": "mit"}, "licences.techer: unknown key; did you mean 'teacher'?"),
        ({"use": "both"}, "licences.use: expected 'commercial' or 'non-commercial'; given the text 'both'"),
    ],
)
def test_what_a_recipe_cannot_say(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        recipe(tmp_path, model(tmp_path / "m"), licences=said)


def test_a_recipe_that_differs_from_the_card(tmp_path: Path) -> None:
    teacher = model(tmp_path / "m", "gemma")
    said = "licences.teacher is mit, and its card says gemma of m; say who decided that (licences.decided_by), or leave"
    with pytest.raises(InputError, match=re.escape(said)):
        verdict(tmp_path, teacher, licences={"teacher": "mit", "data": "own"})
    decided = verdict(tmp_path, teacher, licences={"teacher": "mit", "data": "own", "decided_by": "Ada"})
    assert decided.findings[0].where == "the recipe, against its card: gemma"


def test_each_other_teacher_has_its_licence(tmp_path: Path) -> None:
    teachers = {"other_teachers": [str(model(tmp_path / "o", "gemma"))]}
    found = verdict(tmp_path, model(tmp_path / "m", "mit", MIT), **teachers)
    assert [one.licence for one in found.findings[:2]] == ["mit", "gemma"]
    assert found.licence is not None
    assert found.licence.id == "gemma"
    with pytest.raises(InputError, match=r"licences.other_teachers: 2 given for 1 other teachers"):
        verdict(tmp_path, tmp_path / "m", licences={"data": "own", "other_teachers": ["mit", "mit"]}, **teachers)
