"""Weights in few bits: which scheme each linear module of a checkpoint has, from its `quantization_config`, or made at load.

A scheme says what a kernel's values are and which of them share a scale; how files hold that is `checkpoint.formats`. A
setting that is not understood is refused by name, as everywhere in a config.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Values = Literal["int4", "int8", "fp8", "nf4"]
Method = Literal["awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes"]  # of checkpoints
Made = Literal["int8", "fp8", "int4"]  # of 16 bits, at load
Quantization = Literal["int8", "fp8", "int4", "awq", "gptq", "compressed-tensors", "fbgemm_fp8", "bitsandbytes"]
Activations = Literal["static", "dynamic"]


@dataclass(frozen=True)
class Scheme:
    """How a kernel of O outputs and I inputs is kept.

    values: int4 and int8, fp8 (e4m3), or nf4, the numbers of the 16 levels of arXiv:2305.14314. group: inputs that share a
    scale; None: all of an output. least: where groups would be smaller, because they do not divide the inputs, an output is one
    group. block: outputs that share a scale as well, which a device has all of. zeros: values count from a point of each group.
    activations: for products of fp8 with fp8, scaled by one number of the checkpoint, or by each token's largest. ordered: the
    inputs of a group do not stand beside each other (GPTQ's desc_act). rounded: what values and scales make, whatever the
    model's dtype.
    """

    values: Values
    group: int | None = None
    least: int = 1
    block: int = 1
    zeros: bool = False
    activations: Activations | None = None
    ordered: bool = False
    rounded: Literal["bfloat16", "float16"] | None = None

    def inputs(self, inputs: int) -> int:
        """Of so many inputs, those of a group as it is held: all groups are of one size."""
        found = math.gcd(self.group or inputs, inputs)
        return inputs if found < self.least else found

    def groups(self, inputs: int) -> int:
        """Of so many inputs."""
        return inputs // self.inputs(inputs)

    @property
    def bits(self) -> int:
        """Of a value."""
        return 4 if self.values in ("int4", "nf4") else 8


@dataclass(frozen=True)
class Schemes:
    """Which scheme each module has. method: of the checkpoint; None: 16-bit weights are rounded at load, to `name`.

    rows: (a module's name, its end, "re:" and an expression, or Linear, which is all) -> scheme, the first that fits. plain:
    modules without, said in the same way. layout: what else a method's reader must know. said: as config.json has it.
    """

    name: Quantization
    method: Method | None
    rows: tuple[tuple[str, Scheme], ...]
    plain: tuple[str, ...] = ()
    layout: str = ""
    said: str = ""

    def of(self, module: str) -> Scheme | None:
        """That of a module, e.g. "model.layers.0.self_attn.q_proj"; None: its weight is as it is without."""
        return _found(self, module)

    def without(self, modules: Sequence[str]) -> Schemes:
        """The same where these modules have none."""
        return replace(self, plain=(*self.plain, *modules))

    @property
    def kinds(self) -> tuple[Scheme, ...]:
        """Every scheme that a module may have."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.rows))


@functools.lru_cache(1 << 17)  # experts have tens of thousands of modules, which are asked for several times
def _found(schemes: Schemes, module: str) -> Scheme | None:
    if any(_fits(name, module) for name in schemes.plain):
        return None
    return next((scheme for name, scheme in schemes.rows if _fits(name, module)), None)


def _fits(name: str, module: str) -> bool:
    if name == "Linear":
        return True
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return f".{name}." in f".{module}."


def made(quantization: Made) -> Schemes:
    """Of 16-bit weights, rounded to the nearest at load: a scale a channel, int4 in groups of 128 inputs."""
    kinds = {"int8": Scheme("int8"), "fp8": Scheme("fp8"), "int4": Scheme("int4", group=128, least=32)}
    return Schemes(quantization, None, (("Linear", kinds[quantization]),))


def chosen(quantization: str | None, found: Schemes | None) -> Schemes | None:
    """What is meant by an argument, with a checkpoint that has `found`. Raises ValueError where they contradict each other."""
    if quantization is not None and quantization not in get_args(Quantization):
        raise ValueError(f"quantization={quantization!r} is not supported; supported: {', '.join(get_args(Quantization))}")
    if quantization is None or (found and quantization == found.name):
        return found
    if found:
        raise ValueError(
            f"quantization={quantization!r}: the weights are quantized already, as {found.name}; leave it out, or take the "
            "checkpoint of 16 bits"
        )
    if quantization not in get_args(Made):
        raise ValueError(
            f"quantization={quantization!r}: config.json has no quantization_config, so that its weights are of 16 bits or "
            f"more, which are rounded at load to {', '.join(get_args(Made))}"
        )
    return made(quantization)  # type: ignore[arg-type]


# -- quantization_config ---------------------------------------------------------------------------------------------------


def read(said: Any) -> Schemes:
    """Those of a `quantization_config`. Raises ValueError for what is not understood."""
    if not isinstance(said, Mapping):
        raise ValueError(f"quantization_config={said!r} must be an object")
    method = said.get("quant_method")
    if method in _REFUSED:
        raise ValueError(f"quantization_config: quant_method={method!r} is not supported; {_REFUSED[method]}")
    if method not in _READERS:
        raise ValueError(f"quantization_config: quant_method={method!r} is not supported; supported: {', '.join(_READERS)}")
    try:
        return replace(_READERS[method](said), said=json.dumps(dict(said), sort_keys=True))
    except ValueError as error:
        raise ValueError(f"quantization_config ({method}): {error}") from None


_16_BITS = "take the checkpoint of 16 bits, with quantization='int4', 'fp8' or 'int8'"
_REFUSED = {
    "mxfp4": f"XLA multiplies no 4-bit floats; {_16_BITS}",
    "gguf": f"GGUF is read by llama.cpp; {_16_BITS}",
    "hqq": _16_BITS,
    "aqlm": _16_BITS,
    "quip": _16_BITS,
    "eetq": _16_BITS,
    "torchao": _16_BITS,
    "modelopt": _16_BITS,
    "quark": _16_BITS,
}


def _awq(said: Mapping[str, Any]) -> Schemes:
    _only(said, bits=(4, None), version=("gemm", "GEMM", None))
    scheme = Scheme("int4", group=_group(said.get("group_size", 128)), zeros=_flag(said, "zero_point", True))
    return Schemes("awq", "awq", (("Linear", scheme),), plain=_modules(said, "modules_to_not_convert"))


def _gptq(said: Mapping[str, Any]) -> Schemes:
    _only(said, bits=(4, 8), lm_head=(False, None), pack_dtype=("int32", None), dynamic=({}, None))
    _only(said, checkpoint_format=("gptq", "gptq_v2", "", None))
    values: Values = "int4" if said["bits"] == 4 else "int8"
    scheme = Scheme(
        values,
        group=_group(said.get("group_size", 128)),
        zeros=not _flag(said, "sym", True),
        ordered=_flag(said, "desc_act", False),
    )
    plain = _modules(said, "modules_in_block_to_quantize", nested=True)
    if plain:
        raise ValueError("modules_in_block_to_quantize is not supported: all linear modules of the blocks, or none")
    return Schemes("gptq", "gptq", (("Linear", scheme),), layout=said.get("checkpoint_format") or "gptq")


def _fp8(said: Mapping[str, Any]) -> Schemes:
    _only(said, fmt=("e4m3", None), activation_scheme=("static", "dynamic", None))
    block = said.get("weight_block_size")
    plain = _modules(said, "modules_to_not_convert") + _modules(said, "ignored_layers")
    if block is None:
        return Schemes("fp8", "fp8", (("Linear", Scheme("fp8", activations=said.get("activation_scheme"))),), plain=plain)
    rows, columns = _block(block)
    return Schemes("fp8", "fp8", (("Linear", Scheme("fp8", group=columns, block=rows)),), plain=plain, layout="block")


def _fbgemm(said: Mapping[str, Any]) -> Schemes:
    scheme = Scheme("fp8", activations="dynamic")
    return Schemes("fbgemm_fp8", "fbgemm_fp8", (("Linear", scheme),), plain=_modules(said, "modules_to_not_convert"))


def _bitsandbytes(said: Mapping[str, Any]) -> Schemes:
    plain = _modules(said, "llm_int8_skip_modules")
    if said.get("load_in_8bit"):
        return Schemes("bitsandbytes", "bitsandbytes", (("Linear", Scheme("int8")),), plain=plain, layout="int8")
    _only(said, bnb_4bit_quant_type=("nf4",), bnb_4bit_quant_storage=("uint8", None))
    dtype = said.get("bnb_4bit_compute_dtype")
    scheme = Scheme("nf4", group=64, rounded=dtype if dtype in ("bfloat16", "float16") else None)
    return Schemes("bitsandbytes", "bitsandbytes", (("Linear", scheme),), plain=plain, layout="nf4")


_PACKED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed(said: Mapping[str, Any]) -> Schemes:
    for key in ("sparsity_config", "transform_config"):
        if said.get(key):
            raise ValueError(f"{key} is not supported; {_16_BITS}")
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("lacks config_groups")
    rows = []
    for name, group in groups.items():
        form = group.get("format") or said.get("format")
        if form not in _PACKED:
            raise ValueError(f"{name}: format={form!r} is not supported; supported: {', '.join(_PACKED)}; {_16_BITS}")
        scheme = _scheme(name, group)
        rows += [(target, scheme) for target in group.get("targets") or ["Linear"]]
    return Schemes("compressed-tensors", "compressed-tensors", tuple(rows), plain=_modules(said, "ignore"))


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = weights.get("type"), weights.get("num_bits")
    kinds: dict[Any, Values] = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}
    if kind not in kinds:
        raise ValueError(f"{name}: weights of type {kind[0]!r} and {kind[1]!r} bits are not supported; {_16_BITS}")
    strategy, size, rows = weights.get("strategy"), None, 1
    if strategy == "group":
        size = _group(weights.get("group_size"))
    elif strategy == "block":
        rows, size = _block(weights.get("block_structure"))
    elif strategy not in ("channel", "tensor", None):
        raise ValueError(f"{name}: strategy={strategy!r} is not supported; supported: tensor, channel, group, block")
    activations: Activations | None = None
    if inputs and kind[0] == "float" and inputs.get("num_bits") == 8 and strategy in ("channel", "tensor"):
        activations = "dynamic" if inputs.get("dynamic") else "static"
    return Scheme(
        kinds[kind],
        group=size,
        block=rows,
        zeros=weights.get("symmetric") is False,
        activations=activations,
        ordered=weights.get("actorder") in ("group", True),
    )


_READERS = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "bitsandbytes": _bitsandbytes,
}


def _only(said: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if said.get(key) not in values:
            known = ", ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{key}={said.get(key)!r} is not supported; supported: {known}")


def _flag(said: Mapping[str, Any], key: str, default: bool) -> bool:
    value = said.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return value


def _group(size: Any) -> int | None:
    """Inputs that share a scale; all where it is -1."""
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ValueError(f"group_size={size!r} must be a number of inputs, or -1 for all")
    return None if size == -1 else size


def _block(size: Any) -> tuple[int, int]:
    whole = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if not whole:
        raise ValueError(f"a block of {size!r} must be two numbers, of outputs and inputs")
    return size[0], size[1]


def _modules(said: Mapping[str, Any], key: str, nested: bool = False) -> tuple[str, ...]:
    names = said.get(key) or ()
    names = [name for inner in names for name in inner] if nested else names
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}={names!r} must be names of modules")
    return tuple(name.removeprefix("model.language_").removeprefix("language_model.") for name in names)
