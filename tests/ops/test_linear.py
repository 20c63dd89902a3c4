"""Products as backends like them: the same numbers, whichever side the weight is on."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp.mesh import make_mesh
from jaxtp.ops.linear import linear

OUT, IN = 24, 16


def program(mesh, x, weight, cut):
    """The compiled text of a product whose weight is cut by columns or by rows, and its result."""
    columns, summed = ("tp", None) if cut == "columns" else (None, "tp")
    weight = jax.device_put(weight, NamedSharding(mesh, P(columns, summed)))
    x = jax.device_put(x, NamedSharding(mesh, P("dp", None, summed)))
    sharding = NamedSharding(mesh, P("dp", None, columns))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x, w: linear(x, w, out=sharding)).lower(x, weight).compile()
    return compiled.as_text(), np.asarray(compiled(x, weight))


@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"dp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("cut", ["columns", "rows"])
@pytest.mark.parametrize("rows", [2, 8, 64, 130, 256])
def test_a_few_rows_are_multiplied_from_the_right(axes, cut, rows):
    rng = np.random.default_rng(rows)
    x, weight = rng.standard_normal((rows, 1, IN), np.float32), rng.standard_normal((OUT, IN), np.float32)
    text, found = program(make_mesh(**axes), x, weight, cut)
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=0, atol=1e-5)
    here = rows // axes.get("dp", 1)
    width = OUT // axes.get("tp", 1) if cut == "columns" else OUT
    assert (f"f32[{width},{here}]" in text) == (2 <= here <= 64)  # [O, B]: the weight stood on the left
