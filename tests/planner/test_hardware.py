"""The table of GPUs: found by name, told from JAX's devices, extended by a file, and compiled for."""

import dataclasses

import pytest
from conftest import shared

from jaxtp import Llama, preset
from jaxtp.audit import audit, compile_decode, gpu_mesh
from jaxtp.planner import hardware
from jaxtp.planner.hardware import GPUS, gpu, of_device


@pytest.mark.parametrize(
    ("name", "found"),
    [("H100", "H100"), ("h200", "H200"), ("a100", "A100-80"), ("rtx 4090", "RTX-4090"), ("H100_PCIe", "H100-PCIe")],
)
def test_names(name, found):
    assert gpu(name) is GPUS[found]


def test_an_unknown_gpu_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"no GPU is named 'H300'; near: .*H200.*; all: A100-40"):
        gpu("H300")
    with pytest.raises(ValueError, match="no GPU is named 'abacus'; known: A100-40"):
        gpu("abacus")


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM-80GB", "A100-80"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA A10G", "A10G"), ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("cpu", None),
        ("NVIDIA H100 NVL", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H200 NVL", None),
        ("NVIDIA L4", None), ("NVIDIA GeForce RTX 3090", None), ("NVIDIA A10", None),
    ],
)  # fmt: skip
def test_devices(kind, found):
    assert of_device(kind) == (found and GPUS[found])


@pytest.mark.parametrize(("kind", "like"), [("NVIDIA A100-PCIE-40GB", "A100-40"), ("NVIDIA A100 80GB PCIe", "A100-80")])
def test_nvlink_joins_pairs_of_a100s_on_pcie(kind, like):
    assert of_device(kind) == dataclasses.replace(GPUS[like], name=f"{like}-PCIe", domain=2)


def test_names_of_ones_own(tmp_path):
    path = tmp_path / "gpus.yaml"
    path.write_text("my_gpu: {like: H100, tflops: 500}\nA100: {like: A100-40, gib: 20, nvlink: null, capability: 8.0}\n")
    found = hardware.load(path)
    assert gpu("my_gpu", found).tflops == gpu("My-GPU", found).tflops == 500
    assert gpu("A100", found) == dataclasses.replace(GPUS["A100-40"], name="A100", gib=20, nvlink=None)
    assert gpu("A100") == GPUS["A100-80"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("H20: {like: H100, tflops: 0}", "H20 has tflops: 0, which is no number above 0"),
        ("H20: {like: H100, gib: -4}", "H20 has gib: -4, which is no number above 0"),
        ("H20: {like: H100, bandwidth: null}", "H20 has bandwidth: None, which is no number"),
        ("H20: {like: [}", "is not valid YAML"),
    ],
)
def test_bad_files(given, said, tmp_path):
    (tmp_path / "gpus.yaml").write_text(given)
    with pytest.raises(ValueError, match=said):
        hardware.load(tmp_path / "gpus.yaml")


def test_a_file_adds_and_changes_gpus(tmp_path):
    path = tmp_path / "gpus.yaml"
    path.write_text("H100: {bandwidth: 3000}\nH20: {like: H100, tflops: 148, gib: 95.6, bandwidth: 4000}\n")
    found = hardware.load(path)
    assert found["H100"] == dataclasses.replace(GPUS["H100"], bandwidth=3000)
    assert found["H20"] == dataclasses.replace(found["H100"], name="H20", tflops=148, gib=95.6, bandwidth=4000)
    assert found["B200"] == GPUS["B200"]
    path.write_text("H100: {speed: 3}\n")
    with pytest.raises(ValueError, match="H100 has speed; a GPU has: like, bandwidth"):
        hardware.load(path)
    path.write_text("H20: {like: H100, tflops: fast}\n")
    with pytest.raises(ValueError, match="H20 has tflops: 'fast', which is no number"):
        hardware.load(path)
    path.write_text("- H20\n")
    with pytest.raises(ValueError, match="must map names of GPUs to what they have"):
        hardware.load(path)
    path.write_text("H20: {tflops: 148}\n")
    with pytest.raises(ValueError, match="no GPU is named 'H20'"):
        hardware.load(path)


def decode(target):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler's plugin is not installed: .[gpu-compiler]")
    mesh = gpu_mesh(target, tp=4)
    model = Llama(dataclasses.replace(preset("llama-3.1-8b"), num_layers=1, windows=()), mesh=mesh, dtype="bfloat16")
    return audit(compile_decode(model, batch=8, slots=4096), mesh)


def test_the_description_of_an_h200_compiles_to_the_same_as_xlas_own():
    ours, theirs = decode("H200"), decode(shared("gpu_targets/h200.txtpb"))
    for what in ("collectives", "kernels", "calls", "argument_bytes", "temp_bytes", "aliased_bytes"):
        assert getattr(ours, what) == getattr(theirs, what), what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A100-80", "H100", "B200", "L40S"])
def test_the_others_compile_too(name):
    report = decode(name)
    assert report.count("all-reduce", dtype="bf16", axis="tp") == 3
    assert report.copies(2**20) == []
