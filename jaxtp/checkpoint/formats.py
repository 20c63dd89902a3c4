"""How files hold linear modules in few bits: a reader for each `quant_method`, which gives any block of values and scales.

Values come as integers around 0 or as fp8, scales and zero points in float32; where groups are split on their way (a group that
does not divide the inputs), each part has its group's. Nothing is read but what lies in the block.

O outputs, I inputs, n groups as they are held.
"""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtp.checkpoint.names import Index
from jaxtp.checkpoint.tensors import FLOATS, Tensors
from jaxtp.config.quantization import Method, Scheme, Schemes
from jaxtp.ops.nf4 import LEVELS as NF4

Needed = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # a tensor's end of its name -> its shape, and dtypes it may have
WORD, _FLOATS, _FP8 = 32, tuple(FLOATS), ("F8_E4M3",)
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word's eight values in the order of the outputs, where each lies


class Linear(abc.ABC):
    """One module [O, I] of a checkpoint."""

    optional: tuple[str, ...] = ()  # tensors that may be there, and change nothing or are asked for
    index = "g_idx"  # the tensor that says each input's group, where they do not stand in order

    def __init__(self, tensors: Tensors, module: str, schemes: Schemes, scheme: Scheme, shape: tuple[int, ...]) -> None:
        self.tensors, self.module, self.scheme, self.layout = tensors, module, scheme, schemes.layout
        self.outputs, self.inputs = shape
        self.bits = scheme.bits
        self.per = WORD // self.bits  # values in a word
        self.zero = 1 << (self.bits - 1)
        self.on_disk = -(-self.inputs // (scheme.group or self.inputs))  # groups

    @abc.abstractmethod
    def needed(self) -> Needed:
        """The tensors that it is made of."""

    @abc.abstractmethod
    def values(self, rows: slice, columns: slice) -> np.ndarray:
        """[rows, columns] int8 or fp8."""

    @abc.abstractmethod
    def scale(self, rows: slice, groups: slice) -> np.ndarray:
        """[rows, groups] float32."""

    def zeros(self, rows: slice, groups: slice) -> np.ndarray:
        """The same of where values count from; of formats that do not say, 0."""
        return np.zeros((rows.stop - rows.start, groups.stop - groups.start), np.float32)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """[I] int32: the inputs, group by group."""
        return _by_group(self.read(self.index, ...), self.on_disk, self.scheme, f"{self.module}.{self.index}")

    def input_scale(self) -> float:
        """By which inputs are divided before they become fp8."""
        return float(self.read("input_scale", ...).reshape(-1)[0])

    def plain(self, rows: slice, columns: slice) -> np.ndarray:
        """What they stand for: [rows, columns] float32."""
        wanted, each = columns, self.scheme.inputs(self.inputs)
        if self.scheme.ordered:  # whose groups have inputs from everywhere
            columns = slice(0, self.inputs)
        held = slice(columns.start // each, -(-columns.stop // each))
        inside = np.arange(columns.start, columns.stop) // each - held.start
        values = self.values(rows, columns)
        found = np.asarray(NF4, np.float32)[values + self.zero] if self.scheme.values == "nf4" else values.astype(np.float32)
        scale = self.scale(rows, held)
        found *= scale[:, inside]
        if self.scheme.zeros:
            found -= (scale * self.zeros(rows, held))[:, inside]
        if self.scheme.rounded:
            found = found.astype(jnp.dtype(self.scheme.rounded)).astype(np.float32)
        return found[:, np.argsort(self.order)[wanted]] if self.scheme.ordered else found

    def read(self, end: str, index: Index | EllipsisType) -> np.ndarray:
        """A block of the tensor whose name ends so."""
        return self.tensors.read(f"{self.module}.{end}", index)

    def has(self, end: str) -> bool:
        """Whether there is one."""
        return f"{self.module}.{end}" in self.tensors

    def groups(self, held: slice) -> tuple[slice, np.ndarray]:
        """Of groups as they are held: those of the file that they are of, and which of these each is."""
        each = self.scheme.inputs(self.inputs)
        of = np.arange(held.start, held.stop) * each // (self.scheme.group or self.inputs)
        return slice(int(of[0]), int(of[-1]) + 1), of - of[0]

    def words(self, wanted: slice) -> tuple[slice, slice]:
        """Of values: the words that they lie in, and where in these."""
        first = wanted.start // self.per
        start = wanted.start - first * self.per
        return slice(first, -(-wanted.stop // self.per)), slice(start, start + wanted.stop - wanted.start)

    def unpacked_outputs(self, words: np.ndarray, order: tuple[int, ...] | None = None) -> np.ndarray:
        """Words [O/8, b] of values of eight outputs -> [O, b] int8, counted from the middle."""
        words = np.ascontiguousarray(words).view(np.uint32)
        made = np.empty((len(words), self.per, words.shape[1]), np.int8)
        for place, value in enumerate(order or range(self.per)):
            found = (words >> np.uint32(value * self.bits)).astype(np.uint8) & np.uint8((1 << self.bits) - 1)
            made[:, place] = (found - np.uint8(self.zero)).view(np.int8)
        return made.reshape(-1, words.shape[1])

    def unpacked_inputs(self, words: np.ndarray) -> np.ndarray:
        """Words [O, I/8] of values of eight inputs -> [O, I] int8, counted from the middle."""
        of_bytes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
        if self.bits == 8:
            return (of_bytes - np.uint8(self.zero)).view(np.int8)
        made = np.empty((len(words), 2 * of_bytes.shape[1]), np.int8)
        made[:, 0::2] = ((of_bytes & 15) - np.uint8(self.zero)).view(np.int8)
        made[:, 1::2] = ((of_bytes >> 4) - np.uint8(self.zero)).view(np.int8)
        return made


class _Awq(Linear):
    """qweight [I, O/8], qzeros [n, O/8], scales [n, O]; eight outputs in a word."""

    def needed(self) -> Needed:
        n, words = self.on_disk, self.outputs // self.per
        zeros: Needed = {"qzeros": ((n, words), ("I32",))} if self.scheme.zeros else {}
        return {"qweight": ((self.inputs, words), ("I32",)), "scales": ((n, self.outputs), _FLOATS), **zeros}

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        words, mine = self.words(rows)
        return self.unpacked_outputs(self.read("qweight", (columns, words)).T, AWQ)[mine]

    def scale(self, rows: slice, groups: slice) -> np.ndarray:
        of, each = self.groups(groups)
        return self.read("scales", (of, rows)).astype(np.float32)[each].T

    def zeros(self, rows: slice, groups: slice) -> np.ndarray:
        (of, each), (words, mine) = self.groups(groups), self.words(rows)
        return self.unpacked_outputs(self.read("qzeros", (of, words)).T, AWQ)[mine][:, each].astype(np.float32)


class _Gptq(_Awq):
    """qweight [I/8, O], qzeros [n, O/8], scales [n, O], g_idx [I]: eight (of 8 bits: four) inputs or zero points in a word. The
    first layout has zero points less 1.
    """

    optional = ("g_idx",)

    def needed(self) -> Needed:
        n, words = self.on_disk, self.outputs // self.per
        index: Needed = {"g_idx": ((self.inputs,), ("I32",))} if self.scheme.ordered else {}
        return {
            "qweight": ((self.inputs // self.per, self.outputs), ("I32",)),
            "qzeros": ((n, words), ("I32",)),
            "scales": ((n, self.outputs), _FLOATS),
            **index,
        }

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        if self.scheme.ordered:
            inputs = self.order[columns]
            return self.unpacked_inputs(self.read("qweight", (slice(None), rows)).T)[:, inputs]
        words, mine = self.words(columns)
        return self.unpacked_inputs(self.read("qweight", (words, rows)).T)[:, mine]

    def zeros(self, rows: slice, groups: slice) -> np.ndarray:
        (of, each), (words, mine) = self.groups(groups), self.words(rows)
        found = self.read("qzeros", (of, words)).view(np.uint32)
        if self.layout != "gptq_v2":  # 1 was taken from each point, and borrowed from the next one where it was 0
            found = found + np.uint32(sum(1 << shift for shift in range(0, WORD, self.bits)))
        return self.unpacked_outputs(found.T)[mine][:, each].astype(np.float32)


class _Compressed(Linear):
    """weight_packed [O, I/8] or weight [O, I], weight_scale [O, n], [blocks, n] or [1], weight_zero_point, weight_g_idx."""

    optional: tuple[str, ...] = ("weight_shape", "weight_g_idx", "input_scale", "output_scale", "weight_zero_point")
    scales: tuple[str, ...] = ("weight_scale",)
    index = "weight_g_idx"

    @property
    def packed(self) -> bool:
        """Whether several values lie in a word."""
        return self.has("weight_packed")

    def needed(self) -> Needed:
        shape, kinds = (self.outputs, self.inputs), _FP8 if self.scheme.values == "fp8" else ("I8",)
        weight: Needed = {"weight": (shape, kinds)}
        if self.scheme.values == "int4" or self.packed:
            weight = {"weight_packed": ((self.outputs, -(-self.inputs // self.per)), ("I32",))}
        if self.scheme.zeros:
            packed = -(-self.outputs // self.per) if self.packed else self.outputs
            weight["weight_zero_point"] = ((packed, self.on_disk), ("I32",) if self.packed else ("I8",))
        if self.scheme.ordered:
            weight["weight_g_idx"] = ((self.inputs,), ("I32", "I64"))
        if self.scheme.activations == "static":
            weight["input_scale"] = (self._shape("input_scale", ((), (1,))), _FLOATS)
        return weight | {self.scale_name: (self._shape(self.scale_name, self._scales()), _FLOATS)}

    @property
    def scale_name(self) -> str:
        """The end of the name of its scales."""
        return next(filter(self.has, self.scales), self.scales[0])

    def _scales(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that scales may have, the first of which is expected."""
        if self.scheme.block > 1:
            return ((-(-self.outputs // self.scheme.block), self.on_disk),)
        alone: tuple[tuple[int, ...], ...] = ((1,), ()) if self.scheme.group is None else ()
        return ((self.outputs, self.on_disk), *alone)

    def _shape(self, end: str, legal: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """Of those that a tensor may have, its own if that is among them."""
        own = self.tensors.shape(f"{self.module}.{end}") if self.has(end) else None
        return own if own in legal else legal[0]

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        if not self.packed:
            return self.read("weight", (rows, columns))
        if self.scheme.ordered:
            return self.unpacked_inputs(self.read("weight_packed", (rows, slice(None))))[:, self.order[columns]]
        words, mine = self.words(columns)
        return self.unpacked_inputs(self.read("weight_packed", (rows, words)))[:, mine]

    def scale(self, rows: slice, groups: slice) -> np.ndarray:
        of, each = self.groups(groups)
        shape, name = self.tensors.shape(f"{self.module}.{self.scale_name}"), self.scale_name
        if len(shape) < 2:  # one for all
            return np.full((rows.stop - rows.start, len(each)), self.read(name, ...).reshape(-1)[0], np.float32)
        block = self.scheme.block
        first = rows.start // block
        found = self.read(name, (slice(first, -(-rows.stop // block)), of)).astype(np.float32)[:, each]
        return found[np.arange(rows.start, rows.stop) // block - first]

    def zeros(self, rows: slice, groups: slice) -> np.ndarray:
        of, each = self.groups(groups)
        if not self.packed:
            return self.read("weight_zero_point", (rows, of)).astype(np.float32)[:, each]
        words, mine = self.words(rows)
        found = self.unpacked_outputs(self.read("weight_zero_point", (words, of)))[mine]
        return found.astype(np.float32)[:, each]


class _Fp8(_Compressed):
    """weight [O, I], and weight_scale_inv [O/128, I/128] (it multiplies all the same), or weight_scale [], [1] or [O, 1]."""

    optional = ("input_scale", "input_scale_ub", "output_scale")
    scales = ("weight_scale_inv", "weight_scale")

    @property
    def scale_name(self) -> str:
        return next(filter(self.has, self.scales), self.scales[self.scheme.block == 1])


class _Bytes(Linear):
    """bitsandbytes' LLM.int8(): weight [O, I], SCB [O], the largest of each output."""

    optional = ("weight_format",)

    def needed(self) -> Needed:
        return {"weight": ((self.outputs, self.inputs), ("I8",)), "SCB": ((self.outputs,), _FLOATS)}

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        return self.read("weight", (rows, columns))

    def scale(self, rows: slice, groups: slice) -> np.ndarray:
        return (self.read("SCB", (rows,)).astype(np.float32) / 127)[:, None]


class _Nf4(Linear):
    """bitsandbytes' NF4: weight [O·I/2, 1], two values in a byte, the first one high; weight.absmax, the largest of 64 values
    one after another, itself of 8 bits where it is quantized twice.
    """

    state = "weight.quant_state.bitsandbytes__nf4"
    optional = ("weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax", state)

    def needed(self) -> Needed:
        size, group = self.outputs * self.inputs, self.scheme.group or 1
        return {
            "weight": ((size // 2, 1), ("U8",)),
            "weight.absmax": ((size // group,), ("F32", "U8")),
            self.state: (self.tensors.shape(f"{self.module}.{self.state}") if self.has(self.state) else (1,), ("U8",)),
        }

    @functools.cached_property
    def checked(self) -> bool:
        """That its blocks are those of groups, and its levels NF4's. Raises ValueError where they are not."""
        where = f"{self.module}.weight"
        if self.inputs % (self.scheme.group or 1):
            raise ValueError(f"{where}: blocks of {self.scheme.group} values reach over the ends of its {self.inputs} inputs")
        if self.said.get("blocksize") != self.scheme.group:
            raise ValueError(f"{where}: blocks of {self.said.get('blocksize')} values are not supported; supported: 64")
        if self.has("weight.quant_map") and not np.allclose(self.read("weight.quant_map", ...), NF4, atol=1e-6):
            raise ValueError(f"{where}: its levels are not those of NF4")
        return True

    @functools.cached_property
    def said(self) -> Mapping[str, Any]:
        """What the module says of itself."""
        return dict(json.loads(self.read(self.state, ...).tobytes()))

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        assert self.checked
        pairs = self.read("weight", (slice(rows.start * self.inputs // 2, rows.stop * self.inputs // 2), slice(0, 1)))
        both = np.stack([pairs[:, 0] >> 4, pairs[:, 0] & 15], axis=1).astype(np.int8).reshape(-1, self.inputs)
        return both[:, columns] - np.int8(self.zero)

    def scale(self, rows: slice, groups: slice) -> np.ndarray:
        n = self.on_disk
        found = self.read("weight.absmax", (slice(rows.start * n, rows.stop * n),))
        if found.dtype == np.uint8:
            blocks = np.arange(rows.start * n, rows.stop * n) // int(self.said.get("nested_blocksize", 256))
            scales = self.read("weight.nested_absmax", ...)[blocks]
            found = self.read("weight.nested_quant_map", ...)[found] * scales + float(self.said.get("nested_offset", 0))
        return found.astype(np.float32).reshape(-1, n)[:, groups]


READERS: dict[Method, Mapping[str, type[Linear]]] = {  # by the layout that the config says, or any
    "awq": {"": _Awq},
    "gptq": {"": _Gptq},
    "compressed-tensors": {"": _Compressed},
    "fp8": {"": _Fp8},
    "fbgemm_fp8": {"": _Fp8},
    "bitsandbytes": {"int8": _Bytes, "nf4": _Nf4},
}


def reader(tensors: Tensors, module: str, schemes: Schemes, shape: tuple[int, ...]) -> Linear:
    """Of a module that has a scheme. shape: [O, I]."""
    scheme = schemes.of(module)
    assert scheme
    assert schemes.method
    kinds = READERS[schemes.method]
    return (kinds.get(schemes.layout) or kinds[""])(tensors, module, schemes, scheme, shape)


def _by_group(index: np.ndarray, groups: int, scheme: Scheme, name: str) -> np.ndarray:
    """The inputs, group by group, from each one's group. Raises ValueError where that is none, or groups differ in size."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{name} names the group {low if low < 0 else high}; there are {groups}")
    sizes = np.bincount(index, minlength=groups)
    if len(set(sizes.tolist())) > 1:
        raise ValueError(f"{name} has groups of {sizes.min()} to {sizes.max()} inputs; supported: all of {scheme.group}")
    return np.argsort(index, kind="stable").astype(np.int32)
