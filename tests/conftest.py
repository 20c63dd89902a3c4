"""Every test sees eight virtual CPU devices; dtypes never promote by themselves; warnings are errors (pyproject.toml).

Tests' programs are compiled quickly rather than well: without LLVM's optimisations and by XLA's older emitters, in a quarter
of the time; those for GPUs end before the assembler, which is a third of them. XLA partitions them, lays them out and counts on
them as ever. Commands that tests start compile as a user's do; with JAXTP_TESTS=optimized all tests do, as in CI's part on the
newest Python. JAXTP_TESTS=gpu is for tests/gpu alone, on a machine that has one.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched in a test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's, beside another worker: its threads wait by spinning

import jax
import pytest

from jaxtp.generate import memory

OPTIMIZED = os.environ.get("JAXTP_TESTS") == "optimized" or "XLA_FLAGS" in os.environ or jax.__version_info__ >= (0, 12)
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_gpu_enable_libnvptxcompiler=false "
    f"--xla_gpu_cuda_data_dir='{Path(__file__).with_name('no_assembler')}'"
)

ON_GPU = os.environ.get("JAXTP_TESTS") == "gpu"
jax.config.update("jax_platforms", "cuda,cpu" if ON_GPU else "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# outside of the clone, for the next clone's run as well
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtp" / ("tests" if OPTIMIZED else "tests-quick")
KEPT = Path(jax.config.values.get("jax_compilation_cache_dir") or KEPT)
if jax.__version_info__ < (0, 12):  # 0.12 keeps programs for GPUs that are not there, and warns that it cannot read them back
    jax.config.update("jax_compilation_cache_dir", str(KEPT))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of compiling is else the names of lines of Python
if not (OPTIMIZED or ON_GPU):
    os.environ["XLA_FLAGS"] = QUICK
    jax.devices()  # reads them
    del os.environ["XLA_FLAGS"]
memory.CPU_CACHE = 16 << 20  # of each LLM: a test may have many
gc.set_threshold(50_000, 20, 100)  # a tenth of tracing is else the garbage collector's

# the environment of processes that tests start: their programs are kept like the tests' own, beside them; those of notebooks
# and of several nodes are compiled as the tests' are
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(KEPT.with_name("tests-processes")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
COMPILED_QUICKLY = COMPILED if OPTIMIZED else {**COMPILED, "XLA_FLAGS": QUICK}

MAPPINGS = 20_000  # of memory, of 65,530 that Linux allows a process: each compiled program has dozens


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten():
    """A worker that runs hundreds of files would keep every program that JAX has compiled for it, until LLVM finds no place for
    the next one and the process dies of it.
    """
    yield
    held = Path("/proc/self/maps")
    if held.exists() and held.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


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
