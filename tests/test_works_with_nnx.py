"""Training through Flax NNX: the first rows of docs/works_with.md."""

import pytest
from works_with import NNX, TRANSFORMATIONS, VELOCITY_DTYPES, Cell, check


@pytest.mark.slow
@pytest.mark.parametrize("velocity_dtype", VELOCITY_DTYPES, ids=str)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", NNX)
def test_c6_flax_nnx_trains_as_a_plain_loop(name, transformation, velocity_dtype, tmp_path):
    check(name, Cell(transformation, velocity_dtype, tmp_path))
