"""One export run from an installed wheel, far from the source tree."""

import json
import subprocess
import sys
from pathlib import Path

from potstill.pipeline.demo import prepare

potstill = str(Path(sys.executable).with_name("potstill"))
recipe = prepare(Path("inputs"))
teacher, data = recipe["teacher"], recipe["data"]
subprocess.run(
    [
        potstill,
        "export",
        teacher["checkpoint"],
        "--weights",
        teacher["weights"],
        "--target",
        "laptop-x86-avx2",
        "--calibrate",
        data["train"],
        "--eval",
        data["eval"],
        "--max-drop",
        "1pp",
        "--licences",
        f"teacher={recipe['licences']['teacher']}",
        "--out",
        "out",
    ],
    check=True,
)
manifest = json.loads(Path("out/packages/laptop-x86-avx2/manifest.json").read_text())
assert manifest["verdict"]["passed"], manifest["verdict"]
print(f"wheel: exported {len(manifest['files'])} files, accuracy {manifest['scorecard']['value']:.3f}")
