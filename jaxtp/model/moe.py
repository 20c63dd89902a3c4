"""Mixture of experts in place of an MLP.

B batch, T tokens, D embed, E experts, k of them a token, F width of an expert, C = 2 (gate and up).

Every token is on every device that holds experts it may go to: they are there already where experts are cut over tp, and an
all-gather brings them where experts lie on ep, which shards the batch. What comes back is each device's share of a sum, which
one reshard makes whole: an all-reduce, or a reduce-scatter. Or rules leave the batch on ep (routed), or ep is mapped over as in
the stages of a pipeline, and the model is handed what sends tokens there. No token is dropped unless a capacity is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp.config import ModelConfig
from jaxtp.mesh import platform
from jaxtp.model.layers import Mlp, Step, residual_dim
from jaxtp.ops import grouped
from jaxtp.ops.experts import Products, choose_products, mix
from jaxtp.ops.linear import Reduce, linear
from jaxtp.ops.quantized import Quantized
from jaxtp.ops.router import Routing, route, watched
from jaxtp.sharding import Layout, Region, names, reshard, spec_of, whole

# (mix, rows [N, D], chosen [N, k], weights [N, k], experts=E, mesh) -> [N, D], in a region: those of `parallel.experts`
Dispatch = Callable[..., jax.Array]


class Moe(nnx.Module):
    """A router [E, D], experts' kernels [E, F, 2, D] and [E, D, F], and in some families an MLP that every token sees."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layout: Layout,
        region: Region,
        expert_kernel: Products | None,
        dispatch: Dispatch | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        experts, D = config.experts, config.hidden_size
        assert experts
        E, F = experts.count, experts.width
        self.router = layout.param("router", routes=E, embed=D)
        self.gate_up = layout.param("gate_up", experts=E, expert_mlp=F, gate_up=2, embed=D)
        self.down = layout.param("down", experts=E, embed=D, expert_mlp=F)
        if experts.shared:
            self.shared = Mlp(config, layout=layout.at("shared"), width=experts.shared, reduce=reduce)
            self.shared_gate = layout.param("shared_gate", shared_gate=1, embed=D)
        self.experts, self.layout, self.region, self.kernel, self.reduce = experts, layout, region, expert_kernel, reduce
        rules, mapped = layout.rules, layout.mesh.shape["ep"] > 1 and not layout.rules.speak_of("ep")
        sent = mapped or "ep" in names(rules.axis("routed", layout.path))
        assert dispatch or not sent, "where the batch stays on ep, by the rules or mapped over it, experts need a dispatch"
        self.dispatch = dispatch if sent else None

    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, Routing]:
        """x [B, T, D] -> [B, T, D], both in the residual stream's layout, and what the router did."""
        layout, mesh = self.layout, self.layout.mesh
        counted = None if step.counted is None else layout.place(step.counted, "routed", "tokens")
        shares = {axis for axis in self._shares if mesh.shape[axis] > 1}
        routed, residual = layout.spec("routed", "tokens", None), layout.spec("batch", residual_dim(x.shape[1], layout), None)
        # in two steps, so that gradients go back as results do: scattered over ep, then summed over tp
        here = reshard(x, P(residual.partitions[0], *routed.partitions[1:], reduced=shares - {"ep"}), mesh)
        everywhere = reshard(here, P(*routed.partitions, reduced=shares), mesh)
        seen = x if spec_of(x).partitions == routed.partitions else whole(everywhere)
        with jax.named_scope("router"):
            scores = layout.sharding("routed", "tokens", "routes")
            # behind a barrier: XLA would make one product of this and the experts', and copy all kernels side by side for it
            seen = jax.lax.optimization_barrier(seen)
            logits = linear(seen, self.router[...], out=scores, dtype=jnp.float32)
            chosen, weights, kept = route(logits, self.experts, step.capacity, region=self.region)
        with jax.named_scope("experts"):
            taken = chosen if kept is None else jnp.where(kept, chosen, self.experts.count)  # which is none
            y = self._mixed(everywhere, taken, reshard(weights, P(*routed.partitions, reduced=shares), mesh))
            if "ep" in shares:  # scattered over ep first: what is then summed over tp is as small as it gets
                y = reshard(y, P(residual.partitions[0], *routed.partitions[1:], unreduced=shares - {"ep"}), mesh)
            y = self.reduce(y, NamedSharding(mesh, residual)) if self.reduce and shares else reshard(y, residual, mesh)
        if self.experts.shared:
            gate = linear(x, self.shared_gate[...], out=NamedSharding(mesh, residual), dtype=jnp.float32)
            with jax.named_scope("mlp"):
                every = self.shared(x)
            y = y + jax.nn.sigmoid(gate).astype(y.dtype) * every
        return y, watched(logits, chosen, counted, kept)

    def _mixed(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """x [B, T, D], chosen and weights [B, T, k] -> [B, T, D], of which every device has its own experts' share."""
        over = names(self.layout.rules.axis("experts", self.layout.path))
        axes = tuple(axis for axis in over if axis in self._shares)

        def local(x, chosen, weights, gate_up, down):
            def mine(rows: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
                if axes:
                    chosen = chosen - jax.lax.axis_index(axes) * gate_up.shape[0]
                return mix(rows, chosen, weights, gate_up, down, products=self.form(len(rows)))

            rows, chosen, weights = (a.reshape(x.shape[0] * x.shape[1], -1) for a in (x, chosen, weights))
            if self.dispatch is None:
                return mine(rows, chosen, weights).reshape(x.shape)
            sent = self.dispatch(mine, rows, chosen, weights, experts=self.experts.count, mesh=self.layout.mesh)
            return sent.reshape(x.shape)

        args = x, chosen, weights, self.gate_up[...], self.down[...]
        return self.region(local, args, lambda x, *_: x, over=self._shares)

    def form(self, tokens: int) -> Products:
        """How they multiply where so many tokens come to a device."""
        layout, experts, down = self.layout, self.experts, self.down.get_value()
        width, dtype = experts.width // layout.parts("expert_mlp"), layout.dtype
        return choose_products(
            platform=platform(layout.mesh),
            tokens=tokens,
            pairs=tokens * experts.per_token,
            experts=experts.count,
            kernels=not isinstance(down, Quantized) and grouped.fits(layout.mesh, dtype, width, down.shape[-2]),
            override=self.kernel,
        )

    @property
    def _shares(self) -> tuple[str, ...]:
        """The axes over which results are shares of a sum: those of experts and of their widths, but for one along which tokens
        are sent there and back.
        """
        rules, path = self.layout.rules, self.layout.path
        over = names(rules.axis("experts", path)) + names(rules.axis("expert_mlp", path))
        return tuple(axis for axis in over if self.dispatch is None or axis != "ep")
