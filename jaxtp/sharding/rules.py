"""Rules: which dim lies on which mesh axis. A weight names its dims once; its PartitionSpec is derived here.

Dims of weights       layers (of a stack), vocab, embed, kv_heads, fused (the queries, key and value of a KV head), head_dim,
                      query_heads (all their channels, cut between KV heads), channels (of all heads, whole), mlp, gate_up,
                      experts, expert_mlp, routes (experts as a router scores them), shared_gate
Dims of activations   batch, tokens (inside a block), sequence (tokens of the residual stream), heads (of q, k, v and the
                      cache), hidden (inside the MLP), logits, cached, routed (the batch where experts see it)

Tensor parallelism, sequence parallelism and pipelines are different tables, not different models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

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

    def speak_of(self, axis: str) -> bool:
        """Whether any dim lies on that axis of the mesh."""
        tables = (self.axes, *(each for _, each in self.overrides))
        return any(axis in names(found) for table in tables for _, found in table)

    def axis(self, dim: str, path: str = "") -> Axis:
        """The mesh axis of `dim` in the module at `path`."""
        return {**dict(self.axes), **dict(dict(self.overrides).get(path, ()))}[dim]


def names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that a dim is cut over."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def joined(*axes: str) -> Axis:
    """The dim's axis where it is cut over all of these: `names` the other way round."""
    return axes if len(axes) > 1 else axes[0] if axes else None


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
