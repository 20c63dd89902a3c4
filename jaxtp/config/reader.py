"""The reader of a `config.json`: from its content to the arguments of a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtp.checks import INT32, number, whole
from jaxtp.config.experts import ExpertKeys, Experts
from jaxtp.config.families import FAMILIES, Family, family_of, text_part
from jaxtp.config.keys import ACTIVATIONS, DTYPE_NAMES, DTYPES, FIXED, HARMLESS, NUMBERS
from jaxtp.config.quantization import Schemes
from jaxtp.config.quantization import read as read_schemes
from jaxtp.config.rope import Rope, respelled, rope_of

_LAYERS = _FULL, _SLIDING = "full_attention", "sliding_attention"


def read(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ModelConfig`. `overrides` replaces keys first; the value None removes one.

    Raises ValueError for whatever is not implemented, or of another type than it must be.
    """
    found = respelled(text_part(raw))
    for key, value in respelled(overrides).items():
        found.pop(key, None)
        if value is not None:
            found[key] = value
    model_type = family_of(found.get("model_type"), found.get("architectures"))
    experts = FAMILIES[model_type].experts
    if experts:
        other = {"num_experts", "num_local_experts"}.difference((experts.count,)).pop()  # transformers writes either
        said = found.pop(other, None)
        if said is not None and found.setdefault(experts.count, said) != said:
            raise ValueError(f"{experts.count}={found[experts.count]!r} and {other}={said!r}: which?")
    return _Reader({**FAMILIES[model_type].defaults, **found}).arguments(model_type)


class _Reader:
    """Takes settings out of a raw config one by one; whatever is left at the end was not understood."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def arguments(self, model_type: str) -> dict[str, Any]:
        family = FAMILIES[model_type]
        heads, hidden, layers = (self.whole(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        bias = self.flag("attention_bias") if family.qkv_bias is None else False
        max_position = self.whole("max_position_embeddings", 2048)
        experts = self.experts(family.experts, layers) if family.experts else None
        rotated = self.rotated(family, layers)
        made = {
            "model_type": model_type,
            "vocab_size": self.whole("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.whole("intermediate_size", experts.width if experts else None),
            "experts": experts,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", heads),
            "head_dim": self.whole("head_dim", hidden // max(heads, 1)),
            "max_position_embeddings": max_position,
            "rms_norm_eps": self.number("rms_norm_eps", 1e-6),
            "rope": self.rope(family, max_position),
            "local_rope": self.local_rope(family),
            "rotated": rotated,
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
            "o_bias": bias if family.o_bias is None else family.o_bias,
            "mlp_bias": self.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
            "qk_norm": family.qk_norm,
            "qk_norm_across_heads": family.qk_norm_across_heads,
            "norm_position": family.norm_position,
            "norm_form": family.norm_form,
            "activation": self.activation(family),
            "scaled_embedding": family.scaled_embedding,
            "windows": self.windows(family, layers, rotated),
            **self.numbers(family),
            "bos_token_id": self.token("bos_token_id", self.raw.get("bos_token_id")),
            "eos_token_ids": token_ids("eos_token_id", self.raw.get("eos_token_id")),
            "dtype": self.dtype(),
            "schemes": self.schemes(),
        }
        said = self.take("qkv_bias")
        if said not in (None, made["qkv_bias"]):
            raise ValueError(f"qkv_bias={said!r} is not supported for this model_type; supported: {made['qkv_bias']}")
        self.refuse_the_rest()
        return made

    # -- one value -----------------------------------------------------------------------------------------------------

    def take(self, key: str, default: Any = None) -> Any:
        value = self.raw.pop(key, None)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if value is None:
            raise ValueError(f"lacks {key}")
        return count(key, value)

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not number(value):
            raise ValueError(f"{key}={value!r} must be a number")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r} must be true or false")
        return value

    @staticmethod
    def token(key: str, value: Any) -> int | None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{key}={value!r} must be an int or null")
        return value

    def dtype(self) -> str | None:
        value = self.raw.get("dtype") or self.raw.get("torch_dtype")
        if value is None or value == "auto":
            return None
        if not isinstance(value, str) or value not in DTYPE_NAMES:
            raise ValueError(f"dtype {value!r} is not supported; supported: {DTYPES}")
        return DTYPE_NAMES[value]

    def schemes(self) -> Schemes | None:
        said = self.take("quantization_config")
        return None if said is None else read_schemes(said)

    # -- experts -------------------------------------------------------------------------------------------------------

    def experts(self, keys: ExpertKeys, layers: int) -> Experts:
        """Those of the sparse layers."""
        renormalize = self.flag("norm_topk_prob") if keys.renormalize is None else keys.renormalize
        return Experts(
            count=self.whole(keys.count),
            per_token=self.whole("num_experts_per_tok"),
            # where experts are as wide as a dense layer would be, that is read once more below
            width=count(keys.width, self.raw.get(keys.width)) if keys.width == "intermediate_size" else self.whole(keys.width),
            renormalize=renormalize,
            shared=self.whole("shared_expert_intermediate_size") if keys.shared else 0,
            dense=self.dense(layers) if keys.layers else (),
            balance=self.number("router_aux_loss_coef", 0.001),
        )

    def dense(self, layers: int) -> tuple[int, ...]:
        """Which layers have no experts, as transformers chooses them."""
        step, dense = count("decoder_sparse_step", self.take("decoder_sparse_step", 1)), self.take("mlp_only_layers", [])
        if not isinstance(dense, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in dense):
            raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers' numbers")
        return tuple(i for i in range(layers) if i in dense or (i + 1) % step)

    # -- numbers that a family has ---------------------------------------------------------------------------------------

    def numbers(self, family: Family) -> dict[str, float | None]:
        """Multipliers, scales and soft caps."""
        found: dict[str, float | None] = {}
        for ours, theirs in NUMBERS.items():
            if theirs in family.keys:
                value = self.take(theirs)
                if not (number(value) or (value is None and "softcap" in ours)):
                    raise ValueError(f"{theirs}={value!r} must be a number")
                found[ours] = value
        if "query_pre_attn_scalar" in family.keys:
            found["attention_scale"] = self.whole("query_pre_attn_scalar") ** -0.5
        return found

    def activation(self, family: Family) -> str:
        """Of the gate. Gemma's configs name it under two keys, and the first ones say gelu where they mean its tanh form."""
        legal = {"hidden_act": {*ACTIVATIONS}}
        if family.activation:
            mine = {theirs for theirs, ours in ACTIVATIONS.items() if ours == family.activation}
            legal = {"hidden_act": {*mine, "gelu"}, "hidden_activation": mine}
        said = {key: self.take(key) for key in legal}
        for key, value in said.items():
            if value is not None and not (isinstance(value, str) and value in legal[key]):
                raise ValueError(f"{key}={value!r} is not supported; supported: {sorted(legal[key])}")
        return family.activation or ACTIVATIONS[said["hidden_act"] or "silu"]

    # -- rotary embedding ------------------------------------------------------------------------------------------------

    def rope(self, family: Family, max_position: int) -> Rope:
        """Of layers that see everything, or of all."""
        scaling = dict(self.take("rope_scaling", {}))
        outside, inside = self.take("partial_rotary_factor", 1.0), scaling.pop("partial_rotary_factor", None)
        partial = outside if inside is None else inside
        if not number(partial):
            raise ValueError(f"partial_rotary_factor={partial!r} must be a number")
        if partial != 1 and "partial_rotary_factor" not in family.keys:
            raise ValueError(f"partial_rotary_factor={partial!r} is not supported for this model_type")
        kinds = {key: scaling[key] for key in ("type", "rope_type") if key in scaling}
        if family.ropes:
            for key, kind in kinds.items():
                if kind in ("su", "yarn") and "longrope" in family.ropes:  # what Phi-3 called it first
                    scaling[key] = "longrope"
                elif kind not in (*family.ropes, None):
                    raise ValueError(f"rope type {kind!r} is not supported for this model_type; supported: {family.ropes}")
        original = self.take("original_max_position_embeddings")
        theta = self.take("rope_theta", 10000.0)
        return rope_of(theta, scaling, max_position=max_position, original=original, partial=partial)

    def local_rope(self, family: Family) -> Rope | None:
        """Of layers with a window, where they have their own."""
        if "rope_local_base_freq" not in family.keys:
            return None
        return rope_of(self.take("rope_local_base_freq"), {}, max_position=1, original=None)

    def rotated(self, family: Family, layers: int) -> tuple[bool, ...]:
        """Which layers have RoPE at all."""
        if "no_rope_layers" not in family.keys:
            return (True,) * layers
        interval = count("no_rope_layer_interval", self.take("no_rope_layer_interval", 4))
        named = self.take("no_rope_layers")
        if named is None:
            return tuple((i + 1) % interval != 0 for i in range(layers))
        if not (isinstance(named, list | tuple) and len(named) >= layers and all(each in (0, 1) for each in named)):
            raise ValueError(f"no_rope_layers={named!r} must be a list of a 1 (RoPE) or a 0 (none) for each of {layers} layers")
        return tuple(bool(each) for each in named[:layers])

    # -- several -------------------------------------------------------------------------------------------------------

    def windows(self, family: Family, layers: int, rotated: tuple[bool, ...]) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        switch, kinds = self.raw.pop("use_sliding_window", None), self.take("layer_types")
        if switch is not None and not isinstance(switch, bool):
            raise ValueError(f"use_sliding_window={switch!r} must be true or false")
        if kinds is not None and not (isinstance(kinds, list | tuple) and len(kinds) == layers):
            raise ValueError(f"layer_types={kinds!r} must be a list of one for each of {layers} layers")
        if kinds is not None and any(kind not in _LAYERS for kind in kinds):
            raise ValueError(f"layer_types must name {' or '.join(_LAYERS)} alone, not {kinds}")
        if switch and not (family.windowed or family.window_switch):
            raise ValueError("use_sliding_window=True is not supported for this model_type")
        if family.window_pattern is not None:
            return self._windows_by_layer(family, layers, kinds)
        used = family.windowed or (family.window_switch and switch)
        if not used and (family.window_switch or switch is False):
            self.raw.pop("sliding_window", None)  # switched off, whatever its size
        window = self.raw.pop("sliding_window", None) if used else None
        window = None if window is None else count("sliding_window", window)
        if family.window_switch and used:
            first = count("max_window_layers", self.take("max_window_layers", 28), least=0)
            chosen = (
                [not turns for turns in rotated] if "no_rope_layers" in family.keys else [i >= first for i in range(layers)]
            )
            kinds = kinds or [_SLIDING if sliding else _FULL for sliding in chosen]
            return tuple(window if kind == _SLIDING else None for kind in kinds)
        every = _SLIDING if window else _FULL
        if kinds and {*kinds} != {every}:
            raise ValueError(
                f"layer_types names others than {every}, which this model_type and sliding_window make every layer"
            )
        return (window,) * layers

    def _windows_by_layer(self, family: Family, layers: int, kinds: Any) -> tuple[int | None, ...]:
        """Where `layer_types` or a pattern chooses the layers."""
        window, same = self.take("sliding_window"), self.take("sliding_window_size")
        if same not in (None, window):
            raise ValueError(f"sliding_window={window!r} and sliding_window_size={same!r}: which?")
        window = None if window is None else count("sliding_window", window)
        pattern = family.window_pattern or 0
        if "sliding_window_pattern" in family.keys:
            pattern = count("sliding_window_pattern", self.take("sliding_window_pattern", pattern))
        if not pattern:
            kinds = kinds or [_SLIDING if window else _FULL] * layers
        kinds = kinds or [_SLIDING if (i + 1) % pattern else _FULL for i in range(layers)]
        if window is None and _SLIDING in kinds:
            raise ValueError(f"layers are of the type {_SLIDING}, which needs sliding_window")
        return tuple(window if kind == _SLIDING else None for kind in kinds)

    def refuse_the_rest(self) -> None:
        for key, legal in FIXED.items():
            if key in self.raw and self.raw[key] not in legal:
                raise ValueError(f"{key}={self.raw[key]!r} is not supported; supported: {list(legal)}")
        known = HARMLESS.union(FIXED)
        unknown = sorted(k for k, v in self.raw.items() if v is not None and k not in known and not k.startswith("_"))
        if unknown:
            shown = ", ".join(f"{k}={self.raw[k]!r}" for k in unknown)
            raise ValueError(
                f"settings that jaxtp does not know: {shown}. Where they do not change the computation, "
                f"remove them with overrides (hf_overrides), e.g. {{{unknown[0]!r}: None}}"
            )


def count(key: str, value: Any, *, least: int = 1) -> int:
    """An int that a device can count to. Raises ValueError for anything else."""
    try:
        return whole(key, value, least=least, most=INT32)
    except TypeError as error:
        raise ValueError(str(error)) from None


def token_ids(key: str, value: Any) -> tuple[int, ...]:
    """One id, several, or none (null). Raises ValueError for anything else."""
    found = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise ValueError(f"{key}={value!r} must be an int, a list of them, or null")
    return found
