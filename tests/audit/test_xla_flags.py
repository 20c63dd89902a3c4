"""XLA's options: known ones are set for GPUs, unknown ones are not, the user's own stay; and what they do to a program."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxtp import preset, xla_flags
from jaxtp.audit import audit
from jaxtp.audit.targets import abstract_llama, abstract_trainer, compile_decode, compile_prefill, compile_step, gpu_mesh
from jaxtp.mesh import make_mesh
from jaxtp.planner import Split
from jaxtp.xla_flags import BFLOAT16, PROMPTS, QUANTIZED, TRAINING, Flag, options, slow_bfloat16

ADDED = Flag("xla_gpu_graph_min_graph_size", "7", "", "any that all versions know")
UNKNOWN = Flag("xla_gpu_write_the_paper", True, "", "no version knows it")
WRONG = Flag("xla_gpu_graph_min_graph_size", "many", "", "its value is none")


@pytest.fixture(scope="module")
def gpus():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    return gpu_mesh("A100-80", dp=4)


def test_each_goes_to_its_own_devices():
    mesh = make_mesh(dp=2, tp=4)
    assert options(mesh, TRAINING) == {}
    assert [*options(mesh, QUANTIZED)] == [flag.name for flag in QUANTIZED if flag.name.startswith("xla_cpu_")]


def test_gpus_have_none_of_the_cpus(gpus):
    found = options(gpus, (*QUANTIZED, *BFLOAT16))
    assert found == {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}


def test_float32_is_multiplied_as_such_on_gpus(gpus):
    """By itself XLA lets matrix units round both factors to 10 bits; what the user says of all programs stays."""

    def lowered(mesh, dtype="float32"):
        with xla_flags.exact(mesh, jnp.dtype(dtype)):
            return jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32")).as_text()

    assert "HIGHEST" in lowered(gpus)
    assert "HIGHEST" not in lowered(make_mesh())
    assert "HIGHEST" not in lowered(gpus, "bfloat16")
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in lowered(gpus)


@pytest.mark.parametrize("train", [False, True])
def test_so_it_is_in_every_product_of_a_model(gpus, train):
    config = dataclasses.replace(preset("llama-3.2-1b"), num_layers=1, vocab_size=1024, windows=())
    if train:
        program = compile_step(abstract_trainer(config, gpus, Split(dp=4), dtype="float32"), rows=4, tokens=64)
    else:
        program = compile_decode(abstract_llama(config, gpus, Split(dp=4), dtype="float32"), batch=32, slots=256)
    products = re.findall(r"^.*(?: dot\(|\$gemm|\$lt\$matmul).*$", program.as_text(), re.MULTILINE)
    assert products
    assert all("highest" in line.lower() for line in products)


@pytest.mark.parametrize("tp", [1, 4])
def test_weights_of_8_bits_are_converted_one_at_a_time(tp):
    """What a decode step on CPUs needs beside its arguments is a layer's kernel; without the option jaxlib 0.10 needs all."""
    config = dataclasses.replace(preset("llama-3.2-1b"), num_layers=4, vocab_size=1024, windows=())
    model = abstract_llama(config, make_mesh(tp=tp), Split(tp=tp), dtype="float32", quantization="int8")
    largest = 4 * 2 * config.intermediate_size * config.hidden_size / tp
    assert largest < compile_decode(model, batch=8, slots=256).memory_analysis().temp_size_in_bytes < 1.1 * largest


def test_a_step_of_prompts_needs_half_the_memory(monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 1024}
    config = dataclasses.replace(preset("llama-3.2-1b"), num_layers=8, windows=(), **sizes)
    model = abstract_llama(config, make_mesh(), Split(), dtype="bfloat16")

    def beside():
        return compile_prefill(model, batch=1, tokens=512).memory_analysis().temp_size_in_bytes

    ours = beside()
    monkeypatch.setattr(xla_flags, "PROMPTS", ())
    assert ours < 0.6 * beside()


def test_only_what_the_compiler_knows(gpus):
    assert options(gpus, [ADDED, UNKNOWN]) == {ADDED.name: "7"}
    assert options(gpus, [WRONG]) == {}


def test_what_the_user_set_stays(gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_max_hlo_modules=3 --{ADDED.name}=2")
    assert options(gpus, [ADDED]) == {}


def test_each_says_why():
    assert all(flag.why and flag.versions for flag in (*TRAINING, *QUANTIZED, *PROMPTS, *BFLOAT16))


@pytest.mark.parametrize(
    ("says", "slow"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile", False),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", False),
        (None, False),
    ],
)
def test_bfloat16_is_slow_on_intel_without_amx(says, slow, tmp_path):
    if says:
        (tmp_path / "cpuinfo").write_text(says)
    assert slow_bfloat16(tmp_path / "cpuinfo") == slow


@pytest.mark.parametrize(("dtype", "slow"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_slow_bfloat16_is_multiplied_in_float32(dtype, slow, monkeypatch):
    """Only there do XLA's own products take the place of those of its library, whose fusions are custom ones."""
    monkeypatch.setattr(xla_flags, "slow_bfloat16", lambda: slow)
    config = dataclasses.replace(preset("llama-3.2-1b"), num_layers=2, vocab_size=512, hidden_size=256, windows=())
    trainer = abstract_trainer(config, make_mesh(devices=jax.devices()[:1]), Split(), dtype=dtype)
    program = compile_step(trainer, rows=2, tokens=64).as_text()
    library = re.findall(r"kind=kCustom.*/dot_general", program)
    if dtype == "bfloat16" and slow:
        assert not library
    elif jax.__version_info__ < (0, 11):
        assert library


@pytest.mark.slow
def test_zero_3_gathers_beside_products(gpus):
    """On A100s, where without the options nothing of what ZeRO 3 sends has products beside it."""
    config = dataclasses.replace(preset("llama-3.1-8b"), num_layers=3, vocab_size=8192, windows=())
    trainer = abstract_trainer(config, gpus, Split(dp=4, zero=3, remat="save-dots"), dtype="bfloat16")
    plain, scheduled = (
        audit(compile_step(trainer, rows=4, tokens=2048, xla_flags=flags), gpus).overlapped(axis="dp")
        for flags in (False, True)
    )
    assert plain == 0.0
    assert scheduled > (0.15 if jax.__version_info__[:2] == (0, 11) else 0.4)  # 0.20 with jaxlib 0.11, 0.49 before and after
