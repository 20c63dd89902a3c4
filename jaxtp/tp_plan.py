"""Tensor-parallel plans in Hugging Face's form: globs of module names -> styles, in and out.

    {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise", ...}

A style says which dim of a linear layer's weight tp cuts: `colwise` its outputs, `rowwise` its inputs (followed by an
all-reduce). Q, K and V are one weight here, and so are gate and up: each group takes one style.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from jaxtp.config import FAMILIES, ModelConfig
from jaxtp.sharding import Axes, Rules

# transformers' names for the same thing
STYLES = {
    "colwise": "colwise",
    "local_colwise": "colwise",
    "packed_colwise": "colwise",
    "local_packed_colwise": "colwise",
    "colwise_gather_output": "colwise_gather_output",
    "colwise_rep": "colwise_gather_output",
    "rowwise": "rowwise",
    "local_rowwise": "rowwise",
    "packed_rowwise": "rowwise",
    "local_packed_rowwise": "rowwise",
    "rowwise_rep": "rowwise",
    "rowwise_split_input": "rowwise",
    "embedding_rowwise": "embedding_rowwise",
    "embedding_colwise": "embedding_colwise",
    "sequence_parallel": "sequence_parallel",
    "replicate": "replicate",
    "replicated_with_grad_allreduce": "replicate",
}


@dataclass(frozen=True)
class _Linear:
    """Where a module of Hugging Face's lives here, and the names of its output, input and activation dims."""

    path: str
    out: str
    into: str
    activation: str | None = None


_ATTENTION, _MLP = "layers.{i}.attention", "layers.{i}.mlp"
_LINEARS = {
    "embed_tokens": _Linear("embed", "vocab", "embed"),
    "layers.{i}.self_attn.q_proj": _Linear(_ATTENTION + ".qkv", "kv_heads", "embed", "heads"),
    "layers.{i}.self_attn.k_proj": _Linear(_ATTENTION + ".qkv", "kv_heads", "embed", "heads"),
    "layers.{i}.self_attn.v_proj": _Linear(_ATTENTION + ".qkv", "kv_heads", "embed", "heads"),
    "layers.{i}.self_attn.o_proj": _Linear(_ATTENTION + ".o", "embed", "query_heads"),
    "layers.{i}.mlp.gate_proj": _Linear(_MLP + ".gate_up", "mlp", "embed", "hidden"),
    "layers.{i}.mlp.up_proj": _Linear(_MLP + ".gate_up", "mlp", "embed", "hidden"),
    "layers.{i}.mlp.down_proj": _Linear(_MLP + ".down", "embed", "mlp"),
    "lm_head": _Linear("head", "vocab", "embed", "logits"),
}
# where a family has q, k and v in one module, and gate and up
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_NOT_FUSED = ("k_proj", "v_proj", "up_proj")
# of a block, by their position
_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_HEAD_NORMS = ("layers.{i}.self_attn.q_norm", "layers.{i}.self_attn.k_norm")


def rules_from_plan(plan: str | Mapping[str, str], config: ModelConfig, *, sequence_parallel: bool = False) -> Rules:
    """The rules that a plan means: "auto" is the model's own; a dict leaves what it does not name replicated.

    Of several globs that match a module the last one counts; a leading "model." is ignored.
    Raises ValueError for an unknown style, a glob that matches nothing, and styles that cannot stand together. Warns of
    linear layers that the plan leaves unsharded without saying `replicate`.
    """
    if isinstance(plan, str):
        if plan != "auto":
            raise ValueError(f'tp_plan={plan!r}: a plan is "auto" or a dict of globs to styles ({", ".join(STYLES)})')
        return Rules().sequence_parallel() if sequence_parallel else Rules()
    if config.experts:
        raise ValueError('tp_plan: experts are laid out by expert_layout; a mixture of experts takes "auto"')
    styles = _match(plan, config)
    overrides: dict[str, Axes] = {}
    chosen: dict[str, tuple[str, str]] = {}
    for pattern, linear in _linears(config).items():
        for i in range(config.num_layers) if "{i}" in pattern else (0,):
            module, path = pattern.format(i=i), linear.path.format(i=i)
            if config.tie_word_embeddings and module == "lm_head":
                path = "embed"
            if module not in styles and path in chosen and path == "embed":
                continue  # the tied head follows the embedding
            style = styles.get(module, "replicate")
            other, before = chosen.get(path, (module, style))
            if before != style and not {before, style} <= {"embedding_rowwise", "colwise", "colwise_gather_output"}:
                raise ValueError(f"{other} is {before} but {module} is {style}: they are one weight here and need one style")
            chosen[path] = (module, style)
            overrides[path] = (*overrides.get(path, ()), *_table(linear, style, module))
    forgotten = sorted(
        {
            p
            for p in _modules(config, _linears(config))
            if p not in styles and not (p == "lm_head" and config.tie_word_embeddings)
        }
    )
    if forgotten:
        warnings.warn(f"the tp_plan leaves these unsharded: {', '.join(_generic(forgotten))}", stacklevel=3)
    rules = Rules(overrides=tuple(overrides.items()))
    return rules.sequence_parallel() if sequence_parallel or _sequence_parallel(styles, config) else rules


def plan_of(rules: Rules, config: ModelConfig) -> dict[str, str]:
    """The plan that these rules are, in Hugging Face's form, with layers written as `*` where all are alike."""
    found: dict[str, str] = {}
    for pattern, linear in _linears(config).items():
        if pattern == "lm_head" and config.tie_word_embeddings:
            linear = _Linear("embed", "vocab", "embed", "logits")
        each = [_style(rules, linear, linear.path.format(i=i)) for i in range(config.num_layers)]
        if "{i}" in pattern and len(set(each)) > 1:
            found.update({pattern.format(i=i): style for i, style in enumerate(each)})
        else:
            found[pattern.format(i="*")] = each[0]
    if rules.axis("sequence"):
        found.update({pattern.format(i="*"): "sequence_parallel" for pattern in _norms(config)})
    return found


def _match(plan: Mapping[str, str], config: ModelConfig) -> dict[str, str]:
    """Every module that the plan names, with its style in our vocabulary."""
    known = _modules(config, (*_linears(config), *_norms(config), *(_HEAD_NORMS if config.qk_norm else ())))
    styles: dict[str, str] = {}
    for glob, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"tp_plan[{glob!r}]={style!r} is no style; styles: {', '.join(STYLES)}")
        matched = [module for module in known if fnmatchcase(module, glob.removeprefix("model."))]
        if not matched:
            raise ValueError(f"tp_plan: {glob!r} matches no module; modules: {', '.join(_generic(known))}")
        styles.update(dict.fromkeys(matched, STYLES[style]))
    return styles


def _linears(config: ModelConfig) -> dict[str, _Linear]:
    """The linear layers of a model, by their names."""
    if not FAMILIES[config.model_type].fused:
        return _LINEARS
    found = {}
    for pattern, linear in _LINEARS.items():
        block, _, name = pattern.rpartition(".")
        if name not in _NOT_FUSED:
            found[f"{block}.{_FUSED[name]}" if name in _FUSED else pattern] = linear
    return found


def _norms(config: ModelConfig) -> tuple[str, ...]:
    """Those over the residual stream."""
    return (*(f"layers.{{i}}.{name}" for name in _NORMS[config.norm_position]), "norm")


def _modules(config: ModelConfig, patterns: Mapping[str, object] | tuple[str, ...]) -> list[str]:
    layers = range(config.num_layers)
    return [name for p in patterns for name in ([p.format(i=i) for i in layers] if "{i}" in p else [p])]


def _generic(modules: list[str]) -> list[str]:
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in modules))


def _table(linear: _Linear, style: str, module: str) -> Axes:
    cut_out, cut_in = (
        style in ("colwise", "colwise_gather_output", "embedding_rowwise"),
        style in ("rowwise", "embedding_colwise"),
    )
    if (style.startswith("embedding") and module != "embed_tokens") or style == "sequence_parallel":
        raise ValueError(f"tp_plan: {module} cannot be {style}")
    if module == "embed_tokens" and style == "rowwise":  # transformers' older name: by rows of the table
        cut_out, cut_in = True, False
    table: list[tuple[str, str | None]] = [(linear.out, "tp" if cut_out else None), (linear.into, "tp" if cut_in else None)]
    if linear.activation:
        table.append((linear.activation, "tp" if style == "colwise" else None))
    return tuple(table)


def _style(rules: Rules, linear: _Linear, path: str) -> str:
    table = path == "embed"
    if rules.axis(linear.out, path):
        gathered = linear.activation and not rules.axis(linear.activation, path)
        return "colwise_gather_output" if gathered else "embedding_rowwise" if table and not linear.activation else "colwise"
    if rules.axis(linear.into, path):
        return "embedding_colwise" if table else "rowwise"
    return "replicate"


def _sequence_parallel(styles: Mapping[str, str], config: ModelConfig) -> bool:
    norms = _modules(config, _norms(config))
    named = [norm for norm in norms if styles.get(norm) == "sequence_parallel"]
    if named and len(named) < len(norms):
        missing = _generic([norm for norm in norms if norm not in named])
        raise ValueError(
            f"tp_plan: sequence_parallel holds for the whole residual stream; it is missing on {', '.join(missing)}"
        )
    return bool(named)
