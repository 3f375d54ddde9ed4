"""Checkpoints of every kind, and every way they can be wrong."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from potstill.validate.checkpoint import Checkpoint, build_module
from potstill.validate.errors import InputError, Unreachable
from potstill.validate.task import TASKS

HERE = f"{__name__.rpartition('.')[2]}"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def needs(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def no_module() -> int:
    return 1


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def state() -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in net().state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "best_prec1": 92.0}, lambda s: {"model": s},
                                  lambda s: {f"module.{k}": v for k, v in s.items()}])  # fmt: skip
def test_pytorch_files_of_plain_tensors(tmp_path: Path, wrap: object) -> None:
    torch.save(wrap(state()), tmp_path / "w.th")  # type: ignore[operator]
    module = build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.th"))
    assert all(torch.equal(value, state()[key]) for key, value in module.state_dict().items())


def test_safetensors(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    module = build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.safetensors"))
    assert torch.equal(module[0].bias, state()["0.bias"])  # type: ignore[index]
    assert not module.training


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("/tmp/potstill-was-here"),))  # type: ignore[return-value]


def test_a_pickle_that_is_not_plain_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    Path("/tmp/potstill-was-here").unlink(missing_ok=True)
    (tmp_path / "w.th").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(InputError, match="cannot read the weights|cannot open"):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.th"))
    torch.save({"state_dict": Evil()}, tmp_path / "w2.th")
    with pytest.raises(InputError, match="cannot read the weights.*plain tensors"):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "w2.th"))
    assert not Path("/tmp/potstill-was-here").exists()


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    torch.save(state(), path) if suffix == "th" else save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot (read the weights of|open)"):
        build_module(Checkpoint("test_checkpoint:net", path))


def test_foreign_weights(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=r"does not fit .*: 4 parameters are missing \(.*\) and 1 are foreign \(conv.weight\)"
    ):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.safetensors"))
    torch.save({"epoch": 3}, tmp_path / "w.th")
    with pytest.raises(InputError, match="holds no state dict"):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.th"))
    torch.save(
        {"0.weight": torch.zeros(9, 9)} | {k: v for k, v in state().items() if k != "0.weight"}, tmp_path / "x.th"
    )
    with pytest.raises(InputError, match=r"0\.weight|size mismatch"):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "x.th"))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    torch.save(state() | {"2.bias": torch.tensor([np.nan, 0.0])}, tmp_path / "w.th")
    with pytest.raises(InputError, match=r"not finite in 1 of its tensors \(1 of 2 values of '2\.bias'\)"):
        build_module(Checkpoint("test_checkpoint:net", tmp_path / "w.th"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("no.such.module:net", "cannot import no.such.module:net"),
        ("test_checkpoint:none", "cannot import"),
        ("test_checkpoint:needs", "cannot be called without arguments"),
        ("test_checkpoint:no_module", r"returned int, expected a torch\.nn\.Module"),
    ],
)
def test_factories_that_do_not_work(source: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        build_module(Checkpoint(source))


def test_weights_go_with_a_factory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a factory; write the model as package.module:factory"):
        Checkpoint("folder", tmp_path)
    with pytest.raises(InputError, match="no such weights file"):
        Checkpoint("a.b:c", tmp_path / "none.th")


TEXT, MODULE = TASKS["text-classification"], TASKS["module"]


def test_a_transformers_folder(text_teacher: Path) -> None:
    model = TEXT.load(Checkpoint(str(text_teacher)))
    assert model.labels == ("negative", "positive")
    assert model.encode({"text": ["good film", "a"]})["input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./none", "no such checkpoint folder"),
        ("weights.th", "no such checkpoint folder"),
        ("model.onnx", "no such file: model.onnx"),
    ],
)
def test_folders_that_are_not_there(name: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        TEXT.load(Checkpoint(name))


def test_a_hub_name_offline() -> None:
    with pytest.raises(Unreachable, match="is no folder here, and the model hub did not give it"):
        TEXT.load(Checkpoint("someone/some-model"))


def test_a_truncated_transformers_checkpoint(text_teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_teacher, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot (read the weights of|open)"):
        TEXT.load(Checkpoint(str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json"):
        TEXT.load(Checkpoint(str(folder)))


def test_a_teacher_without_a_trained_head(text_teacher: Path, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    folder = shutil.copytree(text_teacher, tmp_path / "copy")
    BertForMaskedLM.from_pretrained(text_teacher).save_pretrained(folder)
    with pytest.raises(InputError, match=r"holds no trained weights for .*classifier.*must be fine-tuned"):
        TEXT.load(Checkpoint(str(folder)))


def test_a_student_may_bring_an_untrained_head(text_teacher: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    folder = shutil.copytree(text_teacher, tmp_path / "copy")
    BertModel.from_pretrained(text_teacher).save_pretrained(folder)
    student = TEXT.load(Checkpoint(str(folder)), ("negative", "positive"))
    assert set(student.fresh) == {"classifier.weight", "classifier.bias"}
    assert student.labels == ("negative", "positive")


def test_a_student_of_other_classes(text_teacher: Path) -> None:
    with pytest.raises(InputError, match=r"fine-tuned for the classes negative, positive, the teacher for cat, dog"):
        TEXT.load(Checkpoint(str(text_teacher)), ("cat", "dog"))


def test_tasks_refuse_the_other_kind(text_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no attribute 'tokenizer'; a teacher .* brings its own.*--task module"):
        TEXT.load(Checkpoint("test_checkpoint:net"))
    with pytest.raises(InputError, match="takes package.module:factory"):
        MODULE.load(Checkpoint(str(text_teacher)))


def test_a_folder_with_a_factorys_weights_runs_no_code(tmp_path: Path) -> None:
    model = MODULE.load(Checkpoint("test_checkpoint:net"), example={"x": np.zeros((1, 4))})
    model.save(tmp_path)
    with pytest.raises(
        InputError, match=r"no code is run from a checkpoint; name the factory yourself: test_checkpoint:net"
    ):
        MODULE.load(Checkpoint(str(tmp_path)))
    saved = Checkpoint("test_checkpoint:net", tmp_path / "model.safetensors")
    again = MODULE.load(saved, model.labels, example={"x": np.zeros((1, 4))})
    assert again.parameters == model.parameters == 23


def test_inputs_that_a_module_does_not_take() -> None:
    with pytest.raises(InputError, match=r"does not take x of shape \(1, 5\)"):
        MODULE.load(Checkpoint("test_checkpoint:net"), example={"x": np.zeros((1, 5))})
    with pytest.raises(InputError, match=r"x is <U1; expected numbers"):
        MODULE.load(Checkpoint("test_checkpoint:net"), example={"x": np.array([["a"]])})


def test_the_digest_of_a_factory_sees_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "edited_models.py"
    code.write_text("from torch import nn\ndef net(): return nn.Linear(2, 2)\n")
    before = Checkpoint("edited_models:net").digest()
    code.write_text("from torch import nn\ndef net(): return nn.Linear(2, 3)\n")
    sys.modules.pop("edited_models")
    assert Checkpoint("edited_models:net").digest() != before
