"""Weights that are not finite, found before anything is made of them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError

NAMED = 3  # tensors that a message names


def check_finite(owner: str, weights: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Refuse weights with NaN or infinities; a tensor of zeros and infinities alone is a mask, and no weight.

    Args:
        owner: whose they are, for the message.
        weights: names with arrays of any floating type, one at a time.

    Raises:
        InputError: the message names the first tensors, and counts their values and the tensors.
    """
    broken = {}
    for name, array in weights:
        finite = np.isfinite(array)
        if not finite.all() and (np.isnan(array).any() or array[finite].any()):
            broken[name] = f"{array.size - int(finite.sum()):,} of {array.size:,} values of {name!r}"
    if broken:
        named = ", ".join(list(broken.values())[:NAMED]) + (", …" if len(broken) > NAMED else "")
        raise InputError(
            f"{owner} holds weights that are not finite in {len(broken)} of its tensors ({named}); "
            "give a checkpoint from before its training broke"
        )
