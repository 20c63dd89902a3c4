"""The training step: forward, backward, and update in one compiled program, whatever the mesh and the ZeRO stage.

What communicates can be read in the types. Weights ready for use are `reduced` over dp: their gradients are each group's own
sums (`unreduced`), through all layers and microbatches, until one reshard brings them to the layout in which they are kept:
an all-reduce where that is whole (ZeRO 0), a reduce-scatter where it is a share (1 to 3). Where experts lie on ep, which
spreads rows as dp does, the same holds for dp and ep together, but not for experts, nor for routers where they see the rows of
all ep: not in a pipeline, and not where tokens are sent to the experts that they chose.

    at rest        ZeRO 0: whole on every dp group.  1, 2, 3: parameters and optimiser states in shares over dp.
    in the step    1: weights whole (gathered once), gradients whole (scattered once, at the end).
                   2: weights whole, gradients scattered after each microbatch.
                   3: weights gathered, and gradients scattered, layer by layer.

With a pipeline the microbatches go through `parallel.pipeline`, which leaves gradients unsummed in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp import xla_flags
from jaxtp.model import Llama
from jaxtp.model.stacked import BLOCK, Params, Spec, Stacked
from jaxtp.ops.router import Routing
from jaxtp.parallel.circulate import staged as in_stages
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.regions import after, locally
from jaxtp.parallel.ticks import Parts
from jaxtp.planner.work import check_whole_rows, check_zero
from jaxtp.sharding import Rules, joined, names, reshard, row_major, size, spec_of
from jaxtp.train.copies import square, tie
from jaxtp.train.lora import Adapters
from jaxtp.train.loss import Batch, cross_entropy
from jaxtp.train.pipelined import parts_of
from jaxtp.train.routers import Load, Routers, load, of_stages
from jaxtp.train.state import Metrics, State, by_param

_EXPERTS = {"experts", "routes"}  # dims of what sees tokens where experts do


@dataclass(frozen=True)
class Trainer:
    """A model's training step on a mesh: pure functions to compile.

    optimizer: of what is trained, `specs`. adapters: train these, beside frozen weights, which are then an argument of the
    functions (see `freeze`). pipeline: the way through the blocks where they stand in stages over pp. zero: the stage, 0 to
    3. remat: a key of `model.stacked.REMAT`. clip_norm: the largest global norm of a gradient, 0 for none. z_loss: see
    `loss.cross_entropy`. routers: what those of experts learn.
    """

    stacked: Stacked
    optimizer: optax.GradientTransformation
    adapters: Adapters | None = None
    pipeline: Pipeline | None = None
    zero: int = 0
    remat: str = "none"
    clip_norm: float = 1.0
    z_loss: float = 0.0
    routers: Routers = field(default_factory=Routers)

    def __post_init__(self) -> None:
        layout, config = self.stacked.layout, self.stacked.config
        check_zero(config, zero=self.zero, shares=size(layout.mesh, layout.data), pp=layout.mesh.shape["pp"])
        if config.experts and self.routers.balance is None:
            object.__setattr__(self, "routers", replace(self.routers, balance=config.experts.balance))
        if self.pipeline:
            self.pipeline.stages.alike(config.kinds)
        sizes = layout.mesh.shape
        check_whole_rows(config, cp=sizes["cp"], capacity=self.routers.capacity)
        if config.experts and self.pipeline and self.routers.over != "sequence":
            raise ValueError(
                f"routers.over={self.routers.over!r} is over all layers at once, which stand in the stages of a pipeline; with "
                "pp use routers.over=sequence"
            )

    # -- layouts -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Every parameter that is trained, as in use: whole over dp."""
        return self._held(self.adapters.specs() if self.adapters else self.stacked.specs())

    @functools.cached_property
    def rest(self) -> dict[str, PartitionSpec]:
        """Where parameters, gradients and optimiser states lie between steps."""
        return {path: self._share(spec) if self.zero else spec.spec for path, spec in self.specs.items()}

    @functools.cached_property
    def _used(self) -> dict[str, Spec]:
        """Everything that the forward pass uses, trained or frozen."""
        return {**self._held(self.stacked.specs()), **self.specs}

    def _held(self, specs: dict[str, Spec]) -> dict[str, Spec]:
        return self.pipeline.specs(specs) if self.pipeline else specs

    def _share(self, spec: Spec) -> PartitionSpec:
        """The layout over the data's axes as well: ZeRO is the rule embed -> dp, cp, and ep where experts do not lie on it (in
        the mesh's order: in another one XLA sums everything everywhere, and cuts it then).
        """
        layout, own = self.stacked.layout, {name for axis in spec.spec for name in names(axis)}
        over = joined(*(axis for axis in layout.mesh.axis_names if axis in layout.data and axis not in own))
        return PartitionSpec(*(over if dim == "embed" else axis for dim, axis in zip(spec.dims, spec.spec, strict=True)))

    def abstract_state(self) -> State:
        """Shapes, dtypes and layouts of the state: to restore into, or to compile from."""
        mesh = self.stacked.layout.mesh
        params = {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=NamedSharding(mesh, self.rest[path]))
            for path, spec in self.specs.items()
        }
        whole = NamedSharding(mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return State(params, self._opt_layout(params, whole), number, number)  # type: ignore[arg-type]

    def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        """Shapes, dtypes and layouts of the frozen weights beside adapters."""
        if not self.adapters:
            return None
        dtype, mesh, specs = self.stacked.layout.dtype, self.stacked.layout.mesh, self._held(self.stacked.specs())
        lain = {path: self._share(spec) if self.zero == 3 else spec.spec for path, spec in specs.items()}
        return {
            path: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(mesh, lain[path]))
            for path, spec in specs.items()
        }

    def _opt_layout(self, params: Any, whole: NamedSharding) -> Any:
        """The optimiser's state: what has a parameter's shape lies where the parameter lies, the rest is whole."""

        def lay(path: str | None, leaf: Any) -> Any:
            alike = path is not None and leaf.shape == params[path].shape
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=params[path].sharding if alike else whole)

        bare = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in params.items()}
        with jax.numpy_dtype_promotion("standard"):
            return by_param(lay, jax.eval_shape(self.optimizer.init, bare), params)

    # -- programs ------------------------------------------------------------------------------------------------------

    def begin(self, params: Params) -> State:
        """The first state, from parameters of any dtype, which are taken over one by one. Stacks that lie over pp are in the
        order of the stages, others in the model's.
        """
        layouts = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        kept = {}
        for path in list(params):
            kept[path] = self._place(path, params.pop(path), jnp.float32, layouts.params[path])

        def init(kept: Params) -> State:
            number = jnp.zeros((), jnp.int32)
            with jax.numpy_dtype_promotion("standard"):
                return State(kept, self.optimizer.init(kept), number, number)

        with jax.set_mesh(self.stacked.layout.mesh):
            return jax.jit(init, out_shardings=layouts, donate_argnums=0)(kept)

    def freeze(self, weights: Params) -> Params:
        """The frozen weights beside adapters: in the model's dtype, in shares over dp at stage 3, else whole there. Those given
        are taken over one by one.
        """
        wanted = self.abstract_frozen() or {}
        return {path: self._place(path, weights.pop(path), w.dtype, w.sharding) for path, w in wanted.items()}

    def _place(self, path: str, weight: jax.Array, dtype: Any, sharding: NamedSharding) -> jax.Array:
        """A weight cast, and laid out as it is kept. One that lies over pp is in the order of stages, others in the model's."""
        ready = weight.sharding.spec[:1] == ("pp",)  # type: ignore[attr-defined]
        if not self.pipeline or self.pipeline.in_order or ready or not path.startswith(BLOCK):
            return jax.device_put(weight.astype(dtype), sharding)
        arrange = functools.partial(self.pipeline.arrange, layers=self._used[path].layers)
        return jax.jit(lambda w: jax.sharding.auto_axes(arrange, out_sharding=sharding)(w.astype(dtype)))(weight)

    def jitted(self, *, options: bool = True) -> Any:
        """`step`, to be compiled: it takes the state's memory. options: with those of `jaxtp.xla_flags`."""
        layout = self.stacked.layout
        chosen = xla_flags.options(layout.mesh, xla_flags.training(layout.dtype)) if options else None
        return jax.jit(self.step, donate_argnums=0, compiler_options=chosen)

    def step(self, state: State, batch: Batch, frozen: Params | None = None) -> tuple[State, Metrics]:
        """One update from `batch`, whose arrays are [A, B, T]: A microbatches. The state is meant to be donated."""
        return self.step_and_gradients(state, batch, frozen)[:2]

    def step_and_gradients(self, state: State, batch: Batch, frozen: Params | None = None) -> tuple[State, Metrics, Params]:
        """The same, and the gradient that was taken, before it was clipped: laid out as `rest`."""
        counted = batch.weights.sum()
        with xla_flags.exact(self.stacked.layout.mesh, self.stacked.layout.dtype):
            grads, (loss, nats, told) = self._gradients(state.params, frozen or {}, batch, jnp.maximum(counted, 1.0))
        state, norm, finite = self._applied(grads, state, loss)
        return state, Metrics(loss, nats, norm, counted, finite, told), grads

    @jax.named_scope("optimizer")  # what a profile tells apart
    def _applied(self, grads: Params, state: State, loss: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        """The next state, the gradient's norm, and whether both it and the loss are finite: else nothing changes."""
        copies = self.stacked.kv_copies
        norm = jnp.sqrt(sum(square(g, self.specs[path].kv, copies) for path, g in grads.items()))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.clip_norm:
            scale = jnp.minimum(1.0, self.clip_norm / (norm + 1e-6))
            grads = {path: g * scale for path, g in grads.items()}
        params, opt = self._update(grads, state)

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old)

        params, opt = jax.tree.map(chosen, (params, opt), (state.params, state.opt))
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return State(params, opt, state.step + 1, skipped), norm, finite

    def evaluate(self, params: Params, batch: Batch, frozen: Params | None = None) -> tuple[jax.Array, jax.Array]:
        """(nats, tokens): the sums over a batch [A, B, T] of -log p(label) and of the weights, in float32."""
        weights, counted = {**(frozen or {}), **params}, batch.weights.sum()
        with xla_flags.exact(self.stacked.layout.mesh, self.stacked.layout.dtype):
            if self.pipeline:
                _, nats = self.pipeline.sums(self._parts, *_split(self._ready(weights)), after(batch, counted))
                return nats, counted
            ready = weights if self.zero == 3 else self._ready(weights)
            nats = jax.lax.map(lambda micro: self._loss(ready, micro).nats, batch)
            return nats.sum(), counted

    def model(self, state: State, frozen: Params | None = None, *, dtype: jnp.dtype, generating: Rules | None = None) -> Llama:
        """The model as trained so far (a copy), adapters merged.

        generating: by these rules, and in the stages of its pipeline, for `LLM` alone to run. Where a rank has several chunks,
        and without it, all layers stand on every rank.
        """
        params = self.adapters.merged(frozen or {}, state.params) if self.adapters else state.params
        rules = generating or self.stacked.layout.rules
        if generating and self.pipeline and self.pipeline.stages.chunks == 1:
            return self.stacked.unstack(params, dtype=dtype, **in_stages(self.pipeline.stages, rules=rules))
        return self.stacked.unstack(self.in_order(params), dtype=dtype, rules=rules)

    def in_order(self, params: Params) -> Params:
        """Stacks in the model's order of layers, all of them on every rank, whatever the pipeline."""
        if not self.pipeline:
            return params
        pipeline = self.pipeline

        def one(path: str, w: jax.Array) -> jax.Array:
            def restore(w: jax.Array) -> jax.Array:
                return w if pipeline.in_order else pipeline.restore(w, self._used[path].layers)

            partitions = w.sharding.spec.partitions  # type: ignore[attr-defined]
            lain = NamedSharding(self.stacked.layout.mesh, PartitionSpec(None, *partitions[1:]))
            return jax.jit(jax.sharding.auto_axes(restore, out_sharding=lain))(w)

        return {path: one(path, w) if path.startswith(BLOCK) else w for path, w in params.items()}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _gradients(
        self, params: Params, frozen: Params, batch: Batch, counted: jax.Array
    ) -> tuple[Params, tuple[jax.Array, jax.Array, Load | None]]:
        """Of the mean over counted tokens, summed over microbatches in float32 and laid out as `rest`; the loss, its part of
        the tokens alone, and how experts are loaded.
        """
        weights, copies = params if self.zero == 3 else self._ready(params), self.stacked.kv_copies
        if self.pipeline:
            tables, stacks, (total, nats), told = self.pipeline.gradients(
                self._parts, *_split(weights), fixed=_split(self._ready(frozen)), batch=batch, over=counted
            )
            if told is not None:
                parts = batch.tokens.shape[0] * self.stacked.layout.parts("batch")
                told = of_stages(told[1], self.pipeline.stages, self.stacked.config, parts=parts)
            total = total if told is None else total + told.cost(self.routers)
            return tie(self._settle({**tables, **stacks}), self.specs, copies), (total, nats, told)

        micros = batch.tokens.shape[0]

        def one(micro: Batch) -> tuple[Params, tuple[jax.Array, jax.Array, Load | None]]:
            def mean(weights: Params) -> tuple[jax.Array, tuple[jax.Array, Load | None]]:
                loss, nats, routing = self._loss({**frozen, **weights}, micro)
                if routing is None:
                    return loss / counted, (nats / counted, None)
                told = load(routing, self.routers, parts=micros)
                return loss / counted + told.cost(self.routers), (nats / counted, told)

            (loss, (nats, told)), grads = jax.value_and_grad(mean, has_aux=True)(weights)
            if self.zero >= 2:
                grads = self._settle(grads)
            elif micros > 1:
                grads = {path: g.astype(jnp.float32) for path, g in grads.items()}
            return grads, (loss, nats, told)

        if micros == 1:
            grads, sums = one(jax.tree.map(lambda a: a[0], batch))
        else:
            layouts = jax.eval_shape(one, jax.tree.map(lambda a: a[0], batch))
            start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding), layouts)

            def body(total: Any, micro: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, one(micro)), None

            (grads, sums), _ = jax.lax.scan(body, start, batch)
        return tie(self._settle(grads), self.specs, copies), sums

    def _loss(self, weights: Params, batch: Batch) -> _Sums:
        # the tables here, the blocks' weights inside the loop; nothing happens to those that are ready (ZeRO 0 to 2)
        tables = self._ready({path: w for path, w in weights.items() if not path.startswith(BLOCK)})
        weights = {**weights, **tables}
        x, routing = self.stacked.hidden(
            weights, batch.tokens, batch.positions, batch.segment_ids, remat=self.remat, bring=self._bring,
            capacity=self.routers.capacity,
        )  # fmt: skip
        loss, nats = cross_entropy(self.stacked, weights, x, batch, z_loss=self.z_loss)
        return _Sums(loss.sum(), nats.sum(), routing)

    @functools.cached_property
    def _parts(self) -> Parts:
        """The model in three, for a pipeline."""
        assert self.pipeline
        return parts_of(
            self.stacked, self.pipeline.stages, adapters=self.adapters, routers=self.routers, remat=self.remat,
            z_loss=self.z_loss,
        )  # fmt: skip

    def _ready(self, params: Params) -> Params:
        """Weights to compute with: in the model's dtype, whole over the data's axes, their gradients left unsummed."""
        return {path: self._use(w, self._used[path].spec, path) for path, w in params.items()}

    def _bring(self, layer: Params) -> Mapping[str, Any]:
        """The same for one layer's share of the stacks, inside the loop, where adapters are put to their kernels."""
        ready = {path: self._use(w, PartitionSpec(*self._used[path].spec[1:]), path) for path, w in layer.items()}
        return self.adapters.beside(ready) if self.adapters else ready

    def _use(self, weight: jax.Array, spec: PartitionSpec, path: str) -> jax.Array:
        layout = self.stacked.layout
        if self.pipeline and path.startswith(BLOCK):  # it keeps the groups apart by itself
            over = set()
        else:  # where experts see tokens, those of all of ep are there, or come there
            rows = layout.rules.axis("routed" if _EXPERTS & {*self._used[path].dims} else "batch")
            over = {*names(rows), *names(layout.rules.axis("tokens"))} - {name for axis in spec for name in names(axis)}
        return reshard(weight.astype(layout.dtype), PartitionSpec(*spec, reduced=over), layout.mesh)

    def _settle(self, grads: Params) -> Params:
        """Gradients summed over dp in float32, in the layout at rest; a second time nothing happens.

        Kernels become shares one after another, of which XLA would else have many whole in float32, and lie in memory as the
        state does: a reduce-scatter brings its dim to the front, and an optimiser that turns all of that around cannot work in
        place.
        """
        mesh, before, found = self.stacked.layout.mesh, None, {}
        for path, g in grads.items():
            kernel = self.rest[path] != self.specs[path].spec and g.ndim > 1 + path.startswith(BLOCK)
            if kernel and before is not None and spec_of(g).unreduced:
                g, _ = jax.lax.optimization_barrier((g, before))
            g = reshard(g.astype(jnp.float32), self.rest[path], mesh)
            found[path] = locally(row_major, g, out=spec_of(g)) if kernel else g
            before = found[path] if kernel else before
        return found

    def _update(self, grads: Params, state: State) -> tuple[Params, Any]:
        """The optimiser's step. Its own products and means are left to the partitioner."""

        def update(grads: Params, opt: Any, params: Params) -> tuple[Params, Any]:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes ints and floats
                updates, opt = self.optimizer.update(grads, opt, params)
                return optax.apply_updates(params, updates), opt

        layouts = jax.tree.map(lambda a: jax.typeof(a).sharding, (state.params, state.opt))
        return jax.sharding.auto_axes(update, out_sharding=layouts)(grads, state.opt, state.params)


class _Sums(NamedTuple):
    """Of a microbatch's tokens: the loss, its part without the z-loss, and what routers did."""

    loss: jax.Array
    nats: jax.Array
    routing: Routing | None


def _split(params: Params) -> tuple[Params, Params]:
    """(tables, stacks)."""
    stacks = {path: w for path, w in params.items() if path.startswith(BLOCK)}
    return {path: w for path, w in params.items() if path not in stacks}, stacks
