"""Every test sees eight virtual CPU devices; dtypes never promote by themselves; warnings are errors (pyproject.toml)."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched in a test

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
if jax.config.values.get("jax_compilation_cache_dir") is None:  # outside of the clone, for the next clone's run as well
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxtp" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# LLVM's optimisations are half of what a program costs here and change nothing of what XLA makes of it: its collectives,
# layouts, memory. These rooms are compiled as users' programs are, and so are all processes that tests start, and CI's part
# on the newest Python.
OPTIMIZED = ("parity", "test_demo.py", "test_cli.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    room = item.path.relative_to(Path(__file__).parent).parts[0]
    jax.config.update("jax_disable_most_optimizations", room not in OPTIMIZED and "JAXTP_OPTIMIZED" not in os.environ)


SHARED = Path(__file__).parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    """A file or folder of the data that stands beside the project; a clone without it skips what needs it."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there: it stands beside the project only where the project is developed")
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real Llama of 260 thousand weights, in Hugging Face form."""
    return shared("stories260k")
