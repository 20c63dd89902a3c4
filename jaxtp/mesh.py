"""The device mesh: five named axes, always all there, size 1 where unused.

dp  data parallel        pp  pipeline parallel     cp  context parallel
ep  expert parallel      tp  tensor parallel (innermost: neighbouring devices, NVLink)

Axis types are Explicit, so the sharding of an array is part of its type and shows in every error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("dp", "pp", "cp", "ep", "tp")


def make_mesh(
    *,
    dp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    tp: int = 1,
    devices: Sequence[jax.Device] | None = None,
    tp_across_nodes: bool = False,
) -> Mesh:
    """A mesh over the first dp·pp·cp·ep·tp of `devices` (default: all there are).

    One size may be -1: it takes what the others leave. Raises ValueError where sizes and devices do not fit, and where tp
    would join devices of several processes, that is, go over the network, unless `tp_across_nodes`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _resolve({"dp": dp, "pp": pp, "cp": cp, "ep": ep, "tp": tp}, len(devices))
    used = devices[: math.prod(sizes)]
    if jax.process_count() > 1 and len(used) != len(devices):
        shown = told(dict(zip(AXES, sizes, strict=True)))
        raise ValueError(f"{shown} uses {len(used)} of {len(devices)} devices; over several processes use all")
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=used)
    return mesh if tp_across_nodes else check_within_nodes(mesh, "tp")


def check_within_nodes(mesh: Mesh, *axes: str) -> Mesh:
    """Itself. Raises ValueError where these axes join devices of several processes."""
    last = [mesh.axis_names.index(axis) for axis in axes]
    devices = np.moveaxis(mesh.devices, last, range(-len(last), 0))
    groups = devices.reshape(-1, math.prod(mesh.shape[axis] for axis in axes))
    if any(len({device.process_index for device in group}) > 1 for group in groups):
        raise ValueError(across_nodes({axis: mesh.shape[axis] for axis in axes}, jax.local_device_count()))
    return mesh


def across_nodes(sizes: Mapping[str, int], local: int) -> str:
    """What is said of axes that nodes of so many devices cannot hold."""
    asked, name = told(sizes), "·".join(sizes)
    legal = ", ".join(str(n) for n in range(1, local + 1) if local % n == 0)
    return (
        f"{asked} would join devices of several nodes, each of which has {local}, over the network; legal {name} within a "
        f"node: {legal}. Let pp or dp cross nodes, or allow it (tp_across_nodes)"
    )


def check_mesh(mesh: Mesh) -> Mesh:
    """Itself. Raises TypeError or ValueError for a mesh that is not as `make_mesh` makes them."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r} must be a mesh of devices: jaxtp.make_mesh(tp=...)")
    if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        raise ValueError(f"the mesh has the axes {mesh.axis_names}; it must have {AXES}, all Explicit: jaxtp.make_mesh(tp=...)")
    return mesh


def use_virtual_devices(count: int) -> None:
    """Makes this process see `count` CPU devices of its own. Call it before anything touches a device; raises RuntimeError
    after.
    """
    if count < 1:
        raise ValueError(f"{count} virtual devices: at least one is needed")
    try:
        jax.config.update("jax_num_cpu_devices", count)  # refused once JAX has started
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        if len(jax.local_devices()) != count or jax.default_backend() != "cpu":
            raise RuntimeError(
                f"asked for {count} virtual devices, but JAX had already started with {len(jax.local_devices())}"
            ) from None


def platform(mesh: Mesh | jax.sharding.AbstractMesh) -> str:
    """'cpu' or 'gpu': what the mesh's devices are, also those of a mesh that is only compiled for."""
    device = mesh.abstract_mesh.abstract_device
    return "cpu" if device is None else {"cuda": "gpu"}.get(device.platform, device.platform)


def _resolve(sizes: dict[str, int], count: int) -> tuple[int, ...]:
    for axis, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{axis}={size!r}: the size of an axis is an int of at least 1 (or -1: what is left)")
        if size < 1 and size != -1:
            raise ValueError(f"{axis}={size}: an axis has a size of at least 1 (or -1: what is left)")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one axis may be -1, not {free}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > count:
        raise ValueError(
            f"{told(sizes)} needs {fixed} devices, {count} are there. On a machine without GPUs, "
            f"virtual ones can be made: --virtual-devices {fixed}, or jaxtp.use_virtual_devices({fixed}) at the start"
        )
    if free:
        if count % fixed:
            raise ValueError(f"{free[0]}=-1: the other axes take {fixed} devices, which does not divide {count}")
        sizes = {**sizes, free[0]: count // fixed}
    return tuple(sizes.values())


def told(sizes: Mapping[str, int], alone: str = "1 device") -> str:
    """The sizes of axes in words, those of 1 left out: "dp=2 × tp=4"."""
    return " × ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or alone
