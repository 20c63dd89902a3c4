"""Compiled programs of one model: each is traced and compiled once for a mesh and a bucket, and found again by its shapes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxtp import xla_flags
from jaxtp.log import logger
from jaxtp.model import Llama


class Programs:
    """Runs functions of a model. The model is taken apart once; a call dispatches its leaves and nothing else."""

    def __init__(self, model: Llama) -> None:
        graph, state = nnx.split(model)
        self._leaves, tree = jax.tree.flatten(state)
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        self._mesh, self._dtype = model.layout.mesh, model.layout.dtype
        self._quantized = bool(model.quantization)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        donate: tuple[int, ...] = (),
        place: Mapping[int, NamedSharding] | None = None,
        **static: Any,
    ) -> Any:
        """function(model, *args, **static), compiled on first sight of these shapes. `donate` numbers args, from 0. place: of
        host arrays among them, where the call brings them.
        """
        told = list(args)
        for i, sharding in (place or {}).items():
            told[i] = jax.ShapeDtypeStruct(args[i].shape, args[i].dtype, sharding=sharding)
        return self.compile(function, *told, donate=donate, **static)(self._leaves, *args)

    def texts(self) -> dict[str, str]:
        """The optimised HLO of every program so far, by function and number: "decode", "decode.1", ..."""
        found: dict[str, str] = {}
        for (function, *_), compiled in self._compiled.items():
            name, number = function.__name__, 0
            while (key := f"{name}.{number}" if number else name) in found:
                number += 1
            found[key] = compiled.as_text()
        return found

    def compile(self, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
        """The executable for arguments like these: arrays, or ShapeDtypeStructs with shardings, to compile ahead of time.

        A donated argument that the program cannot reuse is an error: it would be a copy of the cache.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (function, tree, tuple((a.shape, a.dtype) for a in leaves), tuple(static.items()))
        if key not in self._compiled:

            def program(weights: list[jax.Array], *args: Any) -> Any:
                return function(self._merge(weights), *args, **static)

            program.__name__ = function.__name__
            start = time.perf_counter()
            with warnings.catch_warnings(), jax.set_mesh(self._mesh), xla_flags.exact(self._mesh, self._dtype):
                warnings.filterwarnings("error", message="Some donated buffers were not usable")
                jitted = jax.jit(program, donate_argnums=tuple(i + 1 for i in donate))
                flags = xla_flags.generation(function.__name__, quantized=self._quantized)
                options = xla_flags.options(self._mesh, flags)
                self._compiled[key] = jitted.lower(self._leaves, *args).compile(compiler_options=options)
            took = time.perf_counter() - start
            self.compile_seconds += took
            logger.debug("compiled %s in %.1f s", function.__name__, took)
        return self._compiled[key]
