"""What a model asks of its mesh, rules, dtype and kernels: refused before any device work."""

from __future__ import annotations

from typing import get_args

from jax.sharding import Mesh

from jaxtp.config import DTYPES, ModelConfig
from jaxtp.mesh import check_mesh, platform
from jaxtp.model.layers import Context
from jaxtp.ops import grouped
from jaxtp.ops.attention import Kernel
from jaxtp.ops.coded import CacheDtype, check_cache_dtype
from jaxtp.ops.experts import Products
from jaxtp.sharding import Rules, check_layout, names, size


def check_model(
    config: ModelConfig,
    mesh: Mesh,
    rules: Rules,
    *,
    dtype: str,
    kernel: Kernel | None,
    expert_kernel: Products | None,
    kv_cache_dtype: CacheDtype,
    context: Context | None,
    sent: bool = False,
) -> None:
    """Raises ValueError where this model cannot be laid out on the mesh by the rules, or computed with these settings.

    sent: whether the model has what sends tokens along ep.
    """
    check_layout(config, check_mesh(mesh).shape["tp"], rules, cp=mesh.shape["cp"])
    check_cache_dtype(kv_cache_dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    _check_kernels(config, mesh, dtype, kernel, expert_kernel)
    split = {"dp", "tp", *(name for dim in ("layers", "batch", "tokens", "cached") for name in names(rules.axis(dim)))}
    # in stages these are mapped over, and no rule speaks of them
    split |= ({"cp"} if context else set()) | ({"ep"} if sent and config.experts and not rules.speak_of("ep") else set())
    unused = [f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1 and axis not in split]
    if unused:
        raise ValueError(
            f"the mesh has {' and '.join(unused)}, over which these rules split nothing; use dp and tp, pp by LLM, cp by "
            "Rules.context_parallel or .cache_parallel, and ep by those of a model that has experts (.expert_parallel)"
        )
    for dim, what in (("tokens", "the tokens of a row"), ("cached", "the slots of a cache")):
        parts = size(mesh, rules.axis(dim))
        if parts > 1 and (context is None or context.size != parts):
            raise ValueError(
                f"these rules cut {what} into {parts} parts, and context={context} is not for as many; give "
                f"context=parallel.context.Context({parts})"
            )


def _check_kernels(config: ModelConfig, mesh: Mesh, dtype: str, kernel: Kernel | None, expert_kernel: Products | None) -> None:
    if expert_kernel not in (None, *get_args(Products)):
        raise ValueError(f"expert_kernel={expert_kernel!r} is none of {', '.join(get_args(Products))}")
    grouping = expert_kernel == "grouped" and config.experts
    if grouping and not grouped.fits(mesh, dtype, grouping.width, config.hidden_size):
        raise ValueError(
            "expert_kernel='grouped' needs Hopper GPUs (H100, H200), 16 bits, and widths that "
            f"{grouped.COLUMNS} divides; leave it out, or take blocks"
        )
    if kernel not in (None, *get_args(Kernel)):
        raise ValueError(f"kernel={kernel!r} is none of {', '.join(get_args(Kernel))}")
    if kernel == "cudnn" and platform(mesh) != "gpu":
        raise ValueError(f"kernel='cudnn' needs GPUs; these devices are of the platform {platform(mesh)}")
