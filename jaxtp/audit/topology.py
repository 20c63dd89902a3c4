"""What joins a machine's GPUs, as `nvidia-smi topo -m` tells it."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess

LINKS = {
    "NV": "NVLink",
    "PIX": "a PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "host bridges of one NUMA node",
    "SYS": "the processors' own link, between NUMA nodes",
}
"""By their names there (NVLink's with the number of links after it), the best first."""


def topology() -> str:
    """What `nvidia-smi topo -m` prints, or that there is no nvidia-smi."""
    return smi("topo", "-m") or "unknown: there is no nvidia-smi here, or it shows no GPUs"


def smi(*arguments: str) -> str | None:
    """What nvidia-smi prints, without the codes that underline its header; None where there is none, or it fails."""
    if not shutil.which("nvidia-smi"):
        return None
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False)
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout).strip("\n") if done.returncode == 0 else None


def joined(text: str) -> tuple[dict[tuple[int, int], str], dict[int, str]]:
    """Of a topology as it is printed: the name of the link of each pair of GPUs, and each GPU's NUMA node, where it is said."""
    lines = [[cell.strip() for cell in line.split("\t")] for line in text.splitlines()]
    header: list[str] = next((line for line in lines if "GPU0" in line[1:]), [])
    rows = {
        int(line[0].removeprefix("GPU")): dict(zip(header, line, strict=False))
        for line in lines
        if line is not header and line[0].startswith("GPU") and line[0].removeprefix("GPU").isdigit()
    }
    links = {
        (a, b): row[f"GPU{b}"].rstrip("0123456789") for a, row in rows.items() for b in rows if a < b and row.get(f"GPU{b}")
    }
    return links, {gpu: row["NUMA Affinity"] for gpu, row in rows.items() if row.get("NUMA Affinity", "").isdigit()}


def odd_links(text: str) -> list[str]:
    """Pairs of GPUs that are joined worse than most, and NUMA nodes that no NVLink bridges, in words."""
    links, nodes = joined(text)
    if not links:
        return []
    names = list(LINKS)
    rank = {pair: names.index(link) if link in names else len(names) for pair, link in links.items()}
    usual = statistics.median_low(rank.values())
    problems = [
        f"GPUs {a} and {b} are joined by {LINKS.get(links[a, b], links[a, b])}, most pairs by {LINKS[names[usual]]}"
        for (a, b), found in rank.items()
        if found > usual < len(names)
    ]
    between = {tuple(sorted((nodes[a], nodes[b]))) for a, b in links if a in nodes and b in nodes and nodes[a] != nodes[b]}
    if between and not any(link == "NV" for link in links.values()):
        told = ", ".join(" and ".join(pair) for pair in sorted(between))
        problems.append(f"no NVLink joins the GPUs of NUMA nodes {told}: tp is best kept within the GPUs of one of them")
    return problems
