"""The command line, as a program of its own or, without its start of some seconds, in this process."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from potstill.pipeline.cli import call

POTSTILL = str(Path(sys.executable).with_name("potstill"))


def checked(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    """What a command said; fails with it when the command ended otherwise than expected."""
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def potstill(*words: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [POTSTILL, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ, check=False)
    return checked(done, code)


def called(*words: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which forgets the modules of the folder in which it ran."""
    out, err, path, modules = io.StringIO(), io.StringIO(), list(sys.path), set(sys.modules)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd or Path.cwd()):
        found = call([str(word) for word in words])
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if cwd and str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(cwd)):
            del sys.modules[name]
    return checked(subprocess.CompletedProcess(words, found, out.getvalue(), err.getvalue()), code)
