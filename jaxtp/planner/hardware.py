"""What GPUs can do, from NVIDIA's data sheets and white papers, and how many are at hand.

Rates are dense (no sparsity), bandwidths one way. A GPU that is missing here, or a machine's own figures, come from a YAML
file (`load`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtp import files

MATMUL, COPY = 0.79, 0.90  # of its data sheet, what an H200 reaches: 780 of 989 TFLOP/s, 4.3 of 4.8 TB/s


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    tflops: bfloat16, accumulated in float32; tflops_fp8: None where it has none. gib: memory that programs see. bandwidth:
    of that memory, GB/s. nvlink: GB/s to all others of its domain together, None without; domain: how many GPUs that joins.
    pcie: GB/s to the host. capability, cores, fpus (float32 lanes of a core), l2_mib, shared_kib (of a core), threads (of a
    core), links: what a compiler wants to know. efficiency: what programs reach, as a share of what an H200 reaches of its own
    data sheet (`MATMUL`, `COPY`); fitted to published figures, see docs/planner.md.
    """

    name: str
    tflops: float
    tflops_fp8: float | None
    gib: float
    bandwidth: float
    nvlink: float | None
    domain: int
    pcie: float
    capability: str
    cores: int
    fpus: int
    l2_mib: int
    shared_kib: int
    threads: int
    links: int
    efficiency: float = 1.0

    def target(self) -> str:
        """The description of this GPU that XLA compiles for (a GpuTargetConfigProto as text), for CUDA 13 and cuDNN 9.10."""
        if self.capability not in TENSOR_OPS:
            raise ValueError(
                f"{self.name}: cannot describe capability {self.capability!r} to XLA; known: {', '.join(TENSOR_OPS)}"
            )
        major, minor = self.capability.split(".")
        accelerated = int(major) >= 9  # sm_90a and on
        tensor_ops = TENSOR_OPS[self.capability]  # of a tensor core in a clock, four of which a core has
        clock = self.tflops * 1e3 / (self.cores * 4 * tensor_ops * 2)
        memory, bandwidth = round(self.gib * 2**30), round(self.bandwidth * 1e9)
        feature = "feature_extension: ACCELERATED_FEATURES" if accelerated else ""
        matrix = {F16: tensor_ops, BF16: tensor_ops, F32: tensor_ops // 2}
        if self.tflops_fp8:
            matrix |= {F8E5M2: 2 * tensor_ops, F8E4M3FN: 2 * tensor_ops}
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_kib * 1024}
  shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {self.l2_mib * 2**20}
  clock_rate_ghz: {clock:.4f}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  scalar_unit_description {{ {_rates({F32: self.fpus}, clock, units=1)} }}
  matrix_unit_description {{ {_rates(matrix, clock, units=4)} }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {self.capability}{"a" * accelerated}"
  model_str: "sm_{self.capability} with {memory}B RAM, {self.cores} cores"
  device_address_bits: 64
  pcie_bandwidth: {round(self.pcie * 1e9)}
  ecc_enabled: true
  name: "NVIDIA {self.name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: {self.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {self.name}"
"""


# XLA's numbers of element types
F16, F32, BF16, F8E5M2, F8E4M3FN = 10, 11, 16, 19, 20
TENSOR_OPS = {"8.0": 256, "8.6": 64, "8.9": 128, "9.0": 512, "10.0": 1024}

GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, bf16, fp8, GiB, GB/s, NVLink, domain, PCIe, capability, cores, fpus, L2, shared, threads, links, efficiency
        GPU("A100-40", 312, None, 39.4, 1555, 300, 8, 31, "8.0", 108, 64, 40, 164, 2048, 12, 0.73),
        GPU("A100-80", 312, None, 79.1, 2039, 300, 8, 31, "8.0", 108, 64, 40, 164, 2048, 12, 0.73),
        GPU("H100", 989, 1979, 79.1, 3350, 450, 8, 63, "9.0", 132, 128, 50, 228, 2048, 18, 1.10),
        GPU("H100-PCIe", 756, 1513, 79.1, 2000, 300, 2, 63, "9.0", 114, 128, 50, 228, 2048, 12),
        GPU("H200", 989, 1979, 141.0, 4800, 450, 8, 63, "9.0", 132, 128, 50, 228, 2048, 18),
        GPU("B200", 2250, 4500, 178.3, 8000, 900, 8, 63, "10.0", 148, 128, 126, 228, 2048, 18),
        GPU("L40S", 362, 733, 44.4, 864, None, 1, 31, "8.9", 142, 128, 96, 100, 1536, 0),
        GPU("A10G", 70, None, 22.1, 600, None, 1, 31, "8.6", 80, 128, 6, 100, 1536, 0),
        GPU("RTX-4090", 165, 330, 23.5, 1008, None, 1, 31, "8.9", 128, 128, 72, 100, 1536, 0),
    )
}
BESIDE_NAMES = {"NVIDIA", "GEFORCE", "40GB", "80GB", "HBM3", "SXM", "SXM4", "SXM5"}  # words of device kinds that change no rate
ALIASES = {"A100": "A100-80", "H100-SXM": "H100", "H200-SXM": "H200", "RTX4090": "RTX-4090", "4090": "RTX-4090"}


def gpu(name: str, known: Mapping[str, GPU] = GPUS) -> GPU:
    """The GPU of that name, whatever its case. Raises ValueError, with near names, for one that is not known."""
    names = {_plain(alias): of for alias, of in ALIASES.items() if of in known} | {_plain(key): key for key in known}
    if _plain(name) in names:
        return known[names[_plain(name)]]
    near = dict.fromkeys(names[n] for n in difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.4))
    hint = f"near: {', '.join(near)}; all" if near else "known"
    raise ValueError(f"no GPU is named {name!r}; {hint}: {', '.join(known)}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def of_device(kind: str) -> GPU | None:
    """The GPU that JAX's `device_kind` speaks of ("NVIDIA H100 80GB HBM3"); None for what is none of them, as are a part of one
    (MIG) and a variant with other rates (H100 NVL).
    """
    said = set(re.findall(r"[A-Z0-9]+", kind.upper()))
    if "A100" in said:
        pcie, name = "PCIE" in said, "A100-40" if "40GB" in said else "A100-80"
        found = dataclasses.replace(GPUS[name], name=f"{name}-PCIe", domain=2) if pcie else GPUS[name]
        return found if said <= {"A100", "PCIE", *BESIDE_NAMES} else None
    words = {name: set(re.findall(r"[A-Z0-9]+", name.upper())) for name in GPUS}
    return next((GPUS[name] for name in GPUS if words[name] <= said <= words[name] | BESIDE_NAMES), None)


def cpu(memory: float) -> GPU:
    """A stand-in for one of a host's virtual CPU devices that may take so many bytes, so that layouts can be compared."""
    return dataclasses.replace(GPUS["A10G"], name="CPU", gib=memory / 2**30, tflops=0.5, bandwidth=30, pcie=5)


def load(path: str | Path) -> dict[str, GPU]:
    """`GPUS` with those of a YAML file laid over it: names, each with the fields that differ and "like", whose rest it takes.
    (Its `links` are for `cluster.load_links`.)

    Raises ValueError for an unknown field.
    """
    found, fields = dict(GPUS), {field.name for field in dataclasses.fields(GPU)} - {"name"}
    for name, given in entries(path).items():
        if name == "links":
            continue
        settings = dict(given)
        base = gpu(settings.pop("like", name), found)
        unknown = [field for field in settings if field not in fields]
        if unknown:
            raise ValueError(f"{path}: {name} has {', '.join(unknown)}; a GPU has: like, {', '.join(sorted(fields))}")
        for field, value in settings.items():
            if field == "capability":
                settings[field] = str(value)
            elif value is not None or field not in ("nvlink", "tflops_fp8"):
                check_number(f"{path}: {name}", field, value, zero=field == "links")
        found[name] = dataclasses.replace(base, name=name, **settings)
    return found


def check_number(whose: str, field: str, value: Any, *, zero: bool) -> None:
    """Raises ValueError for what is no number above 0 (zero: or 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{whose} has {field}: {value!r}, which is no number {'of at least' if zero else 'above'} 0")


def entries(path: str | Path) -> dict[str, dict[str, Any]]:
    """A user's YAML file: what it says of each name. Raises ValueError where it is none."""
    raw = files.read_yaml(path) or {}
    if not isinstance(raw, dict) or not all(isinstance(given, dict) for given in raw.values()):
        raise ValueError(f"{path} must map names of GPUs to what they have, such as H20: {{like: H100, tflops: 148}}")
    return raw


def _rates(ops: Mapping[int, int], clock: float, *, units: int) -> str:
    return " ".join(
        f"rate_infos {{ key: {kind} value {{ clock_rate_ghz: {clock:.4f} units_per_core: {units} ops_per_clock: {n} }} }}"
        for kind, n in ops.items()
    )
