"""Tests wait for a state, not for a time: a busy machine is slow, and not at fault."""

import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest


def wait_for(what: Callable[[], object], seconds: float = 120) -> Any:
    """What a question gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            pytest.fail(f"it did not come to pass within {seconds:g} s")
        time.sleep(0.01)
    return found


def free_port() -> int:
    """A port of this machine on which nobody listens, below those that the system hands out by itself."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
