"""The time of a search, which is asked before each run of a model."""

import time
from collections.abc import Mapping
from pathlib import Path

from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.examples import Rows


class OutOfTimeError(Exception):
    """The search has had its time; the text says in what."""


class Clock:
    """How long a search has been going on.

    Attributes:
        doing: what it does now.
        seconds: that it has.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.doing = seconds, "the measuring"
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """Go on only if there is time.

        Raises:
            OutOfTimeError: there is none.
        """
        if self.spent >= self.seconds:
            raise OutOfTimeError(self.doing)

    def stop(self) -> None:
        """From now on nothing is bounded: what was found is written."""
        self.seconds = float("inf")


class Timed:
    """An encoder that asks a clock before each batch, so that whatever it feeds ends when the time is up."""

    def __init__(self, encode: Encoder, clock: Clock) -> None:
        self._encode, self._clock = encode, clock

    @property
    def truncated(self) -> int:
        """Examples that were cut so far."""
        return self._encode.truncated

    @truncated.setter
    def truncated(self, count: int) -> None:
        self._encode.truncated = count

    @property
    def axes(self) -> Mapping[int, str]:
        """The dimensions that may change."""
        return self._encode.axes

    def __call__(self, rows: Rows, /) -> Inputs:
        """Encode rows.

        Raises:
            OutOfTimeError: the time is up.
        """
        self._clock.check()
        return self._encode(rows)

    def save(self, folder: Path, /) -> None:
        """Write what encodes the same way."""
        self._encode.save(folder)

    def same_as(self, other: Encoder, /) -> bool:
        """Whether both give the same inputs."""
        return self._encode.same_as(other)
