"""LoRA adapters in PEFT's format, both ways: a folder with adapter_config.json and adapter_model.safetensors.

An adapter of the module `model.layers.3.self_attn.q_proj`, whose weight is [O, I], is two matrices, A [r, I] and B [O, r];
what it adds to the weight is scale · B A, where scale is alpha / r, or alpha / √r with rslora.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtp.checkpoint import hf
from jaxtp.checkpoint.names import Index
from jaxtp.checkpoint.shards import write_tensors
from jaxtp.checkpoint.tensors import FLOATS
from jaxtp.files import read_object
from jaxtp.log import logger

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KERNELS = (*TARGETS, "w1", "w3", "w2")  # the last three: of Mixtral's experts
FUSED = ("qkv_proj", "gate_up_proj")  # some families', merged at load; training knows none of them yet
TABLES = ("embed_tokens", "lm_head")  # merged at load; training leaves them alone
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ALL = slice(None)

# Settings of PEFT that make of an adapter more than scale · B A, or another thing
_OTHERS = (
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("megatron_config",),
)
# First values that leave the base's weights as they are; after the others (pissa, olora, ...) the base is another one
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# Settings that say how the adapter was made or trained, and change nothing of what it is
_OF_TRAINING = (
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
)
_READ = (
    *("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern"),
)

Shape = tuple[int, ...]
Merge = Callable[[Index, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: which modules have one, of which rank and scale. All names and patterns mean what they do to PEFT.

    rank 0: none at all. targets: modules by the end of their names: `q_proj`, or `layers.3.self_attn.q_proj`. rank_pattern,
    alpha_pattern: what differs from rank and alpha, by regular expressions for the end of names; the first that fits holds.
    rslora: scale by alpha / √rank (arXiv:2312.03732) in place of alpha / rank.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be at least 0")
        unknown = [target for target in self.targets if _kind(target) not in KERNELS + FUSED + TABLES]
        if unknown or not self.targets:
            raise ValueError(
                f"lora.targets={list(self.targets)} must be some of {', '.join(KERNELS)}, or single modules such as "
                "layers.3.self_attn.q_proj"
            )
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, value in patterns.items():
                if name == "rank_pattern" and value < 1:
                    raise ValueError(f"lora.rank_pattern: the rank of {pattern!r} is {value}; it must be at least 1")
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"lora.{name}: {pattern!r} is no regular expression: {error}") from None

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter; 0 where it has none."""
        named = any(module == target or module.endswith(f".{target}") for target in self.targets)
        return _first(self.rank_pattern, module, self.rank) if self.rank and named else 0

    def scale_of(self, module: str) -> float:
        """What B A is multiplied with, in a module that has an adapter."""
        alpha, rank = _first(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def told(self) -> dict[str, Any]:
        """What a checkpoint says of the adapters that it holds."""
        found = {"lora_rank": self.rank, "lora_alpha": self.alpha, "lora_targets": ", ".join(sorted(self.targets))}
        more = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern", "rslora")}
        return {**found, **{f"lora_{name}": value for name, value in more.items() if value}}


class Adapter:
    """An adapter folder, read and found to fit a model."""

    def __init__(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        """shapes: of all tensors of the model's checkpoint, by name.

        Raises FileNotFoundError where a file is missing, and ValueError for settings that are not supported, by their key,
        and for tensors that do not fit the model, all of them at once.
        """
        self.folder = folder
        self._shapes = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
        self.lora = _settings(folder, list(self._shapes))
        self.modules = [module for module in self._shapes if self.lora.rank_of(module)]
        if "lm_head" not in self._shapes and any(map(_looked_up, self.modules)):
            raise _refused(folder, "target_modules", "names embed_tokens, which this model has in one table with its head")
        self._tensors = self._read()

    def matrices(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """(A [r, I], B [O, r]) of a module, in the dtype of the file."""
        a, b = (self._tensors[name] for name in self._names(module))
        return (b.T, a.T) if _looked_up(module) else (a, b)

    def merges(self) -> dict[str, Merge]:
        """For each tensor of the checkpoint that the adapter changes: what makes of a block, read as it is in the file, the
        merged one, in float32. Only what of the sum lies in the block is computed.
        """
        return {f"{module}.weight": self._merge(module) for module in self.modules}

    def _merge(self, module: str) -> Merge:
        (a, b), scale = (m.astype(np.float32) for m in self.matrices(module)), np.float32(self.lora.scale_of(module))
        own = self._tensors.get(_copy_of(module))  # PEFT saves a table that has an adapter with it

        def merge(index: Index, block: np.ndarray) -> np.ndarray:
            rows, columns = index
            return (block if own is None else own[index]).astype(np.float32) + scale * (b[rows] @ a[:, columns])

        return merge

    def _names(self, module: str) -> tuple[str, str]:
        """The names of A and B in the file."""
        if _looked_up(module):
            return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
        return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"

    def _read(self) -> dict[str, np.ndarray]:
        path = self.folder / WEIGHTS
        if not path.exists():
            pickled = "; adapter_model.bin is pickled, and never loaded" * (self.folder / "adapter_model.bin").exists()
            raise FileNotFoundError(f"{self.folder} has no {WEIGHTS}{pickled}: save the adapter as safetensors")
        wanted: dict[str, Shape] = {}
        for module in self.modules:
            (rows, columns), rank = self._shapes[module], self.lora.rank_of(module)
            rows, columns = (columns, rows) if _looked_up(module) else (rows, columns)
            wanted |= dict(zip(self._names(module), ((rank, columns), (rows, rank)), strict=True))
        with hf.Tensors(self.folder, [path]) as tensors:
            copies = {_copy_of(m): self._shapes[m] for m in self.modules if _kind(m) in TABLES and _copy_of(m) in tensors}
            wanted |= copies
            problems = hf.misfits(
                tensors,
                {name: (shape, tuple(FLOATS)) for name, shape in wanted.items()},
                [name for name in tensors if name not in wanted],
            )
            if problems:
                raise ValueError(f"the tensors in {path} do not fit its {CONFIG} and this model: {problems}")
            return {name: tensors.read(name, (_ALL, _ALL)) for name in wanted}


def write(
    folder: Path, lora: Lora, matrices: Mapping[str, tuple[np.ndarray, np.ndarray]], *, base: str, tokenizer: Path | None
) -> None:
    """Writes an adapter folder that PEFT loads. matrices: (A, B) of each module. base: the model that it is for, a folder or
    hub id. tokenizer: a folder whose tokenizer goes with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b) in matrices.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    write_tensors(folder / WEIGHTS, tensors)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": _number(lora.alpha), "lora_dropout": 0.0, "target_modules": list(lora.targets),
        "rank_pattern": lora.rank_pattern, "alpha_pattern": {k: _number(v) for k, v in lora.alpha_pattern.items()},
        "use_rslora": lora.rslora, "use_dora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "modules_to_save": None,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    if tokenizer:
        hf.copy_tokenizer(tokenizer, folder)


def _settings(folder: Path, modules: list[str]) -> Lora:
    """What an adapter's config says of a model of these modules; targets are spelled out where they are a pattern."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no adapter folder as PEFT writes them")
    found = read_object(path)
    if found.get("peft_type") != "LORA":
        raise _refused(folder, "peft_type", f"is {found.get('peft_type')!r}; LORA is supported")
    if found.get("bias", "none") != "none":
        raise _refused(folder, "bias", f"is {found['bias']!r}; adapters without biases are supported")
    for key in _OTHERS:
        if found.get(key):
            raise _refused(folder, key, f"is {found[key]!r}, which is not supported")
    init = found.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise _refused(
            folder, "init_lora_weights", f"is {init!r}, for a base whose weights were changed with it; save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )  # fmt: skip
    unknown = [key for key, value in found.items() if value and key not in _READ + _OTHERS + _OF_TRAINING]
    if unknown:
        logger.warning("%s: %s, unknown here, changed nothing", path, ", ".join(unknown))
    try:
        adapted = _adapted(found, modules)
        if not adapted:
            raise _refused(folder, "target_modules", f"is {found.get('target_modules')!r}, which names no kernel of this model")
        return Lora(
            rank=_positive(found, "r", int),
            alpha=_positive(found, "lora_alpha", float),
            targets=_shortest(adapted, modules),
            rank_pattern=_fitting(found.get("rank_pattern"), adapted),
            alpha_pattern=_fitting(found.get("alpha_pattern"), adapted),
            rslora=bool(found.get("use_rslora")),
        )
    except (TypeError, re.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _adapted(found: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The modules that have an adapter, by PEFT's rules."""
    targets: Any = found.get("target_modules") or ()
    excluded = found.get("exclude_modules")
    layers, names = _list(found.get("layers_to_transform")), _list(found.get("layers_pattern")) or [r"[^.]*"]

    def layer(module: str) -> int | None:
        at = next(filter(None, (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)), None)
        return int(at[1]) if at else None

    def has(module: str) -> bool:
        if _kind(module) not in KERNELS + FUSED + TABLES or (excluded and _named(excluded, module)):
            return False
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return _kind(module) in KERNELS + FUSED
        if not _named(targets, module):
            return False
        return isinstance(targets, str) or module in targets or not layers or layer(module) in layers

    return [module for module in modules if has(module)]


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | str) else list(value or ())


def _named(names: Any, module: str) -> bool:
    """Whether a regular expression (a string) fits all of a module's name, or one of a list is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shortest(adapted: list[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Targets that name these modules: a kind where all of its modules are among them, else each by its whole name."""
    every: dict[str, list[str]] = {}
    for module in modules:
        every.setdefault(_kind(module), []).append(module)
    some = set(adapted)
    found: list[str] = []
    for kind in KERNELS + FUSED + TABLES:
        mine = [module for module in every.get(kind, []) if module in some]
        found += [kind] if mine and len(mine) == len(every[kind]) else mine
    return tuple(found)


def _fitting(patterns: Any, modules: Iterable[str]) -> dict[str, Any]:
    """The patterns that fit a module at all."""
    return {pattern: value for pattern, value in (patterns or {}).items() if any(fits(pattern, module) for module in modules)}


def fits(pattern: str, module: str) -> bool:
    """Whether a pattern of ranks or alphas is for a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if fits(pattern, module)), default)


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _looked_up(module: str) -> bool:
    """Whether PEFT keeps the adapter of a table [V, D] as that of a layer from V to D."""
    return _kind(module) == "embed_tokens"


def _copy_of(module: str) -> str:
    return f"{_PREFIX}{module}.base_layer.weight"


def _number(value: float) -> float | int:
    """alpha as PEFT writes it."""
    return int(value) if value == int(value) else value


def _positive(found: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = found.get(key, 8)  # PEFT's default of both
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value != kind(value):
        raise TypeError(f"{key} is {value!r}, not a number above 0")
    return kind(value)


def _refused(folder: Path, key: str, why: str) -> ValueError:
    return ValueError(f"{folder / CONFIG}: {key} {why}")
