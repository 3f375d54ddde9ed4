"""What an earlier try of a profile had found when its device went away: the same command goes on from there."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from potstill.targets.measurement import Measurement
from potstill.targets.sustained import Sustained
from potstill.validate.files import read_json


@dataclass(frozen=True)
class Earlier:
    """A try that did not finish: its `file`, when it was `taken`, and what it had found by then."""

    file: Path
    taken: str
    measurement: Measurement
    sustained: Sustained | None
    broken_off: list[Sustained]

    def in_words(self) -> str:
        """What is taken from it."""
        words = f"goes on from the try of {readable(self.taken)}: its measurement is taken from there"
        if self.sustained:
            words += f", and its {_length(self.sustained)} s under load from {readable(self.sustained.began)} on"
        elif self.broken_off:
            words += f"; its load broke off after {_length(self.broken_off[-1])} s and begins anew"
        return words


def earlier_try(folder: Path, package: str, key: Mapping[str, Any]) -> Earlier | None:
    """The last try of a package that has this key, where it did not finish; None where it did, or there is none.

    Args:
        folder: where profiles are kept.
        package: its name.
        key: what is kept of the file, the device and the settings, which must all be the same.
    """
    for file in sorted(folder.glob(f"{package}-*.json"), key=lambda one: one.stem.rpartition("-")[2], reverse=True):
        try:
            kept = read_json(file)
            if not all(kept[name] == value for name, value in key.items()):
                continue
            if not kept["unfinished"]:
                return None
            measurement = TypeAdapter(Measurement).validate_python(kept["measurement"])
            sustained = _series(kept["sustained"]) if kept["sustained"] else None
            return Earlier(file, kept["taken"], measurement, sustained, [_series(one) for one in kept["broken_off"]])
        except (OSError, ValueError, LookupError, TypeError, ValidationError):
            continue  # kept by another version, or no profile at all
    return None


def _series(kept: Mapping[str, Any]) -> Sustained:
    """A series without what follows from it."""
    return TypeAdapter(Sustained).validate_python({one.name: kept[one.name] for one in fields(Sustained)})


def _length(series: Sustained) -> str:
    return f"{series.seconds[-1].at_s:.0f}"


def readable(time: str) -> str:
    """A time in UTC, ISO 8601, as one reads it."""
    return time.replace("T", " ").replace("+00:00", " UTC")
