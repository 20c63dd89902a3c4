"""The tensors of a folder of safetensors files, by name, read in slices. Pickled weights (`.bin`) are never opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtp.checkpoint.names import Index
from jaxtp.files import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FP8 = "F8_E4M3"  # which the library that opens the files does not make arrays of


class Tensors:
    """The tensors of a checkpoint folder by name, read in slices."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """Opens all files (or those given) and reads their headers. Raises FileNotFoundError or ValueError naming the file at
        fault.
        """
        self._at: dict[str, tuple[Any, Path, str]] = {}  # file, its path, the name there
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # of files with fp8: where tensors begin, and what is said
        with ExitStack() as stack:
            for path in weight_files(folder) if files is None else files:
                file = stack.enter_context(_opened(path))
                self._at.update({name: (file, path, name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
            self._stack = stack.pop_all()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; only the header is read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype as the file says it, e.g. "BF16"."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, index: Index | EllipsisType) -> np.ndarray:
        """A block of the tensor, in the dtype of the file."""
        if self.dtype(name) == FP8:
            return self._bytes(name)[index]
        try:
            return self._slice(name)[index]
        except SafetensorError as error:
            raise ValueError(f"{self._at[name][1]}: {name} cannot be read: {_line(error)}") from error

    def rename(self, name: str, other: str) -> None:
        """The tensor `name` is called `other` from here on."""
        self._at[other] = self._at.pop(name)

    def drop(self, name: str) -> None:
        """There is no such tensor from here on."""
        del self._at[name]

    def _bytes(self, name: str) -> np.ndarray:
        """A tensor of fp8, in place in its file: behind eight bytes of a length and a header of that length."""
        _, path, own = self._at[name]
        if path not in self._headers:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + length, json.loads(file.read(length))
        begins, header = self._headers[path]
        return np.memmap(path, jnp.float8_e4m3fn, "r", begins + header[own]["data_offsets"][0], self.shape(name))

    def _slice(self, name: str) -> Any:
        file, _, own = self._at[name]
        return file.get_slice(own)


# Where checkpoints of more than text keep their language model: as they are published, and as transformers 5 writes them
_LANGUAGE = ("language_model.model.", "model.language_model.")


def text_part(tensors: Tensors) -> Tensors:
    """The same tensors; of a checkpoint of more than text those of its language model alone, named as one's own."""
    prefix = next((prefix for prefix in _LANGUAGE if any(name.startswith(prefix) for name in tensors)), None)
    if prefix is None:
        return tensors
    for name in list(tensors):
        if name.startswith(prefix):
            tensors.rename(name, f"model.{name.removeprefix(prefix)}")
        elif name.startswith("language_model."):
            tensors.rename(name, name.removeprefix("language_model."))
        elif name != "lm_head.weight":
            tensors.drop(name)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: model.safetensors before an index, as transformers chooses, and whatever
    there is where there is neither.

    Raises FileNotFoundError where there are none, and ValueError for an index that is none or names files elsewhere.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # others may lie beside it, such as the original's own format
        return [single]
    if index.exists():
        return _indexed(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files and list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds only pickled weights (*.bin), which are never loaded; convert it to safetensors"
        )
    if not files and list(folder.glob("*.gguf")):
        raise FileNotFoundError(
            f"{folder} holds GGUF alone, which llama.cpp reads; take the checkpoint of 16 bits (*.safetensors), with "
            "quantization='int4' if need be"
        )
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    return files


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} is not a safetensors index: its weight_map must say the file of each tensor")
    found = sorted(set(names.values()))
    for name in found:  # as written: in the hub's cache the files are links that lead out of the folder
        path = PurePath(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{index} names the file {name!r}, which is none in its folder")
        if not (index.parent / path).exists():
            raise FileNotFoundError(f"{index.parent / path} is missing, but {index} names it")
    return [index.parent / name for name in found]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing (a link to a file that is not there)") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; fetch it: git lfs pull") from None
        raise ValueError(f"{path} is truncated or corrupt: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
