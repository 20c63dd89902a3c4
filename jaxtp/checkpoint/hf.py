"""Hugging Face checkpoints (safetensors), both ways, one weight at a time.

Every process reads only the slices that its own devices hold, straight into their dtype. Pickled weights (`.bin`) are
never opened.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtp.checkpoint.names import Index, Part, made_of
from jaxtp.config import ModelConfig
from jaxtp.log import console, interactive
from jaxtp.sharding import fetch, variables

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tiktoken.model"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
)
DEMO = Path(__file__).parents[1] / "demo"  # made by configs/train/demo.yaml
_FLOATS = ("F64", "F32", "BF16", "F16")
_DOWNLOAD = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve(model: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, "demo" the one that ships with the package, a hub id ("org/name")
    downloaded (HF_TOKEN is honoured).

    Raises FileNotFoundError where there is no such folder and no such repository can be had.
    """
    path, name = Path(model).expanduser(), str(model)
    if name == "demo" and not (path / "config.json").exists():  # any other folder of that name is not meant
        return DEMO
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no checkpoint folder {path} (nor is it a hub id, which has the form org/name, or demo)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOAD)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"there is no folder {path}, and {name} could not be had from the hub: {error}") from error


class Tensors:
    """The tensors of a checkpoint folder by name, read in slices."""

    def __init__(self, folder: Path) -> None:
        """Opens all files and reads their headers. Raises FileNotFoundError or ValueError naming the file at fault."""
        self._stack = ExitStack()
        self._file: dict[str, Any] = {}
        self._path: dict[str, Path] = {}
        for path in _files(folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="numpy"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} is missing, but {folder / INDEX} names it") from None
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or corrupt: {error}") from error
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self._file[name], self._path[name] = file, path

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; only the header is read."""
        return tuple(self._file[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype as the file says it, e.g. "BF16"."""
        return str(self._file[name].get_slice(name).get_dtype())

    def read(self, name: str, index: Index) -> np.ndarray:
        """A block of the tensor, in the dtype of the file."""
        try:
            return self._file[name].get_slice(name)[index]
        except SafetensorError as error:
            raise ValueError(f"{self._path[name]}: {name} cannot be read: {error}") from error


def load(
    model: nnx.Module, config: ModelConfig, folder: Path, *, keep: Callable[[str, jax.Array], Any], progress: bool = True
) -> None:
    """Fills an abstract model's weights from a checkpoint folder, in place. keep(path, array): what of a weight is kept.

    Raises ValueError listing all missing, unexpected and mis-shaped tensors at once, before any is read.
    """
    weights = dict(variables(model))
    found = {path: made_of(config, path, weight) for path, weight in weights.items()}
    with Tensors(folder) as tensors, _bar(progress) as bar:
        _check(
            tensors, config, folder, {part.name: part.shape(each) for each, rows in found.values() for part in sum(rows, ())}
        )
        total = sum(_bytes(w.get_value()) for w in weights.values())
        task = bar.add_task(f"loading {folder.name}", total=total)
        for path, weight in weights.items():
            abstract = weight.get_value()
            weight.set_value(keep(path, _read(tensors, abstract, *found[path])))
            bar.advance(task, _bytes(abstract))


def _read(tensors: Tensors, abstract: jax.ShapeDtypeStruct, each: tuple[int, ...], rows: list[tuple[Part, ...]]) -> jax.Array:
    """A weight whose rows are of the shape `each` and made of these tensors, as `made_of` says."""
    blocks: dict[str, np.ndarray] = {}  # devices that hold the same block share one reading

    def block(index: Any) -> np.ndarray:
        if str(index) not in blocks:
            shape = [len(range(*s.indices(n))) for s, n in zip(index, abstract.shape, strict=True)]
            out = np.zeros(shape, abstract.dtype)
            stacked = len(each) < len(shape)
            held, inner = (rows[index[0]], index[1:]) if stacked else (rows, index)
            for row, parts in zip(out if stacked else [out], held, strict=True):
                for part in parts:
                    part.read(row, inner, each, functools.partial(tensors.read, part.name))
            blocks[str(index)] = out
        return blocks[str(index)]

    array = jax.make_array_from_callback(abstract.shape, abstract.sharding, block, dtype=abstract.dtype)
    return jax.block_until_ready(array)  # before the host copies go


def save(model: nnx.Module, config: ModelConfig, folder: Path, *, source: Path | None, max_shard_bytes: int) -> None:
    """Writes a folder that `transformers` loads: weights, index, config, generation config and, from `source`, tokenizer.

    Weights are gathered one at a time; a file of at most `max_shard_bytes` (one tensor at least) is written whenever it is
    full. Only the first process writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writes = jax.process_index() == 0
    names: dict[str, str] = {}
    shards: list[dict[str, np.ndarray]] = [{}]
    written: list[Path] = []
    size = total = 0

    def flush() -> None:
        if writes and shards[-1]:
            written.append(folder / f"shard-{len(written)}.partial")
            save_file(shards[-1], written[-1], metadata={"format": "pt"})
        names.update(dict.fromkeys(shards[-1], str(len(written) - 1)))
        shards[-1] = {}

    for path, weight in variables(model):
        array = weight.get_value()
        host = fetch(array)
        each, rows = made_of(config, path, weight)
        for part, row in ((part, row) for row, parts in zip(host.reshape(-1, *each), rows, strict=True) for part in parts):
            tensor = part.write(row)
            if size and size + tensor.nbytes > max_shard_bytes:
                flush()
                size = 0
            shards[-1][part.name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
    flush()
    if writes:
        _finish(folder, written, names, total)
        dtype = jnp.dtype(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype).name
        (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": dtype}, indent=2) + "\n")
        _copy_beside(folder, config, source)


def _finish(folder: Path, written: list[Path], names: Mapping[str, str], total: int) -> None:
    """Gives the files their final names once their number is known, and writes the index where there are several."""
    for stale in [*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors"), *folder.glob(INDEX)]:
        stale.unlink()
    count = len(written)
    final = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for path, name in zip(written, final, strict=True):
        path.chmod(0o644)  # safetensors makes files for the owner's eyes alone
        path.rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: final[int(v)] for k, v in names.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_beside(folder: Path, config: ModelConfig, source: Path | None) -> None:
    generation, own = folder / "generation_config.json", source is not None and source.resolve() == folder.resolve()
    if not (own and generation.exists()):  # one that stands there else is of another model
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.to_hf()["eos_token_id"]}
        generation.write_text(json.dumps(ids, indent=2) + "\n")
    if source is None or own:
        return
    for pattern in (*TOKENIZER_FILES, generation.name):
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        try:
            return sorted({folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{folder / INDEX} is not a safetensors index: {error}") from error
    single = folder / "model.safetensors"  # others may lie beside it, such as the original's own format
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files and list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds only pickled weights (*.bin), which are never loaded; convert it to safetensors"
        )
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    return files


def _check(tensors: Tensors, config: ModelConfig, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in tensors]
    # buffers that old exports carry, and a second copy of a tied table
    known = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [name for name in tensors if name not in shapes and name not in known and not name.endswith("rotary_emb.inv_freq")]
    wrong = [
        f"{name} is {tensors.shape(name)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    coded = [f"{name} is {tensors.dtype(name)}" for name in shapes if name in tensors and tensors.dtype(name) not in _FLOATS]
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
    if problems:
        raise ValueError(f"the tensors in {folder} do not fit its config.json\n  " + "\n  ".join(problems))


def _bytes(abstract: jax.ShapeDtypeStruct) -> int:
    return abstract.size * jnp.dtype(abstract.dtype).itemsize


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not (shown and interactive()), transient=True, console=console)
