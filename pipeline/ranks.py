"""Several processes on one run, as `torchrun` starts them: the first walks it, the others train with it.

    torchrun --nproc-per-node 2 -m potstill.pipeline run recipe.yaml --out DIR

The first process predicts, judges, exports, writes and prints. When it comes to a stage it calls the others, which read
the same student from the run's folder, seen by all hosts, and take part; what they made is thrown away. They print
nothing, unless one of them fails alone. All end with the first one's exit code; `torchrun` itself then ends with 1.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

LONG = timedelta(days=30)  # the others wait while the first one judges and exports
SOON = timedelta(seconds=5)  # in which all processes meet the same error


def rank() -> int:
    """This process's number; 0 for the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


class Crew:
    """The processes of a run, which may be one only."""

    def __init__(self) -> None:
        self._group: Any = None
        self._hasty: Any = None
        self._listening = True  # whether the others wait for a word

    @contextmanager
    def led(self) -> Iterator[None]:
        """For the first process: inside, the others wait to be called; after it they end, with its exit code."""
        if not self._join():
            yield
            return
        try:
            yield
        except Exception as error:
            if self._listening:
                self._broadcast({"exit": getattr(error, "exit_code", 1)})
            raise
        self._broadcast({"exit": 0})
        self._leave()

    @contextmanager
    def called(self, **word: Any) -> Iterator[None]:
        """For the first process: inside, the others do what `word` says."""
        if self._group is None:
            yield
            return
        self._broadcast(word)
        self._listening = False
        try:
            yield
        except Exception:
            self._met()
            raise
        self._listening = True

    def follow(self, work: Callable[..., None]) -> int:
        """For the other processes: do what the first one says until it ends.

        Args:
            work: takes the words of `called`.

        Returns:
            The exit code.
        """
        self._join()
        while True:
            word = self._broadcast(None)
            if "exit" in word:
                self._leave()
                return int(word["exit"])
            try:
                work(**word)
            except Exception as error:
                if not self._met():
                    print(f"potstill: process {rank()}: {error}", file=sys.stderr)
                return getattr(error, "exit_code", 1)

    def _join(self) -> bool:
        """Meet the others; False where there are none."""
        import torch
        from torch import distributed

        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return False
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._group = distributed.new_group(backend="gloo", timeout=LONG)
        self._hasty = distributed.new_group(backend="gloo", timeout=SOON)
        return True

    def _leave(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()

    def _broadcast(self, word: dict[str, Any] | None) -> dict[str, Any]:
        """A word of the first process to all."""
        from torch import distributed

        words = [word]
        distributed.broadcast_object_list(words, src=0, group=self._group)
        assert words[0] is not None
        return words[0]

    def _met(self) -> bool:
        """Whether all processes come here soon: they failed alike, and the first one says of what."""
        from torch import distributed

        try:
            distributed.barrier(self._hasty)
        except RuntimeError:
            return False
        return True


crew = Crew()
