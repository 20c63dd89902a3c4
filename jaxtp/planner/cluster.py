"""GPUs and what joins them: how long a collective takes on given links."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxtp import files
from jaxtp.planner import hardware
from jaxtp.planner.collectives import Collective
from jaxtp.planner.hardware import GPU

MIB = 2**20


@dataclass(frozen=True)
class Link:
    """What joins GPUs, as collectives see it.

    latency: microseconds of a collective that carries next to nothing between two; hop: what each doubling of the devices adds.
    bus: (MiB of the whole array, GB/s): bus bandwidths, in the sense of nccl-tests, that all-reduces of such arrays reached.
    others: the share of it that other collectives reach, which a switch cannot do half of the work for.
    """

    name: str
    latency: float
    hop: float
    bus: tuple[tuple[float, float], ...]
    others: float = 1.0

    def seconds(self, kind: str, size: float, traffic: float, devices: int) -> float:
        """Of a collective over an array of `size` bytes, of which `traffic` bytes go through each device's link.

        Between the measured sizes the bandwidth is interpolated over the logarithm of the size; below the smallest, time is.
        """
        least = 1e-6 * (self.latency + self.hop * math.log2(devices))
        if kind != "all-reduce":
            traffic = traffic / self.others
        first, bandwidth = self.bus[0]
        if size < first * MIB:
            whole = traffic / size * first * MIB / bandwidth / 1e9 if size else least
            return least + max(whole - least, 0.0) * size / (first * MIB)
        sizes, reached = zip(*self.bus, strict=True)
        bandwidth = float(np.interp(math.log(size / MIB), np.log(sizes), reached))
        return max(least, traffic / bandwidth / 1e9)

    def scaled(self, name: str, share: float, **changes: Any) -> Link:
        """A link with that share of these bandwidths."""
        bus = tuple((size, share * bandwidth) for size, bandwidth in self.bus)
        return dataclasses.replace(self, name=name, bus=bus, **changes)


# NVLink 4: all-reduces of 8 H200s, measured (NCCL, with NVLink SHARP); below a quarter of a MiB XLA's own kernels, 8 to 12 us.
# Without SHARP 370 GB/s are reached (nccl-tests issue 212).
NVLINK4 = Link("NVLink", 6.0, 2.0, ((1, 75), (4, 145), (16, 256), (64, 369), (256, 442), (1024, 466)), others=370 / 466)
# PCIe 4: eight RTX 4090 reach 13 to 20 GB/s of 31 and wait 43 us for the first byte (nccl issue 1530).
PCIE4 = Link("PCIe", 20.0, 7.0, ((16, 16.0),))
# A network card of 400 Gbit/s a GPU: two nodes' all-reduce (nccl-tests issue 232), and 95% of the line with large arrays.
NDR = Link("InfiniBand", 25.0, 5.0, ((2, 18.5), (4, 27.2), (8, 36.2), (16, 39.9), (32, 41.3), (512, 47.5)))

NETWORKS = {
    "infiniband": NDR,
    "infiniband-hdr": NDR.scaled("InfiniBand HDR", 0.5),
    "ethernet-100": NDR.scaled("Ethernet 100G", 0.2, latency=40.0),
}
INTERCONNECTS = ("nvlink", "pcie")


def load_links(path: str | Path) -> dict[str, Link]:
    """The `links` of a user's YAML file: names, each with the fields of `Link` that differ, and "like", whose rest it takes:
    nvlink, pcie or a network.

    Raises ValueError for an unknown field, or bandwidths that are not in the order of their sizes.
    """
    found, fields = {"nvlink": NVLINK4, "pcie": PCIE4, **NETWORKS}, ("latency", "hop", "bus", "others")
    mine: dict[str, Link] = {}
    for name, given in hardware.entries(path).get("links", {}).items():
        if not isinstance(given, dict):
            raise ValueError(f"{path}: the link {name} must map fields to values: like, {', '.join(fields)}")
        settings = dict(given)
        like = settings.pop("like", "infiniband")
        if like not in found or (unknown := [key for key in settings if key not in fields]):
            wrong = (
                f"is like {like!r}, which is none of {', '.join(found)}" if like not in found else f"has {', '.join(unknown)}"
            )
            raise ValueError(f"{path}: the link {name} {wrong}; a link has: like, {', '.join(fields)}")
        for field in settings.keys() - {"bus"}:
            hardware.check_number(f"{path}: the link {name}", field, settings[field], zero=field != "others")
        try:
            bus = tuple((float(size), float(bandwidth)) for size, bandwidth in settings.pop("bus", found[like].bus))
        except (TypeError, ValueError):
            bus = ()
        if not bus or [size for size, _ in bus] != sorted({size for size, _ in bus}) or min(map(min, bus)) <= 0:
            raise ValueError(f"{path}: the bus of {name} must be [MiB, GB/s] pairs, the smallest size first, all above 0")
        mine[name] = dataclasses.replace(found[like], name=name, bus=bus, **settings)
    return mine


def nvlink(gpu: GPU) -> Link:
    """That of a GPU which has it. NVLink 3 has no SHARP: 235 GB/s of 300 are reached, and NCCL's 19 us between eight."""
    assert gpu.nvlink
    if int(gpu.capability.split(".")[0]) < 9:
        return NVLINK4.scaled("NVLink", 235 / 466 * gpu.nvlink / 300, latency=10.0, hop=3.0, others=1.0)
    return NVLINK4.scaled("NVLink", gpu.nvlink / 450)


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `per_node` GPUs of one kind. Devices are numbered node by node.

    levels: (devices, link): what joins groups of so many devices, the fastest first.
    """

    gpu: GPU
    nodes: int
    per_node: int
    levels: tuple[tuple[int, Link], ...]

    @property
    def size(self) -> int:
        """All GPUs."""
        return self.nodes * self.per_node

    @property
    def memory(self) -> float:
        """Bytes of each GPU."""
        return self.gpu.gib * 2**30

    def of(self, gpus: int) -> Cluster | None:
        """That many of them, in nodes as large as these, at least as large as is usual; None where these would not be full."""
        most = self.per_node if self.nodes > 1 else max(self.per_node, self.gpu.domain, 8)
        most = 1 << (most.bit_length() - 1)  # so that powers of two fill them
        per_node, nodes = min(most, gpus), max(1, gpus // most)
        if per_node * nodes != gpus:
            return None
        *inside, node, network = self.levels if len(self.levels) > 1 else (*self.levels, *self.levels)
        return dataclasses.replace(
            self, nodes=nodes, per_node=per_node, levels=(*inside, (per_node, node[1]), (gpus, network[1]))
        )

    def __str__(self) -> str:
        return f"{f'{self.nodes}x' * (self.nodes > 1)}{self.per_node}x{self.gpu.name}"

    def seconds(self, collective: Collective, sizes: Mapping[str, int]) -> float:
        """How long a collective takes on a mesh with these axes, in the order of the devices: level after level, each with
        what the one below has left to be joined.
        """
        names = tuple(sizes)
        spread = _spread(names, tuple(sizes.values()), collective.axes, tuple(count for count, _ in self.levels))
        if collective.kind == "collective-permute":
            link = self.levels[max(i for i, devices in enumerate(spread) if devices > 1)][1]
            return link.seconds(collective.kind, collective.bytes, collective.bytes, 2)
        total, held = 0.0, float(collective.bytes)
        for (_, link), devices in zip(self.levels, spread, strict=True):
            if devices > 1:
                factor = 2 if collective.kind == "all-reduce" else 1
                total += link.seconds(collective.kind, held, factor * held * (devices - 1) / devices, devices)
                held /= devices
        return total

    def crosses(self, axis: str, sizes: Mapping[str, int]) -> str:
        """The slowest link that an axis goes over; "" for an axis of one device."""
        spread = _spread(tuple(sizes), tuple(sizes.values()), (axis,), tuple(count for count, _ in self.levels))
        return next((link.name for (_, link), n in reversed(list(zip(self.levels, spread, strict=True))) if n > 1), "")


@functools.cache
def _spread(names: tuple[str, ...], sizes: tuple[int, ...], axes: tuple[str, ...], levels: tuple[int, ...]) -> tuple[int, ...]:
    """Of the worst group of devices along these axes: how many parts each level joins, of what the one below it holds."""
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    joined = [i for i, name in enumerate(names) if name in axes]
    rest = [i for i in range(len(names)) if i not in joined]
    worst = [1] * len(levels)
    for group in devices.transpose(rest + joined).reshape(-1, math.prod(sizes[i] for i in joined)):
        parts = [len(group), *(len(set((group // count).tolist())) for count in levels)]
        worst = [max(was, -(-below // above)) for was, (below, above) in zip(worst, itertools.pairwise(parts), strict=True)]
    return tuple(worst)


def measured(path: str | Path) -> Cluster:
    """The machine that `jaxtp doctor` wrote this profile of: the rates that it measured, and the all-reduces of the widest
    axis, taken to be those of any.

    Raises FileNotFoundError, or ValueError for another file.
    """
    found = files.read_json(path)
    try:
        reduces = [t for t in found["collectives"] if t["kind"] == "all-reduce"]
        copies, products = ([*found[name].values()] for name in ("copies", "products"))
        devices = found["devices"]
        like = hardware.of_device(found["device"]) or hardware.GPUS["A10G"]
        shared = devices if found["device"] == "cpu" else 1  # virtual devices, each measured with the whole host to itself
        gpu = dataclasses.replace(
            like,
            name=found["device"].replace(" ", "-"),
            tflops=statistics.median(products) / 1e12 / hardware.MATMUL / shared,
            bandwidth=statistics.median(copies) / 1e9 / hardware.COPY / shared,
            gib=(found["memory_bytes"] or like.gib * 2**30) / 2**30,
            efficiency=1.0,
        )
        axis = max(reduces, key=lambda t: t["devices"])["axis"] if reduces else None  # the widest
        wide = sorted((t for t in reduces if t["axis"] == axis), key=lambda t: t["bytes"])
        widest = wide[0]["devices"] if wide else 1
        bus = tuple((t["bytes"] / MIB, 2e-9 * (widest - 1) / widest * t["bytes"] / t["seconds"]) for t in wide)
        latency = min((1e6 * t["seconds"] for t in wide), default=0.0)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, ValueError) as error:
        raise ValueError(f"{path} is no profile of `jaxtp doctor`: {error!r}") from None
    return Cluster(gpu, 1, devices, ((devices, Link("measured", latency, 0.0, bus or ((1.0, gpu.pcie),))),))


def cluster(
    spec: str,
    *,
    interconnect: str | None = None,
    network: str = "infiniband",
    known: Mapping[str, GPU] = hardware.GPUS,
    links: Mapping[str, Link] = MappingProxyType({}),
) -> Cluster:
    """The GPUs that "2x8xH100" (nodes x GPUs of a node x their name), "8xH100" or "H100" speak of.

    interconnect: "nvlink" or "pcie", what joins those of a node; default the best that they have. network: a key of
    `NETWORKS`, what joins nodes. known: GPUs by name; links: more of what may join them. Raises ValueError, with what would
    do, for anything else.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×]\s*)?(?:(\d+)\s*[x×]\s*)?([A-Za-z][\w\- ]*|4090)\s*", str(spec))
    if not match:
        raise ValueError(f"{spec!r} names no GPUs; such as 8xH100, or 2x8xH100 for two nodes of eight")
    gpu = hardware.gpu(match[3], known)
    first, second = (int(n) if n else None for n in match.groups()[:2])
    nodes, per_node = (first, second) if second is not None else (1, 1 if first is None else first)
    if not nodes or not per_node:
        raise ValueError(f"{spec!r}: at least one node of one GPU")
    networks = {**NETWORKS, **links}
    if interconnect not in (None, *INTERCONNECTS, *links):
        raise ValueError(f"interconnect={interconnect!r} must be one of {', '.join((*INTERCONNECTS, *links))}")
    if interconnect == "nvlink" and not gpu.nvlink:
        raise ValueError(f"the {gpu.name} has no NVLink; interconnect: pcie")
    if network not in networks:
        raise ValueError(f"network={network!r} must be one of {', '.join(networks)}")
    pcie = links.get("pcie", PCIE4.scaled("PCIe", gpu.pcie / 31))
    inside = pcie if interconnect in (None, *INTERCONNECTS) else links[interconnect]
    levels = [(per_node, inside), (nodes * per_node, networks[network])]
    if gpu.nvlink and interconnect in (None, "nvlink"):
        levels.insert(0, (min(gpu.domain, per_node), links.get("nvlink", nvlink(gpu))))
    return Cluster(gpu, nodes, per_node, tuple(levels))
