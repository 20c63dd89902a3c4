"""The two-way table of names: which tensors of a Hugging Face checkpoint make up each of our weights.

`TABLE` has a row for each of our weights; a new one is a new row. A weight of ours is a reshape of one tensor, or several
tensors side by side (q, k and v; gate and up), which some families have below each other in one. Where tp exceeds the KV
heads, each KV head stands several times in ours; where tp does not divide the vocabulary, ours has zero rows at the end. Both
are undone on the way out.

K KV heads as held, G query heads per held KV head, H head_dim, D embed, F mlp, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtp.config import FAMILIES, ModelConfig
from jaxtp.config.quantization import Scheme
from jaxtp.weights import layers_of

Index = tuple[slice, ...]
KERNELS = ("qkv", "o", "gate_up", "down")  # of a block


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside one of our weights.

    select: where it lies in ours (an int drops that dim). rows: how many of the dims left flatten into the tensor's rows,
    the others into its columns. repeat: how often each entry of the first row dim stands in ours. size: the tensor's true
    number of rows where ours is padded. within: (first row, rows in all) where it is not all of the tensor, but its rows from
    there on.
    """

    name: str
    select: tuple[int | slice, ...] = ()
    rows: int = 1
    repeat: int = 1
    size: int | None = None
    within: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """The module whose weight it is."""
        return self.name.removesuffix(".weight")

    def whole(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint, from the shape of our weight."""
        rows, *columns = self.shape(ours)
        return (self.within[1] if self.within else rows, *columns)

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The same of this part of it."""
        dims = self._dims(ours)
        rows = self.size or math.prod(dims[: self.rows]) // self.repeat
        return (rows, math.prod(dims[self.rows :])) if len(dims) > self.rows else (rows,)

    def read(self, out: np.ndarray, index: Index, ours: Sequence[int], get: Callable[[Index], np.ndarray]) -> None:
        """Fills this part of `out`, the block `index` of our weight; `get` reads a block of the tensor."""
        select = self.select
        if select and isinstance(select[0], int):
            begin, end, _ = index[0].indices(ours[0])
            if not begin <= select[0] < end:
                return  # an expert of other devices
            select = (select[0] - begin, *select[1:])
        dims, kept = self._dims(ours), self._kept(len(ours))
        # a dim of which this part is a slice (fused) is never sharded: the block spans the whole part
        whole = [i < len(self.select) and self.select[i] != slice(None) for i in kept]
        bounds = [(0, n) if w else index[i].indices(n)[:2] for i, n, w in zip(kept, dims, whole, strict=True)]
        (start, stop), inner = bounds[0], math.prod(dims[1 : self.rows])
        first, last = start // self.repeat, -(-stop // self.repeat)
        limit = self.shape(ours)[0]
        where = [slice(min(first * inner, limit), min(last * inner, limit))]
        if len(dims) > self.rows:
            inner_columns = math.prod(dims[self.rows + 1 :])
            where.append(slice(bounds[self.rows][0] * inner_columns, bounds[self.rows][1] * inner_columns))
        target = out[select] if select else out
        if where[0].start == where[0].stop:  # a share of padding alone
            target[...] = 0
            return
        offset = self.within[0] if self.within else 0
        values = get((slice(where[0].start + offset, where[0].stop + offset), *where[1:]))
        if self.repeat > 1:
            heads = np.repeat(values.reshape(last - first, -1), self.repeat, axis=0)
            values = heads[start - first * self.repeat :][: stop - start]
        if self.size is not None and len(values) < len(target):
            target[len(values) :] = 0
            target = target[: len(values)]
        target[...] = values.reshape(target.shape)

    def write(self, ours: np.ndarray) -> np.ndarray:
        """The tensor, or this part of it, as the checkpoint holds it, from our whole weight."""
        part = ours[self.select] if self.select else ours
        return np.ascontiguousarray(part[:: self.repeat].reshape(-1, *self.shape(ours.shape)[1:])[: self.size])

    def spread(self, tensor: jax.Array, ours: Sequence[int]) -> jax.Array:
        """The reverse of `write`: a whole tensor in the shape it has within our weight."""
        dims = self._dims(ours)
        if self.size is not None:
            tensor = jnp.pad(tensor, ((0, dims[0] - self.size), (0, 0)))
        return jnp.repeat(tensor.reshape(dims[0] // self.repeat, *dims[1:]), self.repeat, axis=0)

    def _dropped(self, dim: int) -> bool:
        return dim < len(self.select) and isinstance(self.select[dim], int)

    def _kept(self, ndim: int) -> list[int]:
        return [i for i in range(ndim) if not self._dropped(i)]

    def _dims(self, ours: Sequence[int]) -> list[int]:
        picks = {i: s for i, s in enumerate(self.select) if isinstance(s, slice)}
        return [len(range(*picks[i].indices(ours[i]))) if i in picks else ours[i] for i in self._kept(len(ours))]


def made_of(config: ModelConfig, path: str, weight: nnx.Variable) -> tuple[tuple[int, ...], list[tuple[Part, ...]]]:
    """(the shape of a stack's rows, the tensors of each; none where no layer stands); of any other weight its own."""
    shape, found = weight.get_value().shape, layers_of(path, weight)
    each = shape[1:] if weight.get_metadata()["stack"] else shape
    return each, [() if name is None else parts(config, name, each) for name in found]


def scheme_of(config: ModelConfig, path: str, weight: nnx.Variable) -> Scheme | None:
    """How a kernel is quantized. Raises ValueError where its tensors are so in different ways."""
    if config.schemes is None:
        return None
    of = {part.name: config.schemes.of(part.module) for row in made_of(config, path, weight)[1] for part in row}
    if len(set(of.values())) > 1:
        first, *_ = of
        other = next(name for name, scheme in of.items() if scheme != of[first])
        raise ValueError(f"{first} and {other} are parts of one weight here ({path}), but quantized in different ways")
    return next(iter(of.values()))


def parts(config: ModelConfig, path: str, shape: Sequence[int]) -> tuple[Part, ...]:
    """The tensors that make up our weight at `path` (e.g. "layers.3.attention.qkv") of the given shape."""
    row, layer = _row(config, path)
    found = [part for tensor in row for part in tensor.parts(config, shape, layer)]
    return tuple(_below(found, shape))


def first_module(config: ModelConfig, path: str) -> str:
    """The first of the modules whose weights make up ours at `path`."""
    row, layer = _row(config, path)
    return row[0].name.replace("*", layer).replace("#", "0").removesuffix(".weight")


def _row(config: ModelConfig, path: str) -> tuple[tuple[Tensor, ...], str]:
    """That of the table, and the layer."""
    layer = re.search(r"\.(\d+)\.", path)
    generic = re.sub(r"\.\d+\.", ".*.", path, count=1)
    return _table(config)[generic], layer[1] if layer else ""


def _table(config: ModelConfig) -> dict[str, tuple[Tensor, ...]]:
    own = BELOW if FAMILIES[config.model_type].fused else BY_FAMILY.get(config.model_type, {})
    return {**TABLE, **own}


def kernels(config: ModelConfig) -> re.Pattern[str]:
    """What the tensors of blocks' kernels are called, in all layers and experts."""
    rows = [row for path, row in _table(config).items() if path.rpartition(".")[2] in KERNELS]
    names = {re.escape(tensor.name).replace(r"\*", r"\d+").replace(r"\#", r"\d+") for row in rows for tensor in row}
    return re.compile("|".join(sorted(names)))


def _below(found: Sequence[Part], shape: Sequence[int]) -> Iterator[Part]:
    """Parts of one name are of one tensor, below each other in that order."""
    sizes = [part.shape(shape)[0] for part in found]
    for i, part in enumerate(found):
        same = [j for j, other in enumerate(found) if other.name == part.name]
        rows = sum(sizes[j] for j in same)
        yield replace(part, within=(sum(sizes[j] for j in same if j < i), rows)) if len(same) > 1 else part


def tensors(parts: Sequence[Part], ours: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of these parts of one weight of ours, by name, as the checkpoint holds them."""
    found: dict[str, list[np.ndarray]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part.write(ours))
    return {name: written[0] if len(written) == 1 else np.concatenate(written) for name, written in found.items()}


@dataclass(frozen=True)
class Tensor:
    """What the table says of one tensor in one of our weights; `Part` is the same for a model and a layer.

    name: "*" is the layer, "#" an expert: there is one for each entry of our first dim. select: where it lies in ours, counted
    from the end where negative. rows: of `Part`. per_kv_head: its rows are KV heads', of which ours may hold copies. vocab: its
    rows are the vocabulary, which ours may pad.
    """

    name: str
    select: tuple[int | slice, ...] = ()
    rows: int = 1
    per_kv_head: bool = False
    vocab: bool = False

    def parts(self, config: ModelConfig, ours: Sequence[int], layer: str) -> list[Part]:
        """It in a weight of that shape, or all of them."""
        if "#" not in self.name:
            return [self._part(config, ours, self.name.replace("*", layer), self.select)]
        names = [self.name.replace("*", layer).replace("#", str(expert)) for expert in range(ours[0])]
        return [self._part(config, ours, name, (expert, *self.select[1:])) for expert, name in enumerate(names)]

    def _part(self, config: ModelConfig, ours: Sequence[int], name: str, select: tuple[int | slice, ...]) -> Part:
        return Part(
            name,
            select=tuple(_from_start(pick, n) for pick, n in zip(select, ours, strict=False)),
            rows=self.rows,
            repeat=ours[0] // config.num_kv_heads if self.per_kv_head else 1,
            size=config.vocab_size if self.vocab else None,
        )


def _from_start(pick: int | slice, size: int) -> int | slice:
    if isinstance(pick, int):
        return range(size)[pick]
    return pick if pick == _ALL else slice(*pick.indices(size)[:2])


_SEPARATE = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def _fused(kind: str, names: tuple[tuple[str, ...], tuple[str, ...]] = _SEPARATE) -> dict[str, tuple[Tensor, ...]]:
    """The rows of the fused kernels, or of their biases. names: of q, k and v, and of gate and up."""
    attention, mlp, ours = "model.layers.*.self_attn", "model.layers.*.mlp", "_bias" if kind == "bias" else ""
    (q, k, v), (gate, up) = names
    return {
        f"layers.*.attention.qkv{ours}": (
            Tensor(f"{attention}.{q}.{kind}", (_ALL, slice(0, -2)), rows=3),
            Tensor(f"{attention}.{k}.{kind}", (_ALL, -2), rows=2, per_kv_head=True),
            Tensor(f"{attention}.{v}.{kind}", (_ALL, -1), rows=2, per_kv_head=True),
        ),
        f"layers.*.mlp.gate_up{ours}": (
            Tensor(f"{mlp}.{gate}.{kind}", (_ALL, 0)),
            Tensor(f"{mlp}.{up}.{kind}", (_ALL, 1)),
        ),
    }


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[Tensor, ...]]:
    """The rows of a router and its experts."""
    return {
        "layers.*.moe.router": (Tensor(f"{block}.gate.weight"),),
        "layers.*.moe.gate_up": (
            Tensor(f"{block}.experts.#.{gate}.weight", (_ALL, _ALL, 0)),
            Tensor(f"{block}.experts.#.{up}.weight", (_ALL, _ALL, 1)),
        ),
        "layers.*.moe.down": (Tensor(f"{block}.experts.#.{down}.weight", (_ALL,)),),
    }


_ALL = slice(None)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE: dict[str, tuple[Tensor, ...]] = {
    "embed": (Tensor(EMBED, vocab=True),),
    "head": (Tensor(HEAD, vocab=True),),
    "norm.weight": (Tensor("model.norm.weight"),),
    **_fused("weight"),
    **_fused("bias"),
    "layers.*.attention.o": (Tensor("model.layers.*.self_attn.o_proj.weight"),),
    "layers.*.attention.o_bias": (Tensor("model.layers.*.self_attn.o_proj.bias"),),
    "layers.*.attention.q_norm.weight": (Tensor("model.layers.*.self_attn.q_norm.weight"),),
    "layers.*.attention.k_norm.weight": (Tensor("model.layers.*.self_attn.k_norm.weight"),),
    "layers.*.mlp.down": (Tensor("model.layers.*.mlp.down_proj.weight"),),
    "layers.*.mlp.down_bias": (Tensor("model.layers.*.mlp.down_proj.bias"),),
    **_experts("model.layers.*.mlp", "gate_proj", "up_proj", "down_proj"),
    "layers.*.moe.shared.gate_up": (
        Tensor("model.layers.*.mlp.shared_expert.gate_proj.weight", (_ALL, 0)),
        Tensor("model.layers.*.mlp.shared_expert.up_proj.weight", (_ALL, 1)),
    ),
    "layers.*.moe.shared.down": (Tensor("model.layers.*.mlp.shared_expert.down_proj.weight"),),
    "layers.*.moe.shared_gate": (Tensor("model.layers.*.mlp.shared_expert_gate.weight"),),
    "layers.*.attention_norm.weight": (Tensor("model.layers.*.input_layernorm.weight"),),
    "layers.*.mlp_norm.weight": (Tensor("model.layers.*.post_attention_layernorm.weight"),),
    "layers.*.attention_post_norm.weight": (Tensor("model.layers.*.post_attention_layernorm.weight"),),
    "layers.*.mlp_post_norm.weight": (Tensor("model.layers.*.post_feedforward_layernorm.weight"),),
}
# where a family spells it otherwise
_GEMMA: dict[str, tuple[Tensor, ...]] = {
    "layers.*.mlp_norm.weight": (Tensor("model.layers.*.pre_feedforward_layernorm.weight"),)
}
BY_FAMILY: dict[str, dict[str, tuple[Tensor, ...]]] = {
    "mixtral": _experts("model.layers.*.block_sparse_moe", "w1", "w3", "w2"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
BELOW = _fused("weight", (("qkv_proj",) * 3, ("gate_up_proj",) * 2))  # where it has them in one
