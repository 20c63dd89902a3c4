"""Rotary position embedding in a config: its kinds, and how Hugging Face spells them (4: `rope_theta` and `rope_scaling`;
5: `rope_parameters`). The frequencies are computed in `ops.rope`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtp.checks import INT32, number
from jaxtp.config.keys import ROPE_HARMLESS
from jaxtp.log import logger


@dataclass(frozen=True)
class Kind:
    """The fields of `Rope` that one kind needs, and those that it may have."""

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


KINDS = {
    "default": Kind(),
    "linear": Kind(("factor",)),
    "dynamic": Kind(("factor",), ("original_max_position",)),
    "llama3": Kind(("factor", "low_freq_factor", "high_freq_factor", "original_max_position")),
    "yarn": Kind(
        ("factor", "original_max_position"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": Kind(("factor", "original_max_position", "short_factor", "long_factor"), ("attention_factor",)),
}
ROPE_TYPES = tuple(KINDS)


# Our field -> Hugging Face's key.
KEYS = {
    "theta": "rope_theta",
    "factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_BY_LAYER = ("full_attention", "sliding_attention")
_LISTS = ("short_factor", "long_factor")
_STRETCHED = ("llama3", "yarn", "longrope")  # kinds that know the context of pre-training


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, named as in `transformers.modeling_rope_utils`.

    `kind` is one of `ROPE_TYPES`. `partial_rotary_factor` is the share of head_dim, its first part, that turns.
    `original_max_position` is the context length of pre-training (`llama3`, `yarn`, `longrope`). The fields after it belong to
    one kind each and are None (take the kind's default) elsewhere; `short_factor` and `long_factor` have a number for each pair
    of turned channels.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float | None = None
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor} must be above 0 and at most 1")
        for name in _LISTS:
            if any(not 0 < value < math.inf for value in getattr(self, name) or ()):
                raise ValueError(f"{name} in rope_scaling must hold numbers above 0")
        if self.kind == "longrope" and not (self.original_max_position or 0) > 1:
            raise ValueError(
                f"rope type 'longrope' needs original_max_position_embeddings above 1, not {self.original_max_position}"
            )
        above = ("theta", "factor", "original_max_position", "low_freq_factor", "high_freq_factor")
        least = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        for name in above + least:
            value = getattr(self, name)
            if value is not None and not (value >= 0 and (value > 0 or name in least) and value < math.inf):
                raise ValueError(f"{KEYS[name]}={value} must be {'at least' if name in least else 'above'} 0 and finite")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low and high and low >= high:
            raise ValueError(f"low_freq_factor={low} must be below high_freq_factor={high}")

    def turned(self, head_dim: int) -> int:
        """Channels of a head that turn: its first."""
        return int(head_dim * self.partial_rotary_factor)

    def check(self, head_dim: int) -> None:
        """Raises ValueError where it cannot turn heads of that size."""
        turned = self.turned(head_dim)
        if turned % 2 or not turned:
            of = f" · partial_rotary_factor={self.partial_rotary_factor}" if self.partial_rotary_factor != 1 else ""
            raise ValueError(f"head_dim={head_dim}{of} must be even: rotary embedding turns pairs")
        for name in _LISTS:
            found = getattr(self, name)
            if found is not None and len(found) != turned // 2:
                raise ValueError(
                    f"{name} in rope_scaling has {len(found)} numbers; {turned} channels turn, in {turned // 2} pairs"
                )

    @property
    def attention_scale(self) -> float:
        """What `yarn` and `longrope` multiply cos and sin by."""
        assert self.factor
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":  # arXiv:2402.13753, §3.3
            assert self.original_max_position
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position)) if self.factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def context(self, max_position: int) -> int:
        """Tokens that positions turned so are good for, as vLLM counts them; `llama3` has its factor in `max_position`."""
        if self.kind not in ("linear", "dynamic", "yarn"):
            return max_position
        assert self.factor
        unscaled = self.original_max_position if self.kind == "yarn" else max_position
        assert unscaled
        return max(max_position, int(min(unscaled * self.factor, INT32)))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALING = {ours: theirs for ours, theirs in KEYS.items() if ours != "theta"}


def respelled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config, or what is laid over one, with RoPE as transformers 4 has it.

    As there, `rope_scaling` stands for the whole of `rope_parameters` where it says anything, and a base inside of either
    counts before `rope_theta`. Raises ValueError where one is no object.
    """
    out = dict(raw)
    spelled = [key for key in ("rope_scaling", "rope_parameters") if key in out]
    found = {key: out.pop(key) for key in spelled}
    for key, value in found.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r} must be an object, such as {{'rope_type': 'linear', 'factor': 2.0}}, or null")
    scaling = dict(next(filter(None, found.values()), {}))
    if scaling and not {*scaling} - {*_BY_LAYER}:  # transformers 5, of a model whose layers have two of them
        each = {kind: scaling[kind] or {} for kind in _BY_LAYER if kind in scaling}
        if not all(isinstance(rope, Mapping) for rope in each.values()):
            raise ValueError(f"rope_parameters={scaling!r} must hold an object for each type of layers")
        scaling, local = dict(each.get("full_attention", {})), each.get("sliding_attention", {})
        if local.get("rope_theta") is not None:
            out["rope_local_base_freq"] = local["rope_theta"]
        if local.get("rope_type") not in (None, "default"):
            raise ValueError(
                f"rope_parameters: sliding_attention has the rope type {local['rope_type']!r}; only default is supported"
            )
    theta = scaling.pop("rope_theta", None)
    if theta is not None:
        out["rope_theta"] = theta
    if spelled:
        out["rope_scaling"] = scaling
    return out


def rope_of(theta: Any, scaling: Mapping[str, Any], *, max_position: int, original: Any, partial: float = 1.0) -> Rope:
    """The Rope of a config spelled by `respelled`. original, partial: `original_max_position_embeddings` and
    `partial_rotary_factor`, where they stand outside.

    Raises ValueError for a kind, or a setting of it, that is not known.
    """
    params = {key: value for key, value in scaling.items() if value is not None and key not in ROPE_HARMLESS}
    legacy = params.pop("type", None)
    kind = params.pop("rope_type", legacy) or "default"
    if legacy not in (None, kind):
        raise ValueError(f"rope_scaling has rope_type {kind!r} and type {legacy!r}: which?")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {ROPE_TYPES}")
    relative = params.pop("attn_factor", None) if kind == "yarn" else None
    values = {ours: params.pop(theirs, None) for ours, theirs in _SCALING.items()}
    if original is not None and kind in _STRETCHED:
        values["original_max_position"] = original
    if params:
        raise ValueError(f"unknown rope settings {sorted(params)}")
    if not isinstance(values["truncate"], bool | None):
        raise ValueError(f"truncate={values['truncate']!r} in rope_scaling must be true or false")
    for name in _LISTS:
        listed = values[name]
        if listed is not None and not (isinstance(listed, list | tuple) and all(map(number, listed))):
            raise ValueError(f"{name}={listed!r} in rope_scaling must be a list of numbers")
        values[name] = None if listed is None else tuple(map(float, listed))
    given = {theirs: values[ours] for ours, theirs in _SCALING.items() if ours not in ("truncate", *_LISTS)}
    given |= {"rope_theta": theta, "attn_factor": relative}
    for key, value in given.items():
        if value is not None and not number(value):
            raise ValueError(f"{key}={value!r} must be a number")
    if kind in _STRETCHED:
        trained = values["original_max_position"]
        values["original_max_position"] = max_position if trained is None else trained
        if kind != "llama3" and values["factor"] is None and (trained or kind == "longrope"):
            values["factor"] = max_position / (trained or max_position)
    used = KINDS[kind]
    for name in used.needs:
        if values[name] is None:
            raise ValueError(f"rope type {kind!r} needs {_SCALING[name]}")
    # the pre-training context may stand beside any kind, and a factor of 1 scales nothing
    idle = {"original_max_position", "factor"} if values["factor"] in (None, 1) else {"original_max_position"}
    wrong = [name for name, v in values.items() if v is not None and name not in (*used.needs, *used.may, *idle)]
    if wrong:
        raise ValueError(f"rope type {kind!r} has no use for {', '.join(_SCALING[name] for name in wrong)}")
    used_values = {name: values[name] for name in (*used.needs, *used.may)}
    rope = Rope(theta=float(theta), kind=kind, partial_rotary_factor=float(partial), **used_values)
    return rope if relative is None else _relative(rope, float(relative))


def _relative(rope: Rope, factor: float) -> Rope:
    """With `attn_factor`: a factor on YaRN's own attention factor, as vLLM reads it and whoever writes it means it."""
    if rope.attention_factor is not None:
        raise ValueError("rope_scaling has attention_factor and attn_factor: which?")
    scale = round(rope.attention_scale * factor, 12)
    logger.warning(
        "rope_scaling: attn_factor %g makes the attention factor %g, as in vLLM; transformers ignores this key and takes %g "
        "(hf_overrides may replace rope_scaling)", factor, scale, rope.attention_scale,
    )  # fmt: skip
    return dataclasses.replace(rope, attention_factor=scale)


def rope_to_hf(rope: Rope, *, max_position: int) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and what stands beside them, as transformers 4 and 5 read them."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    values = {theirs: getattr(rope, ours) for ours, theirs in _SCALING.items()}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
    if rope.kind != "longrope":
        return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **values}}
    # transformers 4 takes three fields and no more, under these names, and the context of pre-training beside them
    trained = values.pop("original_max_position_embeddings")
    if rope.factor == max_position / trained:
        del values["factor"]
    scaling = {"type": rope.kind, **values}
    return {"rope_theta": rope.theta, "original_max_position_embeddings": trained, "rope_scaling": scaling}
