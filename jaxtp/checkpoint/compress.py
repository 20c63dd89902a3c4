"""Writes a checkpoint of 16 bits as a quantized one, in the format of compressed-tensors: vLLM, transformers and jaxtp load it.

Tensors are read, rounded to the nearest and written one at a time: neither the model nor a GPU need hold it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxtp.checkpoint import hf
from jaxtp.checkpoint.names import HEAD, kernels
from jaxtp.checkpoint.shards import Writer
from jaxtp.checkpoint.tensors import Tensors, text_part
from jaxtp.config.quantization import Scheme
from jaxtp.files import local, read_object
from jaxtp.log import console, interactive
from jaxtp.ops.quantized import quantize as rounded

SchemeName = Literal["w4a16", "w8a16", "fp8"]
GROUPS = 128, 64, 32  # inputs, the first that divides those of all modules; else an output is one group
MAX_SHARD_BYTES = 5 * 10**9


def quantize(model: str | Path, folder: str | Path, *, scheme: SchemeName = "w4a16", revision: str | None = None) -> None:
    """Writes the checkpoint `model` (a folder or a hub id, of 16 or 32 bits) to `folder`, its linear modules in few bits: w4a16
    (int4 in groups of 128 inputs), w8a16 (int8, a scale for each output) or fp8 (e4m3, a scale for each output, activations
    scaled token by token where GPUs multiply fp8). Embedding, head, norms and routers stay as they are.

    Raises ValueError for a scheme that is not known, a checkpoint that is quantized already, and a folder that holds one.
    """
    if scheme not in get_args(SchemeName):
        raise ValueError(f"scheme={scheme!r} is none of {', '.join(get_args(SchemeName))}")
    source, target = hf.resolve(model, revision=revision), local(folder)
    config = hf.config_of(source)
    if config.schemes:
        raise ValueError(f"{source} is quantized already, as {config.schemes.name}; take the checkpoint of 16 bits")
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a checkpoint already; name another folder")
    with text_part(Tensors(source)) as tensors:
        named = kernels(config)
        linear = {name for name in tensors if named.fullmatch(name)}
        inputs = {tensors.shape(name)[1] for name in linear}
        group = next((size for size in GROUPS if all(n % size == 0 for n in inputs)), None) if scheme == "w4a16" else None
        chosen = _SCHEMES[scheme]
        target.mkdir(parents=True, exist_ok=True)
        writer = Writer(target, MAX_SHARD_BYTES)
        names = track([*tensors], f"quantizing {source.name}", disable=not interactive(), console=console, transient=True)
        for name in names:
            array = tensors.read(name, ...)
            made = _packed(name, array, replace(chosen, group=group)) if name in linear else [(name, array)]
            for found, tensor in made:
                writer.add(found, tensor)
    said = read_object(source / "config.json")
    said = config.to_hf() if "text_config" in said else said  # of a model of more than text, its text part
    writer.finish()
    said = {**said, "quantization_config": _config(scheme, group)}
    (target / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    hf.copy_beside(target, config, source)


_SCHEMES = {"w4a16": Scheme("int4"), "w8a16": Scheme("int8"), "fp8": Scheme("fp8")}


def _packed(name: str, array: np.ndarray, scheme: Scheme) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a linear module [O, I]."""
    module = name.removesuffix(".weight")
    made = jax.tree.map(np.asarray, rounded(jnp.asarray(array), scheme, held=array.dtype))
    if scheme.values == "fp8":
        yield name, made.values
    else:
        per, zero = 32 // scheme.bits, 1 << (scheme.bits - 1)
        values = (made.values.astype(np.int16) + zero).astype(np.uint32)
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % per))).reshape(len(values), -1, per)
        words = np.zeros(values.shape[:2], np.uint32)
        for place in range(per):
            words |= values[..., place] << np.uint32(place * scheme.bits)
        yield f"{module}.weight_packed", words.view(np.int32)
        yield f"{module}.weight_shape", np.asarray(array.shape, np.int64)
    yield f"{module}.weight_scale", made.scale


def _config(scheme: SchemeName, group: int | None) -> dict[str, Any]:
    """A `quantization_config` as compressed-tensors writes it."""
    chosen = _SCHEMES[scheme]
    kind, form = ("float", "float-quantized") if scheme == "fp8" else ("int", "pack-quantized")
    common = {"num_bits": chosen.bits, "type": kind, "symmetric": True}
    weights = {**common, "strategy": "group" if group else "channel", "group_size": group, "dynamic": False}
    inputs = {**common, "strategy": "token", "group_size": None, "dynamic": True} if scheme == "fp8" else None
    first = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": first},
        "ignore": [HEAD.removesuffix(".weight"), r"re:.*\.gate$", r"re:.*shared_expert_gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
