"""Rules: which dim lies on which mesh axis. A weight names its dims once; its PartitionSpec is derived here.

Dims of weights       layers (of a stack), vocab, embed, kv_heads, fused (the queries, key and value of a KV head), head_dim,
                      query_heads (all their channels, cut between KV heads), channels (of all heads, whole), mlp, gate_up,
                      experts, expert_mlp, routes (experts as a router scores them), shared_gate
Dims of activations   batch, tokens (inside a block), sequence (tokens of the residual stream), heads (of q, k, v and the
                      cache), hidden (inside the MLP), logits, cached, routed (the batch where experts see it)

Tensor parallelism, sequence parallelism and pipelines are different tables, not different models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtp.config import ModelConfig

Axis = str | tuple[str, ...] | None  # several axes: cut over all of them, the first outermost
Axes = tuple[tuple[str, Axis], ...]

DEFAULT: Axes = (
    ("batch", "dp"),
    ("tokens", None),
    ("sequence", None),
    ("cached", None),
    ("vocab", "tp"),
    ("logits", "tp"),
    ("kv_heads", "tp"),
    ("query_heads", "tp"),
    ("heads", "tp"),
    ("mlp", "tp"),
    ("hidden", "tp"),
    ("embed", None),
    ("fused", None),
    ("gate_up", None),
    ("head_dim", None),
    ("channels", None),
    ("layers", None),
    ("experts", "ep"),
    ("expert_mlp", "tp"),
    ("routes", None),
    ("shared_gate", None),
    ("routed", "dp"),
)
# How a layer's experts are cut over tp: whole experts, or each one's width; auto: whole where their number allows it.
ExpertLayout = Literal["auto", "whole", "width"]
# How tokens come to experts on ep: all to all of its devices, or each to those that it chose (`parallel.experts`).
ExpertDispatch = Literal["gather", "ragged"]


@dataclass(frozen=True)
class Rules:
    """Dim -> mesh axis, with exceptions for single modules (`overrides`: path -> what differs there)."""

    axes: Axes = DEFAULT
    overrides: tuple[tuple[str, Axes], ...] = ()

    def using(self, **axes: Axis) -> Rules:
        """These rules with some dims on other axes, e.g. `Rules().using(vocab=None)`."""
        known = dict(self.axes)
        for dim in axes:
            if dim not in known:
                raise ValueError(f"no dim is named {dim!r}; dims: {', '.join(known)}")
        return replace(self, axes=tuple({**known, **axes}.items()))

    def sequence_parallel(self) -> Rules:
        """The residual stream sharded over tokens: all-reduces become reduce-scatters and all-gathers."""
        return self.using(sequence=joined(*names(self.axis("tokens")), *names(self.axis("mlp"))))

    def context_parallel(self) -> Rules:
        """Tokens in parts over cp, of the residual stream as well, there before what else cuts it."""
        return self.using(tokens="cp", sequence=joined("cp", *names(self.axis("sequence"))))

    def cache_parallel(self) -> Rules:
        """The cache's slots over cp, and all weights over tp and cp together, but for those of queries, keys and values: they
        follow the KV heads, over tp alone. (Where tp does not exceed these, no device holds what another holds.)
        """
        both = joined("tp", "cp")
        axes: dict[str, Axis] = dict.fromkeys(("vocab", "logits", "query_heads", "mlp", "hidden"), both)
        axes["sequence"] = both if self.axis("sequence") else None
        return self.using(cached="cp", expert_mlp=both, **axes)

    def pipeline_parallel(self) -> Rules:
        """Layers in stages over pp, and a vocabulary that pp holds together with the others."""
        over = ("pp", *(axis for axis in names(self.axis("vocab")) if axis != "pp"))
        return self.using(layers="pp", vocab=over, logits=over)

    def expert_parallel(
        self,
        config: ModelConfig,
        *,
        ep: int,
        tp: int,
        cp: int = 1,
        layout: ExpertLayout = "auto",
        dispatch: ExpertDispatch = "gather",
    ) -> Rules:
        """Experts over ep, which shards the batch as well, and over tp (and cp, where MLPs lie on it) as `layout` says. Raises
        ValueError where ep is of no use, or they cannot be cut so, or `dispatch` has no ep.
        """
        experts = config.experts
        if dispatch not in get_args(ExpertDispatch):
            raise ValueError(f"expert_dispatch={dispatch!r} is none of {', '.join(get_args(ExpertDispatch))}")
        if dispatch == "ragged" and ep == 1:
            raise ValueError("expert_dispatch='ragged' sends tokens along ep, which is 1 here; leave it out, or set ep")
        if experts is None:
            if ep > 1:
                raise ValueError(f"ep={ep} is for experts, of which this {config.model_type} has none; use dp or tp")
            return self
        if experts.count % ep:
            legal = ", ".join(str(n) for n in range(1, experts.count + 1) if experts.count % n == 0)
            raise ValueError(f"ep={ep} does not divide the {experts.count} experts; legal ep for this model: {legal}")
        ways, name, each = tp * cp, "tp" if cp == 1 else "tp·cp", str(tp) if cp == 1 else f"{tp}·{cp}"
        groups = config.cut_groups(ways, {"experts' down_proj": experts.width}, {"experts' gate_proj": experts.width})
        fits = {"whole": experts.count % (ep * ways) == 0, "width": experts.width % ways == 0 and not groups}
        chosen = layout if layout != "auto" else "whole" if fits["whole"] else "width"
        if chosen not in fits:
            raise ValueError(f"expert_layout={layout!r} is none of {', '.join(get_args(ExpertLayout))}")
        if not fits[chosen]:
            what = (
                f"the {experts.count} experts by ep·{name}={ep * ways}"
                if chosen == "whole"
                else f"their width {experts.width} by {name}={each}" + "".join(f", and {problem}" for problem in groups)
            )
            raise ValueError(
                f"expert_layout={layout!r} would cut {what}, which does not divide; use another one, or other sizes"
            )
        rules = self.using(batch=("dp", "ep")) if ep > 1 else self
        rules = rules.using(routed=("dp", "ep")) if dispatch == "ragged" else rules
        whole = ("ep", *names(self.axis("expert_mlp")))
        return rules.using(experts=whole, expert_mlp=None) if chosen == "whole" else rules

    def axis(self, dim: str, path: str = "") -> Axis:
        """The mesh axis of `dim` in the module at `path`."""
        return {**dict(self.axes), **dict(dict(self.overrides).get(path, ()))}[dim]


@dataclass(frozen=True)
class Layout:
    """Where the arrays of one module lie: the mesh, the rules, and the module's path in the model.

    stack: the layers whose weights the module's weights hold in a first dim "layers", one behind another (None: a row
    without a layer); empty where the module is itself.
    """

    mesh: Mesh
    rules: Rules
    dtype: jnp.dtype
    path: str = ""
    stack: tuple[int | None, ...] = ()

    def at(self, name: str) -> Layout:
        """The layout of the submodule or weight `name`."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def data(self) -> tuple[str, ...]:
        """The axes that tokens are spread over: those of rows (dp, and ep where experts lie on it), and of the tokens of a row
        (cp).
        """
        return names(self.rules.axis("batch", self.path)) + names(self.rules.axis("tokens", self.path))

    def parts(self, dim: str) -> int:
        """Into how many pieces `dim` is cut here."""
        return size(self.mesh, self.rules.axis(dim, self.path))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these dims (None: a dim without a name, never sharded)."""
        axes = [None if dim is None else self.rules.axis(dim, self.path) for dim in dims]
        used = [name for axis in axes for name in names(axis)]
        if len(used) != len(set(used)):
            raise ValueError(f"{self.path}: the dims {dims} would use one mesh axis twice: {axes}")
        return PartitionSpec(*axes)

    def sharding(self, *dims: str | None) -> NamedSharding:
        """The same as a NamedSharding over the mesh."""
        return NamedSharding(self.mesh, self.spec(*dims))

    def param(self, name: str, **dims: int) -> nnx.Param:
        """An abstract weight: its dims by name with their sizes, in order. Loading or initialising fills it."""
        here = self.at(name)
        dims = {"layers": len(self.stack), **dims} if self.stack else dims
        shape = tuple(dims.values())
        for dim, size in dims.items():
            assert size % here.parts(dim) == 0, f"{here.path}: {dim}={size} over {here.parts(dim)} devices"
        abstract = jax.ShapeDtypeStruct(shape, self.dtype, sharding=here.sharding(*dims))
        return nnx.Param(abstract, dims=tuple(dims), stack=self.stack)

    def pad(self, dim: str, size: int) -> int:
        """`size` rounded up to what the mesh divides."""
        return math.ceil(size / self.parts(dim)) * self.parts(dim)

    def place(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """`x` with the sharding of these dims: no operation where it has it already, communication where not."""
        return reshard(x, self.spec(*dims), self.mesh)

    def gather(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] with every token on every device, for the head: an all-gather under sequence
        parallelism. Its type then says that the gradient is summed on its way back only: a reduce-scatter.
        """
        batch, tokens = self.spec("batch", "tokens")
        over = {*names(self.rules.axis("sequence", self.path))} - {*names(tokens)}
        if not over:
            return reshard(x, PartitionSpec(batch, tokens, None), self.mesh)
        # where stages hold the head together, the sum over them comes last on the way back, when each device has few tokens
        beyond = set(names(self.rules.axis("logits", self.path))) - over
        own = spec_of(x)
        x = reshard(x, PartitionSpec(*own.partitions, reduced=own.reduced | beyond), self.mesh)
        return reshard(x, PartitionSpec(batch, tokens, None, reduced=over | beyond), self.mesh)


def names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that a dim is cut over."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def joined(*axes: str) -> Axis:
    """The dim's axis where it is cut over all of these: `names` the other way round."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def size(mesh: Mesh | jax.sharding.AbstractMesh, axis: Axis) -> int:
    """Into how many pieces a dim over `axis` is cut."""
    return math.prod(mesh.shape[name] for name in names(axis))


def mesh_of(x: jax.Array, default: Mesh | jax.sharding.AbstractMesh) -> jax.sharding.AbstractMesh:
    """The mesh that x's type speaks of: where a function is mapped over a mesh axis, one without it."""
    mesh = jax.typeof(x).sharding.mesh
    return default.abstract_mesh if mesh.empty else mesh


def reshard(x: jax.Array, spec: PartitionSpec, mesh: Mesh | jax.sharding.AbstractMesh) -> jax.Array:
    """`x` laid out as `spec` over its own mesh, or `mesh`; nothing is emitted where it lies so already."""
    target = NamedSharding(mesh_of(x, mesh), spec)
    return x if jax.typeof(x).sharding == target else jax.sharding.reshard(x, target)


def row_major(x: jax.Array) -> jax.Array:
    """`x` as arguments of programs lie in memory; in a region."""
    return with_layout_constraint(x, MemoryLayout(tuple(range(x.ndim))))


def zeros(tree: Any) -> Any:
    """Arrays of zeros, of the shapes and shardings that are given; inside a program over their mesh."""

    def array(a: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(a.shape, a.dtype, out_sharding=NamedSharding(a.sharding.mesh.abstract_mesh, a.sharding.spec))

    return jax.tree.map(array, tree)


Region = Callable[..., Any]


def on_each_device(
    function: Callable[..., Any], args: tuple[Any, ...], like: Callable[..., Any], *, over: tuple[str, ...] = ()
) -> Any:
    """`function` of each device's own parts of `args`: a region without communication. like(*args): of what returns, arrays
    among `args` that are laid out so. over: mesh axes over which what returns is a share of a sum; the gradients of what is
    whole over them then must be shares as well, which is to say that these `args` are `reduced` there.
    """
    mesh = next(jax.typeof(a).sharding.mesh for a in jax.tree.leaves(args))
    args = jax.tree.map(_plainly_reduced, args)
    alone = tuple(axis for axis in over if mesh.shape[axis] == 1)  # a share there is the sum
    shared = tuple(axis for axis in over if axis not in alone)
    out = jax.tree.map(lambda spec: PartitionSpec(*spec.partitions, unreduced={*shared}), specs_of(like(*args)))

    def own(*args: Any) -> Any:
        # from here on each device's arrays are its own, for gradients too
        kinds = [jax.typeof(a).mat for a in jax.tree.leaves(args)]
        axes = set(over).union(*(kind.varying | kind.reduced for kind in kinds))

        def mine(a: jax.Array) -> jax.Array:
            a = jax.lax.pcast(a, tuple(sorted(jax.typeof(a).mat.reduced)), to="varying")
            return jax.lax.pcast(a, tuple(sorted(axes - jax.typeof(a).mat.varying)), to="varying")

        return jax.lax.pcast(jax.lax.psum(function(*jax.tree.map(mine, args)), alone), shared, to="unreduced")

    return jax.shard_map(own if over else function, mesh=mesh, in_specs=specs_of(args), out_specs=out)(*args)


def _plainly_reduced(x: jax.Array) -> jax.Array:
    """x, whose type says `reduced` only of axes that have several devices: others leave a gradient that shard_map reshapes."""
    spec, mesh = spec_of(x), jax.typeof(x).sharding.mesh
    return reshard(x, PartitionSpec(*spec.partitions, reduced={axis for axis in spec.reduced if mesh.shape[axis] > 1}), mesh)


def varying_as(constants: Any, *others: Any) -> Any:
    """Constants, inside a region, whose type says that they differ from device to device as others do: what a loop's carry must
    say from its start.
    """
    axes = set().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(others)))
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(sorted(axes - jax.typeof(a).mat.varying)), to="varying"), constants)


def whole(x: jax.Array) -> jax.Array:
    """x, whose type says `reduced` (its gradient is a sum of shares), for what every device computes alike: as a share of the
    gradient the first device's counts.
    """
    spec = spec_of(x)
    if not spec.reduced:
        return x
    mesh, plain = jax.typeof(x).sharding.mesh, PartitionSpec(*spec.partitions)
    over = tuple(axis for axis in mesh.axis_names if axis in spec.reduced)  # in one order on every process
    count = size(mesh, over)

    @jax.custom_vjp
    def run(x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, plain))

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        """A product over a dim with an entry for each device, of which all but the first are 0."""
        each = NamedSharding(mesh, PartitionSpec(over, *spec.partitions))
        grads = jnp.broadcast_to(grad, (count, *grad.shape), out_sharding=each)
        first = jax.sharding.reshard((jnp.arange(count) == 0).astype(grad.dtype), NamedSharding(mesh, PartitionSpec(over)))
        shares = NamedSharding(mesh, PartitionSpec(*spec.partitions, unreduced={*over}))
        return (jnp.einsum("n,n...->...", first, grads, out_sharding=shares),)

    run.defvjp(lambda x: (run(x), None), backward)
    return run(x)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, laid out over the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on the host of every process, wherever its parts are."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def spec_of(a: jax.Array | PartitionSpec) -> PartitionSpec:
    """The layout that its type says; of a layout itself."""
    return a if isinstance(a, PartitionSpec) else jax.typeof(a).sharding.spec


def dual(a: jax.Array) -> PartitionSpec:
    """The layout of its gradient: shares of a sum where its type says `reduced`, and the other way round."""
    spec = spec_of(a)
    return PartitionSpec(*spec.partitions, unreduced=spec.reduced, reduced=spec.unreduced)


def specs_of(tree: Any) -> Any:
    """That of each array."""
    return jax.tree.map(spec_of, tree)


def beside(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight` [*dims], ready to be added to or multiplied with x [B, T, *dims]: laid out as x's own dims are.

    A weight whose gradient is summed over some axis only later (its type says `reduced`) cannot meet an array that is
    sharded over that axis: it is spread over the rows first (and over the tokens, where these lie on such an axis, too), which
    costs nothing.
    """
    spec, own = spec_of(x).partitions, jax.typeof(weight).sharding
    before = x.ndim - weight.ndim
    if not own.spec.reduced:
        return reshard(weight, PartitionSpec(*spec[before:]), own.mesh)
    over = [i == 0 or bool(own.spec.reduced & {*names(axis)}) for i, axis in enumerate(spec[:before])]
    sizes = [n if spread else 1 for n, spread in zip(x.shape, over, strict=False)]
    axes = [axis if spread else None for axis, spread in zip(spec, over, strict=False)]
    laid = NamedSharding(own.mesh, PartitionSpec(*axes, *own.spec.partitions))
    spread = jax.lax.broadcast_in_dim(weight, (*sizes, *weight.shape), (*range(before, x.ndim),), out_sharding=laid)
    return reshard(spread, PartitionSpec(*axes, *spec[before:]), own.mesh)


def check_layout(config: ModelConfig, tp: int, rules: Rules, *, cp: int = 1) -> None:
    """Raises ValueError, with the legal sizes, where this model cannot be laid out so. cp: over which the cache's slots lie, if
    the rules say so. Touches no device.
    """
    layers = [f"layers.{i}." for i in range(config.num_layers)]

    def cut(*dims: tuple[str, str]) -> bool:
        return any("tp" in names(rules.axis(dim, layer + name)) for layer in layers for name, dim in dims)

    heads = cut(("attention.qkv", "kv_heads"), ("attention.o", "query_heads"))
    mlp = cut(("mlp.gate_up", "mlp"), ("mlp.down", "mlp"))

    def found(cp: int) -> list[str]:
        return [problem for problem in config.tp_problems(tp, cp) if (mlp if "MLP" in problem else heads)]

    if not (problems := found(1)) and rules.axis("cached") and (more := found(cp)):
        legal = ", ".join(str(n) for n in range(1, config.num_heads // tp + 1) if not found(n))
        raise ValueError(
            f"weights lie over tp·cp={tp}·{cp}, which does not divide {' and '.join(more)}; legal cp with tp={tp}: {legal}"
        )
    if problems:
        legal = ", ".join(map(str, config.legal_tp()))
        raise ValueError(f"tp={tp} does not divide {' and '.join(problems)}; legal tp for this model: {legal}")
    by_rows = cut(("attention.qkv", "embed"), ("attention.o", "embed"), ("mlp.gate_up", "embed"), ("mlp.down", "embed"))
    if by_rows and config.hidden_size % tp:
        raise ValueError(f"tp={tp} does not divide hidden_size {config.hidden_size}, which the tp_plan shards")
