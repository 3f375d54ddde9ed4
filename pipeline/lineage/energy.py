"""The energy that a stage takes, by the machine's own counters; nothing is estimated."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOT_AVAILABLE = "not available"
POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
EVERY = 30.0  # seconds; RAPL's 32-bit counters of 15 µJ and more take minutes to run over
Counter = Callable[[], float | None]


@contextmanager
def metered(powercap: Path = POWERCAP, nvml: str = NVML, every: float = EVERY) -> Iterator[dict[str, Any]]:
    """Fill a mapping, when the block ends, with what the machine used in it, other programs' share included.

    `processor_joules` is by RAPL (Linux, powercap: the packages' counters), `accelerator_joules` by NVML
    (`nvmlDeviceGetTotalEnergyConsumption`, all devices that torch sees). A counter that is not there, may not be read
    or does not move is `not available`.
    """
    meters = [*map(_Rapl, sorted(powercap.glob("intel-rapl:?"))), *_gpus(nvml)]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(every):
            for meter in meters:
                meter.read()

    thread = threading.Thread(target=sample, name="energy", daemon=True)
    found: dict[str, Any] = {}
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        for meter in meters:
            meter.read()
        found["processor_joules"] = _total([one for one in meters if isinstance(one, _Rapl)])
        found["accelerator_joules"] = _total([one for one in meters if isinstance(one, _Gpu)])


class _Meter:
    """A counter that grows; `joules` since it was made, None once it could not be read."""

    joules: float | None = 0.0

    def __init__(self) -> None:
        self._last = self.counter()

    def counter(self) -> float | None:
        """Joules by the counter."""
        raise NotImplementedError

    def overflow(self) -> float:
        """What is added where the counter began anew."""
        return 0.0

    def read(self) -> None:
        """Add what was used since the last time."""
        now, last = self.counter(), self._last
        if now is None or last is None or self.joules is None:
            self.joules = None
            return
        self.joules += now - last + (self.overflow() if now < last else 0.0)
        self._last = now


class _Rapl(_Meter):
    """A processor's package (https://docs.kernel.org/power/powercap/powercap.html), in µJ."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__()

    def counter(self) -> float | None:
        return self._number("energy_uj")

    def overflow(self) -> float:
        return self._number("max_energy_range_uj") or 0.0

    def _number(self, name: str) -> float | None:
        try:
            return int((self._folder / name).read_text()) / 1e6
        except (OSError, ValueError):  # most systems let only root read it
            return None


class _Gpu(_Meter):
    """An accelerator by NVML, in mJ."""

    def __init__(self, library: Any, uuid: str) -> None:
        self._library, self._device = library, ctypes.c_void_p()
        self._there = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._device)) == 0
        super().__init__()

    def counter(self) -> float | None:
        found = ctypes.c_ulonglong()
        if not self._there or self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(found)):
            return None
        return found.value / 1e3


def _gpus(nvml: str) -> list[_Gpu]:
    """The accelerators that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        library = ctypes.CDLL(nvml)
    except OSError:
        return []
    if library.nvmlInit_v2():
        return []
    count = torch.cuda.device_count()
    return [_Gpu(library, f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in range(count)]


def _total(meters: list[Any]) -> float | str:
    """Joules of all together, if all of them could be read and any moved."""
    joules = [meter.joules for meter in meters]
    total = sum(one for one in joules if one is not None)
    return round(total, 3) if total > 0 and None not in joules else NOT_AVAILABLE
