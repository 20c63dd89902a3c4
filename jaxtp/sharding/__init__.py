"""Sharding: rules say which dim lies on which mesh axis, layouts where arrays lie, types what is a share of a sum."""

from jaxtp.sharding.layout import Layout, fetch, mesh_of, put, reshard, row_major, size, spec_of, specs_of, zeros
from jaxtp.sharding.rules import Axes, Axis, ExpertDispatch, ExpertLayout, Rules, check_layout, joined, names
from jaxtp.sharding.shares import Region, beside, dual, on_each_device, varying_as, whole

__all__ = [
    "Axes",
    "Axis",
    "ExpertDispatch",
    "ExpertLayout",
    "Layout",
    "Region",
    "Rules",
    "beside",
    "check_layout",
    "dual",
    "fetch",
    "joined",
    "mesh_of",
    "names",
    "on_each_device",
    "put",
    "reshard",
    "row_major",
    "size",
    "spec_of",
    "specs_of",
    "varying_as",
    "whole",
    "zeros",
]
