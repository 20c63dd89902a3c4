"""Meshes: five axes in order, -1 for what is left, and clear refusals."""

import jax
import pytest

from jaxtp import AXES, make_mesh
from jaxtp.mesh import platform


def test_all_axes_are_there_in_order_and_tp_is_innermost():
    mesh = make_mesh(dp=2, tp=4)
    assert mesh.axis_names == AXES == ("dp", "pp", "cp", "ep", "tp")
    assert mesh.devices.shape == (2, 1, 1, 1, 4)
    assert [d.id for d in mesh.devices[0, 0, 0, 0]] == [0, 1, 2, 3]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert platform(mesh) == "cpu"


def test_minus_one_takes_what_is_left():
    assert make_mesh(dp=-1, tp=2).shape["dp"] == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 16}, r"tp=16 needs 16 devices, 8 are there.*--virtual-devices 16"),
        ({"dp": -1, "tp": 16}, r"tp=16 needs 16 devices, 8 are there.*--virtual-devices 16"),
        ({"dp": -1, "tp": 3}, "dp=-1: the other axes take 3 devices, which does not divide 8"),
        ({"dp": -1, "tp": -1}, "only one axis may be -1"),
        ({"tp": 0}, "tp=0: an axis has a size of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)
