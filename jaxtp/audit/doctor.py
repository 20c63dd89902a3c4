"""`doctor`: what a machine's devices are, what joins them, how fast both are, and what is odd about them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from rich.progress import track
from rich.table import Table

from jaxtp.audit.rates import KINDS, Timed, collective_rates, copy_rate, hops, product_rate
from jaxtp.audit.topology import odd_links, smi, topology
from jaxtp.draw import MARKERS, log_log
from jaxtp.generate import memory
from jaxtp.log import console, interactive
from jaxtp.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
SLOW = 0.7  # of the median: what is below is named
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-nccl-cu13",
            "nvidia-nccl-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # fmt: skip


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """What was found. memory_bytes: of each GPU, None for CPUs. versions: of packages and the driver. topology: what
    `nvidia-smi topo -m` prints, or why there is nothing. copies, products: bytes and operations a second of each device by id.
    hops: bytes a second from a device to the next. findings: what is odd, in words.
    """

    device: str
    devices: int
    memory_bytes: int | None
    versions: dict[str, str]
    topology: str
    copies: dict[int, float]
    products: dict[int, float]
    collectives: tuple[Timed, ...]
    hops: dict[tuple[int, int], float]
    findings: tuple[str, ...]

    def table(self) -> Table:
        """Bus bandwidths by size, and the latency of the smallest."""
        rates = f"copy {statistics.median(self.copies.values()) / 1e9:,.1f} GB/s"
        rates += f", bfloat16 product {statistics.median(self.products.values()) / 1e12:,.2f} TFLOP/s each"
        found = "\n".join(f"! {finding}" for finding in self.findings) or "nothing odd"
        table = Table(title=f"{self.devices} x {self.device}: {rates}", caption=found, caption_justify="left")
        for column in ("collective", "axis"):
            table.add_column(column)
        sizes = sorted({timed.bytes for timed in self.collectives})
        table.add_column("latency, us", justify="right")
        for size in sizes:
            table.add_column(f"{size / MIB:g} MiB" if size >= MIB else f"{size / 1024:g} KiB", justify="right")
        for axis in dict.fromkeys(t.axis for t in self.collectives):
            for kind in dict.fromkeys(t.kind for t in self.collectives):
                mine = {t.bytes: t for t in self.collectives if (t.axis, t.kind) == (axis, kind)}
                cells = [f"{mine[size].bus / 1e9:.2f}" if size in mine else "" for size in sizes]
                least = min(t.seconds for t in mine.values())
                table.add_row(kind, f"{axis}={next(iter(mine.values())).devices}", f"{1e6 * least:,.1f}", *cells)
        return table

    def draw(self) -> Figure:
        """Bus bandwidth against size, a line for each kind and axis. Needs matplotlib (extra `notebook`)."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        for marker, axis in zip(MARKERS, dict.fromkeys(t.axis for t in self.collectives), strict=False):
            for number, kind in enumerate(dict.fromkeys(t.kind for t in self.collectives)):
                mine = [t for t in self.collectives if (t.axis, t.kind) == (axis, kind)]
                at, style = ([t.bytes / MIB for t in mine], [t.bus / 1e9 for t in mine]), f"C{number}{marker}-"
                axes.plot(*at, style, ms=4, lw=1, label=f"{kind}, {axis}")
        axes.set(xlabel="MiB of the whole array", ylabel="bus bandwidth, GB/s")
        axes.set_title(f"{self.devices} x {self.device}", fontsize=9)
        log_log(axes)
        plt.close(figure)
        return figure

    def profile(self) -> dict[str, Any]:
        """Plain JSON, which `jaxtp plan --measured` reads."""
        record = asdict(self)
        record["hops"] = [[*pair, rate] for pair, rate in self.hops.items()]
        return record

    def save(self, path: Path) -> None:
        """Writes the profile."""
        path.write_text(json.dumps(self.profile(), indent=1) + "\n")


def _sizes(largest: int) -> tuple[int, ...]:
    """Bytes of arrays, from 16 KiB in steps of four, and the largest."""
    return (*(size for i in range(16) if (size := MIB >> 6 << 2 * i) < largest), largest)


def examine(mesh: Mesh, *, largest: int | None = None) -> Diagnosis:
    """Times every device and link of a mesh. largest: bytes of the largest arrays that collectives are timed with; default 256
    MiB, on virtual devices 16.
    """
    local, first = mesh.local_devices, mesh.devices.flat[0]
    sizes = _sizes(largest or (16 if first.platform == "cpu" else 256) * MIB)
    bar: Any = {"description": "measuring", "console": console, "disable": not interactive(), "transient": True}
    copies = {d.id: copy_rate(d) for d in track(local, **bar)}
    products = {d.id: product_rate(device=d) for d in track(local, **bar)}
    steps = sum(n > 1 for n in mesh.shape.values()) * len(KINDS) * len(sizes)
    timed = tuple(track(collective_rates(mesh, sizes), total=steps, **bar))
    links = hops(mesh, max(sizes)) if jax.process_count() == 1 else {}
    stats = first.memory_stats() or {}
    versions, joins = versions_found(), topology()
    findings = [
        *odd_versions(versions),
        *odd_links(joins),
        *odd("device", "copies at", "GB/s", copies),
        *odd("device", "multiplies at", "GFLOP/s", products),
    ]
    findings += odd("link", "carries", "GB/s", {f"{a} to {b}": rate for (a, b), rate in links.items()})
    return Diagnosis(
        first.device_kind,
        mesh.size,
        int(stats["bytes_limit"] / memory.pool()) if "bytes_limit" in stats else None,
        versions,
        joins,
        copies,
        products,
        timed,
        links,
        tuple(findings),
    )


def odd(what: str, does: str, unit: str, rates: dict[Any, float]) -> list[str]:
    """Those far below the median, in words."""
    if len(rates) < 2:
        return []
    usual = statistics.median(rates.values())
    return [
        f"{what} {name} {does} {rate / 1e9:.2f} {unit}, {rate / usual:.0%} of what is usual here"
        for name, rate in rates.items()
        if rate < SLOW * usual
    ]


def versions_found() -> dict[str, str]:
    """Of Python, the packages that are installed, and the driver."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["platform"] = jax.devices()[0].client.platform_version.replace("\n", " ")
    if driver := smi("--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = driver.splitlines()[0]
    if path := os.environ.get("LD_LIBRARY_PATH"):
        found["LD_LIBRARY_PATH"] = path
    return found


def odd_versions(found: dict[str, str]) -> list[str]:
    """Combinations that are known not to work; so is a library path before that of the packages (jax's installation guide)."""
    problems = []
    if "driver" in found and not {"jax-cuda13-plugin", "jax-cuda12-plugin"} & set(found):
        problems.append(
            "nvidia-smi shows GPUs and JAX has no plugin for them: install jaxtp[cuda13] (driver 580 on) or jaxtp[cuda12]"
        )
    for plugin in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        if plugin in found and found[plugin] != found["jaxlib"]:
            problems.append(
                f"{plugin} {found[plugin]} goes with jaxlib {found[plugin]}, not {found['jaxlib']}: install the same"
            )
    if "jax-cuda13-plugin" in found and "jax-cuda12-plugin" in found:
        problems.append("plugins for CUDA 12 and CUDA 13 are both installed: uninstall one")
    for plugin, cuda, least, instead in (
        ("jax-cuda13-plugin", 13, 580, "install jaxtp[cuda12]"),
        ("jax-cuda12-plugin", 12, 525, "a newer driver is wanted"),
    ):
        if plugin in found and "driver" in found and int(found["driver"].split(".")[0]) < least:
            problems.append(f"driver {found['driver']} is too old for CUDA {cuda}, which needs {least}; {instead}")
    paths = [path for path in found.get("LD_LIBRARY_PATH", "").split(":") if "cud" in path.lower()]
    if paths and any(name.startswith("nvidia-") for name in found):
        problems.append(
            f"LD_LIBRARY_PATH names {', '.join(paths)}: those libraries are loaded in place of the packages' own; unset it"
        )
    return problems
