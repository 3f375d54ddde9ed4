"""What counts as a broken weight."""

import numpy as np
import pytest

from potstill.validate.errors import InputError
from potstill.validate.finite import check_finite


def test_the_tensors_are_named_and_their_values_counted() -> None:
    broken = {f"w{i}": np.array([1.0, np.nan, np.inf, 2.0]) for i in range(4)} | {"fine": np.ones(1300)}
    with pytest.raises(InputError, match=r"net holds .* in 4 of its tensors \(2 of 4 values of 'w0', .*'w2', …\)"):
        check_finite("net", broken.items())


@pytest.mark.parametrize("values", [[0.0, -np.inf], [-np.inf], [1.0, -2.0], []])
def test_masks_and_numbers_pass(values: list[float]) -> None:
    check_finite("net", [("m", np.array(values, dtype=np.float32))])


@pytest.mark.parametrize("values", [[0.0, np.nan], [1.0, -np.inf]])
def test_nan_and_infinities_among_numbers_do_not(values: list[float]) -> None:
    with pytest.raises(InputError, match="not finite in 1 of its tensors"):
        check_finite("net", [("m", np.array(values, dtype=np.float32))])
