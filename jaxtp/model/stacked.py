"""The same model with its blocks in one stack: each weight of a layer is [L, ...], and one scan goes through them.

So compile time does not grow with depth, and a layer's weights can be brought to where they are used layer by layer. The
parameters are a flat dict, path -> array: "embed", "norm.weight", "head", and for the blocks "layers.*.attention.qkv".

L layers; else as in `llama`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.config import Kind
from jaxtp.model.layers import Step
from jaxtp.model.llama import Llama
from jaxtp.ops.router import Routing
from jaxtp.sharding import on_each_device
from jaxtp.weights import variables

Params = dict[str, jax.Array]
BLOCK = "layers.*."


def _keep(*names: str) -> Callable[..., bool]:
    """Keeps what the model gives these names, and what cuDNN's attention needs to go backward."""
    named = checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        return named(primitive, *args, **params) or primitive.name.startswith("dot_product_attention_fwd")

    return policy


# what the forward pass keeps for the backward pass; what it does not is computed again
REMAT: dict[str, Any] = {
    "none": None,
    "full": checkpoint_policies.nothing_saveable,
    "save-dots": _keep("product", "attention"),
    "save-attention": _keep("attention"),
}


@dataclass(frozen=True)
class Spec:
    """One stacked parameter: its shape, the names of its dims ("layers" first where it is a stack) and its layout.

    layers: of a stack, the model's layers that it is of. kv: how many of its `fused` rows, the last, are keys and values, which
    stand several times where tp exceeds the KV heads.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    spec: PartitionSpec
    layers: tuple[int, ...] = ()
    kv: int = 0


class _Graph(NamedTuple):
    """A block without its weights: what they are called, and how to put it together."""

    definition: Any
    tree: Any
    names: tuple[str, ...]


class Stacked:
    """A Llama's forward pass over stacked parameters. It holds no arrays: parameters are an argument."""

    def __init__(self, model: Llama) -> None:
        """`model` may be abstract; its weights are not touched. Raises ValueError where they are quantized."""
        if model.quantization:
            raise ValueError(f"quantization={model.quantization!r} is for generation; a model to train keeps its dtype")
        self.model, self.config, self.layout = model, model.config, model.layout
        self._blocks: dict[Kind, _Graph] = {}
        for kind, block in zip(self.config.kinds, model.layers, strict=False):
            definition, state = nnx.split(block)
            names, tree = _named(state)
            self._blocks.setdefault(kind, _Graph(definition, tree, tuple(BLOCK + name for name in names)))
        whole, state = nnx.split(model)
        self._whole = whole
        self._paths, self._all = _named(state)

    def specs(self) -> dict[str, Spec]:
        """Every parameter, in order."""
        found: dict[str, Spec] = {}
        for path, weight in variables(self.model):
            shape, spec = weight.get_value().shape, weight.get_value().sharding.spec
            dims = weight.get_metadata()["dims"]
            name, layer = generic(path)
            layers: tuple[int, ...] = ()
            if layer is not None:
                layers = tuple(self.layers(name))
                shape, dims = (len(layers), *shape), ("layers", *dims)
                spec = PartitionSpec(None, *spec)
            found[name] = Spec(shape, dims, spec, layers, kv=2 if "fused" in dims else 0)
        return found

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        remat: str = "none",
        bring: Callable[[Params], Mapping[str, Any]] = lambda layer: layer,
        capacity: float | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """tokens [B, T] -> [B, T, D] after the last norm, as `Llama.hidden`; and what routers did (see `blocks`).

        remat: a key of `REMAT`. bring: makes a layer's weights (by path, arrays without the L dim) ready for use, inside the
        loop. `params` may hold more of a layer than its weights, for `bring`. capacity: of experts, see `ops.router.route`.
        """

        def run(x: jax.Array, step: Step) -> tuple[jax.Array, Routing | None]:
            stacks = {path: weight for path, weight in params.items() if path.startswith(BLOCK)}
            return self.blocks(stacks, x, replace(step, capacity=capacity), kinds=self.config.kinds, remat=remat, bring=bring)

        return self.whole(params).hidden(tokens, positions, segment_ids, run=run)

    def blocks(
        self,
        stacks: Params,
        x: jax.Array,
        step: Step,
        *,
        kinds: Sequence[Kind],
        filled: jax.Array | None = None,
        remat: str = "none",
        bring: Callable[[Params], Mapping[str, Any]] = lambda layer: layer,
    ) -> tuple[jax.Array, Routing | None]:
        """x [B, T, D] through blocks of these kinds, one after another. stacks: their weights, each [n, ...] of those n blocks
        that have it. filled [blocks] bool: leaves x as it is where there is no block.

        With it what the routers of those blocks that have one did, [blocks, B, ...]; None where none has.
        """

        def run(kind: Kind, x: jax.Array, weights: Params, here: jax.Array | None) -> tuple[jax.Array, Routing | None]:
            graph, ready = self._blocks[kind], bring(weights)
            block = nnx.merge(graph.definition, jax.tree.unflatten(graph.tree, [ready[name] for name in graph.names]))
            y, _, routing = block(x, step, None)
            if here is None:
                return y, routing
            return jnp.where(here, y, x), jax.tree.map(lambda a: jnp.where(here, a, jnp.zeros((), a.dtype)), routing)

        if remat != "none":  # a scan has no common parts
            run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False, static_argnums=0)
        first, routings = 0, []
        for pattern, times in repeats(kinds):
            last = first + len(pattern) * times
            # of each stack, the blocks of the pattern that have it, and its rows here
            of = {path: [i for i, kind in enumerate(pattern) if self._has(kind, path)] for path in stacks}
            before = {path: sum(self._has(kind, path) for kind in kinds[:first]) for path in stacks}
            part = {path: _rows(w, before[path], len(of[path]), times) for path, w in stacks.items() if of[path]}
            here = None if filled is None else _rows(filled, first, len(pattern), times)

            def body(x: jax.Array, part: Any, pattern: Any = pattern, of: Any = of) -> tuple[jax.Array, list[Routing]]:
                (rows, here), told = part, []
                for i, kind in enumerate(pattern):
                    mine = {path: _row(w, of[path].index(i), len(of[path])) for path, w in rows.items() if i in of[path]}
                    x, routing = run(kind, x, mine, None if here is None else _row(here, i, len(pattern)))
                    told += [] if routing is None else [routing]
                return x, told

            x, told = jax.lax.scan(body, x, (part, here))
            routings += [_in_order(told)] if told else []
            first = last
        return x, jax.tree.map(lambda *layers: jnp.concatenate(layers), *routings) if routings else None

    def layers(self, path: str) -> list[int]:
        """The layers that stand in a stack, row by row: all, or those with an MLP, or with experts."""
        return [i for i, kind in enumerate(self.config.kinds) if self._has(kind, path)]

    def _has(self, kind: Kind, path: str) -> bool:
        """Whether blocks of that kind have the parameter, or the kernel that it stands beside."""
        return any(path == name or path.startswith(f"{name}.") for name in self._blocks[kind].names)

    def whole(self, params: Params) -> Llama:
        """The model around the stack, for what is not in the blocks: those have no weights of their own."""
        leaves = [None if generic(path)[1] is not None else params[path] for path in self._paths]
        return nnx.merge(self._whole, jax.tree.unflatten(self._all, leaves))

    def stack(self, model: Llama) -> Params:
        """The weights of a loaded model as parameters. They are taken over: the model is empty afterwards.

        Those of a model in stages lie as its stages do: on each rank of pp its own layers.
        """
        found: dict[str, list[Any]] = {}
        for path, weight in variables(model):
            found.setdefault(generic(path)[0], []).append(weight)
        params = {}
        for name, spec in self.specs().items():
            arrays = [weight.get_value() for weight in found[name]]
            if spec.dims[0] == "layers":
                sharding = NamedSharding(self.layout.mesh, spec.spec)
                join = _join if model.stacks else jax.jit(lambda *layers: jnp.stack(layers), out_shardings=sharding)
                params[name] = join(*arrays)
                for array in arrays:  # one parameter at a time is there twice
                    array.delete()
            else:
                params[name] = arrays[0]
        return params

    @functools.cached_property
    def kv_copies(self) -> int:
        """How often each KV head stands in the weights: more than once where tp exceeds them."""
        return self.specs()[BLOCK + "attention.qkv"].shape[1] // self.config.num_kv_heads

    def unstack(self, params: Params, *, dtype: jnp.dtype, **layout: Any) -> Llama:
        """A Llama with these parameters in `dtype` (copies). layout: what else `Llama` is to be told, such as its stages, in
        whose order the parameters then are.
        """
        layout = {"rules": self.layout.rules, "context": self.model.context, "dispatch": self.model.dispatch, **layout}
        model = Llama(self.config, mesh=self.layout.mesh, dtype=jnp.dtype(dtype).name, **layout)
        each: dict[str, list[jax.Array]] = {}
        for path, weight in variables(model):
            name, layer = generic(path)
            cast = jax.jit(lambda w: w.astype(dtype), out_shardings=weight.get_value().sharding)
            if layer is None:
                weight.set_value(cast(params[name]))
                continue
            if name not in each and model.stacks:
                each[name] = _split(cast(params[name]), len(model.layers))
            elif name not in each:
                split = jax.jit(lambda w: [layer.astype(dtype) for layer in w], out_shardings=weight.get_value().sharding)
                each[name] = split(params[name])
            weight.set_value(each[name].pop(0))  # layers come in order
        return model


@jax.jit
def _join(*blocks: jax.Array) -> jax.Array:
    """Blocks [P, ...] over pp -> [P·n, ...]: each rank's layers one behind another."""
    return on_each_device(lambda *layers: jnp.concatenate(layers), blocks, lambda *blocks: blocks[0])


@functools.partial(jax.jit, static_argnums=1)
def _split(stack: jax.Array, n: int) -> list[jax.Array]:
    """The other way round."""
    return on_each_device(lambda layers: jnp.split(layers, n), (stack,), lambda stack: [stack] * n)


def repeats(kinds: Sequence[Any], most: int = 8) -> Iterator[tuple[tuple[Any, ...], int]]:
    """A sequence as patterns of at most so many, each with the times that it stands there one behind another."""
    first = 0
    while first < len(kinds):
        best: tuple[int, int] = 1, 1
        for size in range(1, most + 1):
            pattern, times = kinds[first : first + size], 1
            while kinds[first + size * times :][:size] == pattern:
                times += 1
            if times > 1 and size * times > best[0] * best[1]:
                best = size, times
        size, times = best
        yield tuple(kinds[first : first + size]), times
        first += size * times


def _rows(stack: jax.Array, first: int, each: int, times: int) -> jax.Array:
    """Of [n, ...] the rows from `first` on that are `each` a time: [times, each, ...], or [times, ...] of one."""
    rows = stack if each * times == len(stack) else stack[first : first + each * times]
    return rows if each == 1 else rows.reshape(times, each, *stack.shape[1:])


def _row(rows: jax.Array, i: int, each: int) -> jax.Array:
    return rows if each == 1 else rows[i]


def _in_order(told: list[Any]) -> Any:
    """What each place of a pattern told [times, ...], as the layers come: [times · places, ...]."""
    if len(told) == 1:
        return told[0]
    return jax.tree.map(lambda *places: jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:]), *told)


def generic(path: str) -> tuple[str, int | None]:
    """ "layers.3.mlp.down" -> ("layers.*.mlp.down", 3); others as they are, with None."""
    parts = path.split(".")
    return (".".join([parts[0], "*", *parts[2:]]), int(parts[1])) if parts[0] == "layers" else (path, None)


def _named(state: Any) -> tuple[list[str], Any]:
    """The paths of a state's leaves, in the order of its flattening, and its tree."""
    found, tree = jax.tree_util.tree_flatten_with_path(state)
    return [".".join(str(k.key) for k in path if hasattr(k, "key")) for path, _ in found], tree
