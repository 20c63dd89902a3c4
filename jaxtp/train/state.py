"""What a training step changes, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxtp.model.stacked import Params
from jaxtp.train.routers import Load


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes.

    params: what is trained, all weights or LoRA's adapters, in float32, laid out as the ZeRO stage says. opt: optax's state,
    laid out likewise. step [] int32: updates tried. skipped [] int32: those that a non-finite loss or gradient left out.
    """

    params: Params
    opt: Any
    step: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """Of one step, [] float32. loss: with the z-loss and what routers cost. nats: cross-entropy alone, per counted token. norm:
    of the gradient. load: of experts, where there are some.
    """

    loss: jax.Array
    nats: jax.Array
    norm: jax.Array
    tokens: jax.Array
    finite: jax.Array
    load: Load | None = None


def by_param(function: Callable[[str | None, Any], Any], tree: Any, params: Params) -> Any:
    """function(path, leaf) over a tree such as an optimiser's state; path: of the parameter that the leaf belongs to."""

    def one(keys: Any, leaf: Any) -> Any:
        path = next((k.key for k in keys if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        return function(path, leaf)

    return jax.tree_util.tree_map_with_path(one, tree)
