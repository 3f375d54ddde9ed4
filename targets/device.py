"""What runs packages: this machine, a host over ssh, a phone over adb, a browser, an emulated CPU."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from potstill.validate.errors import InputError, Unreachable

Kind = Literal["measured", "emulated"]
FORMS = "local, ssh://user@host:port, adb, adb://serial, browser, emulate, emulate://TARGET or qnn-sim"


class BrokenOff(Unreachable):
    """A device went away, or took too long, while its agent ran; `said` is the agent's output until then."""

    def __init__(self, why: str, said: bytes | None = None) -> None:
        super().__init__(why)
        self.said = said or b""


@dataclass(frozen=True)
class Made:
    """In a request: a file that the device makes, and that is brought back to `path`, which is not there yet."""

    path: Path


class Device(Protocol):
    """One place where requests of the agent are answered; see `agent.py`."""

    @property
    def where(self) -> str:
        """As the user names it, such as `ssh://pi@kitchen`."""
        ...

    @property
    def kind(self) -> Kind:
        """Of the times that it gives; those of an emulator are no latency."""
        ...

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """The agent's reply to a request, in which a file of this machine is a `Path` and an output is a `Made`.

        A model's file brings those that hold its weights.

        Raises:
            InputError: the device cannot be used as it was asked for.
            Unreachable: it is not there, went away, or did not answer in time; BrokenOff where the agent ran.
            PotstillError: the agent failed.
        """
        ...


def by_instruction(device: Device) -> bool:
    """Whether a device emulates another processor's instructions: slow, with figures that repeat.

    Android's emulator does not: it is a virtual machine on this processor. Its times are no phone's either, but they
    are as noisy as those of any machine, and its nodes have shares of them.
    """
    return device.kind == "emulated" and not device.where.startswith("adb")


def only_arithmetic(request: Mapping[str, Any], device: str) -> None:
    """Refuse what only times say of, for a device that gives none.

    Args:
        request: to measure; see `Device.ask`.
        device: what it is, with its article.

    Raises:
        InputError: time under load, or several models, are asked for.
    """
    if request.get("sustained") or request.get("throughput"):
        raise InputError(f"{device} says nothing of time under load; leave out --sustained and --throughput")
    if len(request.get("models", [])) > 1:
        raise InputError(f"{device} says nothing of which package is faster; profile each alone")


def with_names(request: Any, name: Callable[[Path | Made], str]) -> Any:
    """A request with a device's names in the place of its files and outputs."""
    if isinstance(request, Path | Made):
        return name(request)
    if isinstance(request, Mapping):
        return {key: with_names(value, name) for key, value in request.items()}
    if isinstance(request, list | tuple):
        return [with_names(value, name) for value in request]
    return request


def files_in(request: Any) -> Iterator[Path | Made]:
    """The files and the outputs of a request, as often as it names them."""
    found: list[Path | Made] = []

    def note(one: Path | Made) -> str:
        found.append(one)
        return ""

    with_names(request, note)
    return iter(found)
