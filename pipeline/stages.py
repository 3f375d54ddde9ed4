"""The stages by their word in a recipe. A new stage is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from potstill.compress.distill import Distill
from potstill.compress.prune import Prune
from potstill.compress.qat import Qat

STAGES: Mapping[str, type[Any]] = {"distill": Distill, "prune": Prune, "qat": Qat}
