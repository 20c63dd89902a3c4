"""XLA's options for programs, each with its reason.

They travel with a program (`jax.jit(..., compiler_options=options(mesh))`), never in the environment: there a name that a
version does not know ends the process, and names come and go. Here the compiler is asked first. What XLA_FLAGS sets stays.

In generation each collective waits for the product before it and the next one waits for the collective, so that there is
nothing to schedule beside it: on GPUs only training has such options.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtp.compilation_cache import not_cached
from jaxtp.log import logger
from jaxtp.mesh import platform


@dataclass(frozen=True)
class Flag:
    """An option: the value that jaxtp gives it, why, and the jaxlib versions that were seen to know it."""

    name: str
    value: bool | str
    versions: str
    why: str


TRAINING = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "0.4.18 to 0.12",
        "Starts collectives early and ends them late, so that products run beside them: ZeRO 3's gathers and scatters, and "
        "those of sequence parallelism. XLA does so by itself on Hopper and Blackwell within a node, not on older GPUs.",
    ),
)
"""Of the training step."""

BFLOAT16 = (
    Flag(
        "xla_cpu_experimental_ynn_fusion_type",
        "LIBRARY_FUSION_TYPE_REDUCE",
        "0.10 to 0.12",
        "jaxlib 0.10 gives every bfloat16 product to the processor's bfloat16 instructions. Without it XLA multiplies them in "
        "float32, at 1.8 times the rate where those are slow.",
    ),
)
"""Of the training step in bfloat16, too, where `slow_bfloat16`."""

QUANTIZED = (
    Flag(
        "xla_cpu_scheduler_type",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "0.10 to 0.12",
        "That of jaxlib 0.10 begins whatever can begin: the weights of all layers would be converted before the first product, "
        "and take the memory that 8 bits save.",
    ),
    Flag(
        "xla_gpu_experimental_enable_subchannel_dequantisation_fusion",
        True,
        "0.10 to 0.12",
        "Takes the scaling of groups of inputs into a product; without it each kernel would be written out in 16 bits first.",
    ),
)
"""Of generation with kernels in few bits."""

PROMPTS = (
    Flag(
        "xla_cpu_scheduler_type",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "0.10 to 0.12",
        "That of jaxlib 0.10 makes what all layers begin with before the first one, in twice the memory; beyond 32 MiB malloc "
        "has fresh pages from the system each time. A prompt of 512 tokens takes 3 to 11% less; rows alone, 2% more.",
    ),
)
"""Of generation's steps with chunks of prompts."""


def training(dtype: jnp.dtype) -> tuple[Flag, ...]:
    """Those of a training step in `dtype`, on this machine."""
    return TRAINING + BFLOAT16 if dtype == jnp.bfloat16 and slow_bfloat16() else TRAINING


def generation(function: str, *, quantized: bool) -> tuple[Flag, ...]:
    """Those of a program of generation, by the name that its function has in `engine.step`."""
    return (QUANTIZED if quantized else ()) + (PROMPTS if function == "mixed" else ())


def slow_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the cores here multiply bfloat16 at half the rate of float32, as Intel's do without AMX (AMD's at twice)."""
    says = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "GenuineIntel" in says and "amx_bf16" not in says


def options(mesh: Mesh, flags: Sequence[Flag]) -> dict[str, bool | str]:
    """Compiler options for programs over `mesh`: those of `flags` that are for its devices (as their names say), that the
    compiler for them knows, and that XLA_FLAGS does not name.
    """
    flags = [flag for flag in flags if flag.name.startswith(f"xla_{platform(mesh)}_")]
    named = {flag.lstrip("-").split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {flag.name: flag.value for flag in flags if flag.name not in named and known(flag, mesh)}


def exact(mesh: Mesh, dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """A model in float32 that is traced in it for GPUs multiplies in float32. JAX by itself gives such products to the matrix
    units as TF32, 10 bits of each factor. What `jax_default_matmul_precision` says stays.
    """
    said = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    as_it_is = said is not None or dtype != jnp.float32 or platform(mesh) != "gpu"
    return contextlib.nullcontext() if as_it_is else jax.default_matmul_precision("highest")


@functools.cache
def known(flag: Flag, mesh: Mesh) -> bool:
    """Whether the compiler for the mesh's devices takes the option; it is asked with a program that does nothing."""
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda: 0, out_shardings=NamedSharding(mesh, PartitionSpec())).lower()
    try:
        with not_cached():
            lowered.compile(compiler_options={flag.name: flag.value})
    except jax.errors.JaxRuntimeError as error:
        logger.debug("without %s: %s", flag.name, error)
        return False
    return True
