"""Hugging Face checkpoints (safetensors), both ways, one weight at a time.

Every process reads only the slices that its own devices hold, straight into their dtype. Pickled weights (`.bin`) are
never opened.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxtp.checkpoint.formats import Linear, reader
from jaxtp.checkpoint.names import EMBED, HEAD, KERNELS, Index, Part, made_of
from jaxtp.checkpoint.names import tensors as tensors_of
from jaxtp.checkpoint.shards import Writer
from jaxtp.checkpoint.tensors import FLOATS, Tensors, text_part
from jaxtp.config import DTYPES, ModelConfig
from jaxtp.config.quantization import Schemes
from jaxtp.files import local
from jaxtp.log import console, interactive, logger
from jaxtp.ops.quantized import Quantized
from jaxtp.sharding import fetch
from jaxtp.weights import variables

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tiktoken.model"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
)
DEMO = Path(__file__).parents[1] / "demo"  # made by configs/train/demo.yaml
CacheScales = tuple[tuple[float, float], ...]  # of keys and of values in 8 bits, by layer; none: there are none
_SCALES = (".k_scale", ".k_proj.output_scale"), (".v_scale", ".v_proj.output_scale")  # as checkpoints name them
_ROWS = 8192  # of a table, compared at a time
_DOWNLOAD = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve(model: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, "demo" the one that ships with the package, a hub id ("org/name")
    downloaded (HF_TOKEN is honoured).

    Raises FileNotFoundError where there is no such folder and no such repository can be had, and ValueError for the address of
    a remote one.
    """
    path, name = local(model), str(model)
    if name == "demo" and not (path / "config.json").exists():  # any other folder of that name is not meant
        return DEMO
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file; a checkpoint is the folder that holds config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no checkpoint folder {path} (nor is it a hub id, which has the form org/name, or demo)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOAD)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {path}, and {name} could not be had from the hub: {' '.join(str(error).split())}"
        ) from error


def config_of(folder: Path, *, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The config of a checkpoint folder, with what its weights alone can say: their dtype, where config.json has none (the
    first one's, as in transformers); which modules are not quantized, although it says that all are; and that they hold two
    tables where config.json says that embedding and head are one. Both are used then, with a warning, as in transformers.

    Raises as `ModelConfig.from_hf` and `Tensors`, but for weights that are not there: a plan needs none.
    """
    config = ModelConfig.from_hf(folder, overrides=overrides)
    if config.dtype and not config.tie_word_embeddings and not config.schemes:
        return config
    try:
        with text_part(Tensors(folder)) as tensors:
            if config.schemes and config.schemes.method:
                config = replace(config, schemes=config.schemes.without(_plain(tensors, config.schemes)))
            first = next((FLOATS[found] for found in map(tensors.dtype, tensors) if found in FLOATS), None)
            config = replace(config, dtype=config.dtype or (first if first in DTYPES else None))
            if config.tie_word_embeddings and not _one_table(tensors, config.dtype or "float32"):
                logger.warning(
                    "%s says tie_word_embeddings, but the weights hold %s and %s with different values: they are not tied. "
                    "tie_word_embeddings: false in config.json says so", folder / "config.json", EMBED, HEAD
                )  # fmt: skip
                config = replace(config, tie_word_embeddings=False)
    except FileNotFoundError:
        pass
    return config


def _plain(tensors: Tensors, schemes: Schemes) -> list[str]:
    """The modules that the files hold in 16 bits or more, whatever config.json says of them."""
    names = [name for name in tensors if name.endswith(".weight") and name not in (EMBED, HEAD)]
    floats = [name for name in names if tensors.dtype(name) in FLOATS and len(tensors.shape(name)) == 2]
    return [module for module in (name.removesuffix(".weight") for name in floats) if schemes.of(module)]


def _one_table(tensors: Tensors, dtype: str) -> bool:
    """Whether embedding and head are the same in that dtype, or one of them is not there."""
    if EMBED not in tensors or HEAD not in tensors or not tensors.shape(EMBED):
        return True
    if (shape := tensors.shape(EMBED)) != tensors.shape(HEAD):
        return False
    rows = shape[0]

    def block(name: str, start: int) -> np.ndarray:
        return tensors.read(name, (slice(start, min(start + _ROWS, rows)),)).astype(jnp.dtype(dtype))

    return all(np.array_equal(block(EMBED, start), block(HEAD, start)) for start in range(0, rows, _ROWS))


def shapes(model: nnx.Module, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's checkpoint: their names and shapes."""
    found = (made_of(config, path, weight) for path, weight in variables(model))
    return {part.name: part.whole(each) for each, rows in found for part in sum(rows, ())}


def load(
    model: nnx.Module,
    config: ModelConfig,
    folder: Path,
    *,
    schemes: Schemes | None,
    keep: Callable[[str, nnx.Variable, jax.Array], Any],
    merges: Mapping[str, Callable[[Index, np.ndarray], np.ndarray]] | None = None,
    progress: bool = True,
) -> CacheScales:
    """Fills an abstract model's weights from a checkpoint folder, in place. schemes: how it is quantized; kernels
    that the model has in few bits are kept so, others become what the bits stand for. keep(path, weight, array): what of one is
    kept.
    merges: makes of a block of the tensor of that name, as it is in the file, the block that is meant. Returns the scales that
    it brings for keys and values in 8 bits.

    Raises ValueError listing all missing, unexpected and mis-shaped tensors at once, before any is read.
    """
    weights = dict(variables(model))
    found = {path: made_of(config, path, weight) for path, weight in weights.items()}
    with text_part(Tensors(folder)) as tensors, _bar(progress) as bar:
        if config.tie_word_embeddings and HEAD in tensors and EMBED not in tensors:
            tensors.rename(HEAD, EMBED)  # one table, under its other name
        linears = _linears(tensors, schemes, found)
        _check(tensors, config, folder, shapes(model, config), linears)

        def read(name: str, index: Index) -> np.ndarray:
            block = linears[name].plain(*index) if name in linears else tensors.read(name, index)
            return merges[name](index, block) if merges and name in merges else block

        total = sum(_bytes(w.get_value()) for w in weights.values())
        task = bar.add_task(f"loading {folder.name}", total=total)
        for path, weight in weights.items():
            abstract = weight.get_value()
            if isinstance(abstract, Quantized):
                weight.set_value(_quantized(linears, abstract, *found[path]))
            else:
                weight.set_value(keep(path, weight, _read(read, abstract, *found[path])))
            bar.advance(task, _bytes(abstract))
        return _cache_scales(tensors, config.num_layers)


def _cache_scales(tensors: Tensors, layers: int) -> CacheScales:
    """Of keys and of values, for each layer; none where not every layer has one number for each."""
    found = []
    for i in range(layers):
        names = [
            [f"model.layers.{i}.self_attn{end}" for end in ends if f"model.layers.{i}.self_attn{end}" in tensors]
            for ends in _SCALES
        ]
        each = [tensors.read(name[0], ...) for name in names if name]
        if len(each) < 2 or any(a.size != 1 for a in each):
            return ()
        found.append((float(each[0].reshape(())), float(each[1].reshape(()))))
    return tuple(found)


def _linears(
    tensors: Tensors, schemes: Schemes | None, found: Mapping[str, tuple[tuple[int, ...], list[tuple[Part, ...]]]]
) -> dict[str, Linear]:
    """The readers of those modules that the checkpoint holds in few bits, by the name that their weights would have."""
    if schemes is None or schemes.method is None:
        return {}
    kernels = [rows for path, rows in found.items() if path.rpartition(".")[2] in KERNELS]
    parts = {part.name: (part, each) for each, rows in kernels for row in rows for part in row if schemes.of(part.module)}
    return {name: reader(tensors, part.module, schemes, part.whole(each)) for name, (part, each) in parts.items()}


def _quantized(
    linears: Mapping[str, Linear], abstract: Quantized, each: tuple[int, ...], rows: list[tuple[Part, ...]]
) -> Quantized:
    """A kernel as the checkpoint has it, one array after another."""
    groups = (*each[:-1], abstract.groups)

    def values(name: str, index: Index) -> np.ndarray:
        return linears[name].values(*index)

    def scale(name: str, index: Index) -> np.ndarray:
        return linears[name].scale(*index)

    def shift(name: str, index: Index) -> np.ndarray:
        return linears[name].scale(*index) * linears[name].zeros(*index)

    def of_modules(like: Any, one: Callable[[list[Linear]], np.ndarray]) -> jax.Array:
        """What all modules of a layer have together, of each layer of a stack."""
        found = [one([linears[part.name] for part in row]) if row else None for row in rows]
        filled = np.stack([np.zeros(like.shape[1:], like.dtype) if a is None else a for a in found])
        whole = filled.astype(like.dtype).reshape(like.shape)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])

    return Quantized(
        _read(values, abstract.values, each, rows),
        _read(scale, abstract.scale, groups, rows),
        abstract.scheme,
        None if abstract.shift is None else _read(shift, abstract.shift, groups, rows),
        None if abstract.input_scale is None else of_modules(abstract.input_scale, _largest),
        None if abstract.order is None else of_modules(abstract.order, _one_order),
    )


def _largest(linears: list[Linear]) -> np.ndarray:
    return np.float32(max(linear.input_scale() for linear in linears))  # type: ignore[return-value]


def _one_order(linears: list[Linear]) -> np.ndarray:
    first, *others = linears
    for linear in others:
        if not np.array_equal(linear.order, first.order):
            raise ValueError(
                f"{linear.module} and {first.module} are one weight here, but group the inputs in different orders (g_idx)"
            )
    return first.order


def _read(
    read: Callable[[str, Index], np.ndarray],
    abstract: Any,
    each: tuple[int, ...],
    rows: list[tuple[Part, ...]],
) -> jax.Array:
    """A weight whose rows are of the shape `each` and made of the tensors that `read` reads, as `made_of` says."""
    blocks: dict[str, np.ndarray] = {}  # devices that hold the same block share one reading

    def block(index: Any) -> np.ndarray:
        if str(index) not in blocks:
            shape = [len(range(*s.indices(n))) for s, n in zip(index, abstract.shape, strict=True)]
            out = np.zeros(shape, abstract.dtype)
            stacked = len(each) < len(shape)
            held, inner = (rows[index[0]], index[1:]) if stacked else (rows, index)
            for row, parts in zip(out if stacked else [out], held, strict=True):
                for part in parts:
                    part.read(row, inner, each, functools.partial(read, part.name))
            blocks[str(index)] = out
        return blocks[str(index)]

    array = jax.make_array_from_callback(abstract.shape, abstract.sharding, block, dtype=abstract.dtype)
    return jax.block_until_ready(array)  # before the host copies go


def save(model: nnx.Module, config: ModelConfig, folder: Path, *, source: Path | None, max_shard_bytes: int) -> None:
    """Writes a folder that `transformers` loads: weights, index, config, generation config and, from `source`, tokenizer.

    Weights are gathered one at a time. Only the first process writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writes = jax.process_index() == 0
    writer = Writer(folder, max_shard_bytes) if writes else None
    for path, weight in variables(model):
        host = fetch(weight.get_value())
        each, rows = made_of(config, path, weight)
        held = zip(host.reshape(-1, *each), rows, strict=True)
        for name, tensor in itertools.chain(*(tensors_of(parts, row).items() for row, parts in held)):
            if writer:
                writer.add(name, tensor)
    if writer:
        writer.finish()
        dtype = jnp.dtype(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype).name
        (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": dtype}, indent=2) + "\n")
        copy_beside(folder, config, source)


def copy_beside(folder: Path, config: ModelConfig, source: Path | None) -> None:
    """The generation config into a checkpoint's folder, and the tokenizer of the folder that it was made of."""
    generation, own = folder / "generation_config.json", source is not None and source.resolve() == folder.resolve()
    if not (own and generation.exists()):  # one that stands there else is of another model
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.to_hf()["eos_token_id"]}
        generation.write_text(json.dumps(ids, indent=2) + "\n")
    if source is None or own:
        return
    copy_tokenizer(source, folder)
    if (source / generation.name).exists():
        shutil.copyfile(source / generation.name, generation)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files of a folder into another; not their permissions, which may be a reader's alone."""
    for pattern in TOKENIZER_FILES:
        for path in filter(Path.is_file, source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _check(
    tensors: Tensors,
    config: ModelConfig,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    linears: Mapping[str, Linear],
) -> None:
    # buffers that old exports carry, and a second copy of a tied table
    known = {HEAD} if config.tie_word_embeddings else set()
    wanted = {name: (shape, tuple(FLOATS)) for name, shape in shapes.items() if name not in linears}
    for linear in linears.values():
        wanted |= {f"{linear.module}.{end}": needed for end, needed in linear.needed().items()}
        known |= {f"{linear.module}.{end}" for end in linear.optional}
        bias = f"{linear.module}.bias"  # GPTQ's old files have one of zeros
        known |= {bias} if bias not in wanted and bias in tensors and not tensors.read(bias, (slice(None),)).any() else set()
    known |= {name for name in tensors if linears and name.endswith(sum(_SCALES, ()))}
    extra = [name for name in tensors if name not in wanted and name not in known and not name.endswith("rotary_emb.inv_freq")]
    problems = misfits(tensors, wanted, extra)
    if problems:
        tie = '; where the embedding is the head as well: hf_overrides={"tie_word_embeddings": True}'
        hint = tie if HEAD in shapes and HEAD not in tensors and EMBED in tensors else ""
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {problems}{hint}")


def misfits(tensors: Tensors, wanted: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]], extra: Sequence[str]) -> str:
    """What of the tensors is missing, unexpected (`extra`), or not of the shape and dtypes `wanted`; empty where nothing is."""
    missing = [name for name in wanted if name not in tensors]
    there = {name: needed for name, needed in wanted.items() if name in tensors}
    wrong = [
        f"{name} is {tensors.shape(name)}, expected {shape}"
        for name, (shape, _) in there.items()
        if tensors.shape(name) != shape
    ]
    coded = [
        f"{name} is {tensors.dtype(name)}" + f", expected {' or '.join(dtypes)}" * (dtypes != tuple(FLOATS))
        for name, (_, dtypes) in there.items()
        if tensors.dtype(name) not in dtypes
    ]
    problems = [
        f"{title}: {', '.join(found[:20])}{f' and {len(found) - 20} more' if len(found) > 20 else ''}"
        for title, found in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", wrong),
            ("of no dtype that is read", coded),
        )
        if found
    ]
    return "; ".join(problems)


def _bytes(abstract: Any) -> int:
    return sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(abstract))


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not (shown and interactive()), transient=True, console=console)
