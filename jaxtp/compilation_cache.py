"""JAX's compilation cache, on by default: a second start finds what the first one compiled.

It stands in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)/jaxtp/compiled, for every kind of processor in a folder of
its own: JAX's keys tell GPUs apart but not the instructions that CPUs know, and a home may be shared by several machines.
Whatever is set by JAX's own settings (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and the like, or `jax.config`)
stays; JAXTP_COMPILATION_CACHE=0 leaves everything as JAX has it. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxtp.log import logger

VARIABLE = "JAXTP_COMPILATION_CACHE"
OFF = ("0", "false", "no", "off")
_SECONDS, _JAX_SECONDS = "jax_persistent_cache_min_compile_time_secs", 1.0  # and what JAX sets it to


def use() -> None:
    """Turns the cache on, unless it is set already or switched off. To be called before anything is compiled."""
    if os.environ.get(VARIABLE, "").lower() in OFF or not jax.config.values["jax_enable_compilation_cache"]:
        return
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = _folder()
        if folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if _SECONDS.upper() not in os.environ and jax.config.values[_SECONDS] == _JAX_SECONDS:
        jax.config.update(_SECONDS, 0.0)  # a start compiles several small programs; together they take most of its time


@functools.cache
def say() -> None:
    """Says once, where `use` has turned it on, where programs are kept."""
    if _folder.cache_info().currsize and (folder := _folder()):
        logger.info("compiled programs are kept in %s (%s=0: they are not)", folder, VARIABLE)


def switch_off() -> None:
    """For this process and those that it starts."""
    os.environ[VARIABLE] = "0"


@functools.cache
def _folder() -> Path | None:
    """The folder, made and tried once; None, with a warning, where nothing can be written there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jaxtp" / "compiled" / processor()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning("every start compiles anew: %s. JAX_COMPILATION_CACHE_DIR names another folder for programs", error)
        return None


def processor() -> str:
    """The kind of this machine's processor, such as x86_64-1f2e3d4c: its name, and what tells its instructions apart."""
    try:
        told = re.search(r"(?m)^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text())
    except OSError:
        told = None
    known = " ".join(sorted(told[1].split())) if told else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def not_cached() -> Iterator[None]:
    """Keeps programs for devices that are not there out of it: nothing could load them again, nor those that are in it."""
    before = jax.config.values[_SECONDS]
    jax.config.update(_SECONDS, float("inf"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
            yield
    finally:
        jax.config.update(_SECONDS, before)
