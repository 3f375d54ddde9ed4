"""Energy by the machine's own counters: a folder that stands in for powercap, and a library for NVML."""

import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from potstill.pipeline.lineage.energy import NOT_AVAILABLE, _Rapl, metered

LIBRARY = """
#include <string.h>
static unsigned long long spent = 5000;
int nvmlInit_v2(void) { return BROKEN; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = &spent; return strcmp(uuid, "GPU-a-b"); }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
    spent += 1500; *mj = *(unsigned long long *)device; return 0;
}
"""


def package(powercap: Path, number: int, joules: float, most: float = 100) -> Path:
    """A processor's package as Linux shows it, its counter at `joules`."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text(f"{int(most * 1e6)}\n")
    return at(folder, joules)


def at(folder: Path, joules: float) -> Path:
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    return folder


def test_all_packages_are_added_and_a_counter_may_begin_anew(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 10), package(tmp_path, 1, 90)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first, which would count twice
    with metered(tmp_path, "none.so") as found:
        at(first, 25.5)
        at(second, 5)
    assert found == {"processor_joules": 30.5, "accelerator_joules": NOT_AVAILABLE}


def test_a_counter_that_begins_anew_twice_is_read_between(tmp_path: Path) -> None:
    folder = package(tmp_path, 0, 90)
    meter = _Rapl(folder)
    for joules in (20, 80, 10):  # 30, 60 and 30 J
        at(folder, joules)
        meter.read()
    assert meter.joules == pytest.approx(120)


def test_counters_are_read_while_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, 0, 90)
    read = threading.Event()
    monkeypatch.setattr(_Rapl, "read", lambda _: read.set())
    with metered(tmp_path, "none.so", every=0.001):
        assert read.wait(60)


@pytest.mark.parametrize("what", ["none", "still", "not a number", "goes away"])
def test_what_cannot_be_read_is_not_estimated(what: str, tmp_path: Path) -> None:
    folder = package(tmp_path, 0, 1) if what != "none" else tmp_path
    if what == "not a number":
        (folder / "energy_uj").write_text("permission denied")
    with metered(tmp_path, "none.so") as found:
        if what == "goes away":
            (folder / "energy_uj").unlink()
    assert found == {"processor_joules": NOT_AVAILABLE, "accelerator_joules": NOT_AVAILABLE}


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize(
    ("uuid", "broken", "joules"), [("a-b", 0, 1.5), ("other", 0, NOT_AVAILABLE), ("a-b", 1, NOT_AVAILABLE)]
)
def test_accelerators_by_nvml(
    uuid: str, broken: int, joules: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library with NVML's interface, whose counter grows by 1,500 mJ each time it is read."""
    (tmp_path / "nvml.c").write_text(LIBRARY)
    words = ["cc", "-shared", "-fPIC", f"-DBROKEN={broken}", "-o", str(tmp_path / "nvml.so"), str(tmp_path / "nvml.c")]
    subprocess.run(words, check=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    with metered(tmp_path, str(tmp_path / "nvml.so")) as found:
        pass
    assert found["accelerator_joules"] == joules
    with metered(tmp_path, "none.so") as found:
        pass
    assert found["accelerator_joules"] == NOT_AVAILABLE
