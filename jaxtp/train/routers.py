"""What routers of experts learn beside the model's loss: to load all experts alike, and to keep their logits small.

L layers with experts, B rows, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxtp.config import ModelConfig
from jaxtp.ops.router import Routing
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import reshard


@dataclass(frozen=True, kw_only=True)
class Routers:
    """The losses of routers, each a coefficient and what it is of.

    balance: E · Σ f·p, f the share of tokens that go to an expert and p its mean probability (Switch Transformer,
    arXiv:2101.03961, equation 4); None: the coefficient in the model's config, `router_aux_loss_coef`. z_loss: the mean square
    of the logarithm of the softmax's denominator (ST-MoE, arXiv:2202.08906, equation 5). over: what f, p and that mean are
    over: all tokens of a microbatch in all layers together ("batch", as transformers does), or each row in each layer
    ("sequence"; then it does not matter how rows are cut into microbatches, and layers may stand in a pipeline's stages).
    capacity: tokens of a row that an expert takes at most, over what even loads would give it; the others pass it by. None: no
    token is dropped.
    """

    balance: float | None = None
    z_loss: float = 0.0
    over: Literal["batch", "sequence"] = "batch"
    capacity: float | None = None

    def __post_init__(self) -> None:
        for name in ("balance", "z_loss"):
            if not (getattr(self, name) or 0.0) >= 0:
                raise ValueError(f"routers.{name}={getattr(self, name)} must be at least 0")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ValueError(
                f"routers.capacity={self.capacity} must be above 0 and finite, such as 1.25; left out, no token is dropped"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Load:
    """How a microbatch, or a part of an update, loads experts, float32.

    counts [L, E]: tokens that went to each expert. balance, z []: the two losses before their coefficients. entropy []: of a
    token's probabilities, in nats. dropped []: the share of choices beyond an expert's capacity.
    """

    counts: jax.Array
    balance: jax.Array
    z: jax.Array
    entropy: jax.Array
    dropped: jax.Array

    def cost(self, routers: Routers) -> jax.Array:
        """What is added to the model's loss, []."""
        assert routers.balance is not None
        return routers.balance * self.balance + routers.z_loss * self.z


def load(routing: Routing, routers: Routers, *, parts: int = 1, share: float = 1.0) -> Load:
    """What a microbatch's routing comes to, divided by `parts` (of the losses and the entropy: so they add up to means). share:
    which part of its rows and layers are there, where others are told of elsewhere (over sequences alone).
    """
    counts, p, tokens = routing.counts, routing.probabilities, routing.tokens
    E, choices = counts.shape[-1], counts.sum(-1)
    if routers.over == "batch":
        assert share == 1
        n = jnp.maximum(tokens.sum(), 1.0)
        balance = E * ((counts.sum((0, 1)) / n) * (p.sum((0, 1)) / n)).sum()
        z, entropy = routing.z.sum() / n, routing.entropy.sum() / n
        dropped = routing.dropped.sum() / jnp.maximum(choices.sum(), 1.0)
    else:
        n = jnp.maximum(tokens, 1.0)
        balance = E * ((counts * p).sum(-1) / n**2).mean() * share
        z, entropy = ((a / n).mean() * share for a in (routing.z, routing.entropy))
        dropped = (routing.dropped / jnp.maximum(choices, 1.0)).mean() * share
    return Load(counts.sum(1), balance / parts, z / parts, entropy / parts, dropped / parts)


def of_stages(told: Load, stages: Stages, config: ModelConfig, *, parts: int) -> Load:
    """What a pipeline's stages told [P, v, ...], added up over so many parts of an update: layers in the model's order, and
    means.
    """
    order = np.array(stages.places_of([layer for layer, there in enumerate(config.sparse) if there]))
    counts = reshard(told.counts, PartitionSpec(), jax.typeof(told.counts).sharding.mesh)
    balance, z, entropy, dropped = (a.sum() / parts for a in (told.balance, told.z, told.entropy, told.dropped))
    return Load(counts.reshape(-1, counts.shape[-1])[order], balance, z, entropy, dropped)


def told(load: Load) -> dict[str, float]:
    """The numbers of a log: the losses, the entropy, and of all layers the most loaded expert's tokens over the mean."""
    counts = jnp.asarray(load.counts)
    return {
        "router_balance": float(load.balance),
        "router_z": float(load.z),
        "router_entropy": float(load.entropy),
        "experts_dropped": float(load.dropped),
        "expert_max_over_mean": float((counts.max(axis=-1) / jnp.maximum(counts.mean(axis=-1), 1e-9)).max()),
    }
