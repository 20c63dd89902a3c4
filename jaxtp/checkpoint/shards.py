"""Writing a checkpoint's tensors, one at a time, into files of a size at most."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxtp.checkpoint.tensors import INDEX, SINGLE


class Writer:
    """Files of at most `max_shard_bytes` (one tensor at least), each written when it is full; and their index."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        """The folder must be there; what it holds stays until `finish`."""
        self._folder, self._most = folder, max_shard_bytes
        self._names: dict[str, str] = {}
        self._written: list[Path] = []
        self._shard: dict[str, np.ndarray] = {}
        self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes a tensor."""
        size = sum(held.nbytes for held in self._shard.values())
        if self._shard and size + tensor.nbytes > self._most:
            self._flush()
        self._shard[name] = tensor
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Writes what is left, gives all files their names, and removes those of an earlier checkpoint."""
        self._flush()
        _finish(self._folder, self._written, self._names, self._total)

    def _flush(self) -> None:
        if self._shard:
            self._written.append(self._folder / f"shard-{len(self._written)}.partial")
            write_tensors(self._written[-1], self._shard)
        self._names.update(dict.fromkeys(self._shard, str(len(self._written) - 1)))
        self._shard = {}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, with the permissions that any new file gets here; safetensors' own are for the owner's eyes alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _finish(folder: Path, written: list[Path], names: Mapping[str, str], total: int) -> None:
    """Gives the files their final names once their number is known, and writes the index where there are several."""
    for stale in [*folder.glob(SINGLE), *folder.glob("model-*-of-*.safetensors"), *folder.glob(INDEX)]:
        stale.unlink()
    count = len(written)
    final = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for path, name in zip(written, final, strict=True):
        path.rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: final[int(v)] for k, v in names.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
