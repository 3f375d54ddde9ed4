"""Processes that begin as copies of this one, with what a test has made, and none of its threads."""

import gc
from multiprocessing.context import ForkProcess


class Forked(ForkProcess):
    """Never collects what it has from its parent: an ONNX Runtime session would wait for threads that are not here."""

    def run(self) -> None:
        gc.freeze()
        super().run()
