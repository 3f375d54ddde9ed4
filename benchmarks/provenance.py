"""What every benchmark says of itself beside its figures: the machine, the versions, the commit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from potstill.pipeline.lineage import record as lineage

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """`machine`, `versions`, `python` and `commit` (`unknown` outside a checkout) for a record."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": lineage.machine(),
        "versions": lineage.versions(),
        "python": sys.version.split()[0],
        "commit": commit or "unknown",
    }
