"""GPUs by their names, and what collectives take on the links between them."""

import pytest

from jaxtp import plan
from jaxtp.planner import Split, cluster, hardware
from jaxtp.planner.cluster import NVLINK4, load_links
from jaxtp.planner.collectives import Collective

MIB, GB = 2**20, 1e9


@pytest.mark.parametrize(
    ("spec", "nodes", "per_node", "gpu"),
    [
        ("8xH100", 1, 8, "H100"),
        ("2x8xh100", 2, 8, "H100"),
        ("H200", 1, 1, "H200"),
        ("4 x A100-40", 1, 4, "A100-40"),
        ("2×4×L40S", 2, 4, "L40S"),
        ("2xRTX 4090", 1, 2, "RTX-4090"),
    ],
)
def test_clusters_are_named_as_people_do(spec, nodes, per_node, gpu):
    found = cluster(spec)
    assert (found.nodes, found.per_node, found.gpu.name, found.size) == (nodes, per_node, gpu, nodes * per_node)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("8xH300", {}, "no GPU is named 'H300'; near: .*H100"),
        ("eight H100", {}, "no GPU is named"),
        ("8", {}, "'8' names no GPUs; such as 8xH100"),
        ("0xH100", {}, "at least one node of one GPU"),
        ("8xL40S", {"interconnect": "nvlink"}, "the L40S has no NVLink; interconnect: pcie"),
        ("8xH100", {"interconnect": "wire"}, "must be one of nvlink, pcie"),
        ("8xH100", {"network": "pigeons"}, "network='pigeons' must be one of infiniband"),
    ],
)
def test_bad_input(spec, options, said):
    with pytest.raises(ValueError, match=said):
        cluster(spec, **options)


YAML = """
H20: {like: H100, tflops: 148}
links:
  roce: {like: infiniband, latency: 40, bus: [[1, 5], [64, 20]]}
  bridge: {like: pcie, bus: [[16, 9]], others: 0.5}
"""


def test_a_users_own_links(tmp_path):
    (tmp_path / "mine.yaml").write_text(YAML)
    links, known = load_links(tmp_path / "mine.yaml"), hardware.load(tmp_path / "mine.yaml")
    found = cluster("2x4xH20", interconnect="bridge", network="roce", links=links, known=known)
    assert [link.name for _, link in found.levels] == ["bridge", "roce"]
    assert (links["bridge"].latency, links["bridge"].others) == (20.0, 0.5)
    slow = found.seconds(Collective("all-reduce", ("tp",), "bf16", 64 * MIB, 2), Split(dp=4, tp=2).axes)
    assert slow == pytest.approx(64 * MIB / 9e9, rel=1e-6)
    assert (
        plan("llama-3.2-1b", "2x4xH20", network="roce", gpu_file=tmp_path / "mine.yaml").best.cluster.levels[-1][1].name
        == "roce"
    )
    with pytest.raises(
        ValueError, match="network='wire' must be one of infiniband, infiniband-hdr, ethernet-100, roce, bridge"
    ):
        cluster("2x4xH20", network="wire", links=links, known=known)


def test_links_of_ones_own_go_before_those_that_are_known(tmp_path):
    (tmp_path / "mine.yaml").write_text("links: {nvlink: {like: nvlink, bus: [[1, 5]]}, pcie: {like: pcie, bus: [[1, 2]]}}")
    links = load_links(tmp_path / "mine.yaml")
    assert [link for _, link in cluster("8xH100", links=links).levels][:2] == [links["nvlink"], links["pcie"]]
    assert cluster("8xH100", interconnect="pcie", links=links).levels[0][1] == links["pcie"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{like: string}", "roce is like 'string', which is none of nvlink, pcie, infiniband"),
        ("{speed: 3}", "roce has speed; a link has: like, latency, hop, bus, others"),
        ("{bus: [[64, 20], [1, 5]]}", "the bus of roce must be"),
        ("{bus: []}", "the bus of roce must be"),
        ("{bus: 40}", "the bus of roce must be"),
        ("{latency: fast}", "roce has latency: 'fast', which is no number"),
        ("5", "the link roce must map fields to values"),
    ],
)
def test_bad_links(given, said, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"links: {{roce: {given}}}")
    with pytest.raises(ValueError, match=said):
        load_links(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("mib", "bandwidth"), [(1, 75), (4, 145), (16, 256), (64, 369), (256, 442), (1024, 466)])
def test_measured_bus_bandwidths_come_out_as_they_went_in(mib, bandwidth):
    """bus bandwidth = 2 (n-1)/n * bytes / seconds, on eight GPUs."""
    collective = Collective("all-reduce", ("tp",), "bf16", mib * MIB, 8)
    seconds = cluster("8xH200").seconds(collective, Split(tp=8).axes)
    assert 2 * 7 / 8 * mib * MIB / seconds / GB == pytest.approx(bandwidth, rel=1e-6)


def test_time_grows_with_size_and_never_falls_below_the_latency():
    times = [NVLINK4.seconds("all-reduce", size, 1.75 * size, 8) for size in (0, 2**10, 2**16, 2**20, 2**21, 2**26)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(12e-6)


def seconds(spec, split, axes, size=64 * MIB, kind="all-reduce", **options):
    devices = 1
    for axis in axes:
        devices *= split.axes[axis]
    return cluster(spec, **options).seconds(Collective(kind, axes, "bf16", size, devices), split.axes)


def test_what_crosses_nodes_is_slow():
    inside = seconds("2x8xH100", Split(dp=2, tp=8), ("tp",))
    across = seconds("2x8xH100", Split(dp=2, tp=8), ("dp",))  # the same rank of each node
    assert across > 4 * inside
    # sixteen, in two levels: what is scattered within the nodes crosses them in eighths
    both = seconds("2x8xH100", Split(tp=16), ("tp",))
    assert inside < both < across


def test_the_slowest_link_of_an_axis():
    nodes = cluster("2x8xH100")
    assert nodes.crosses("tp", Split(dp=2, tp=8).axes) == "NVLink"
    assert nodes.crosses("dp", Split(dp=2, tp=8).axes) == "InfiniBand"
    assert nodes.crosses("pp", Split(dp=2, tp=8).axes) == ""
    assert cluster("8xL40S").crosses("tp", Split(tp=8).axes) == "PCIe"
    # NVLink bridges join pairs: four go over PCIe
    assert cluster("4xH100-PCIe").crosses("tp", Split(dp=2, tp=2).axes) == "NVLink"
    assert cluster("4xH100-PCIe").crosses("tp", Split(tp=4).axes) == "PCIe"


def test_pcie_and_slower_networks():
    assert seconds("8xH100", Split(tp=8), ("tp",), interconnect="pcie") > 4 * seconds("8xH100", Split(tp=8), ("tp",))
    split = Split(dp=2, tp=8)
    times = [seconds("2x8xH100", split, ("dp",), network=name) for name in ("infiniband", "infiniband-hdr", "ethernet-100")]
    assert times == sorted(times)


def test_a_permute_takes_the_slowest_hop():
    inside = seconds("8xH100", Split(pp=2, tp=4), ("pp",), kind="collective-permute")
    assert seconds("2x8xH100", Split(pp=2, tp=8), ("pp",), kind="collective-permute") > 4 * inside


def test_groups_that_nodes_cut_unevenly_pay_for_the_worst():
    uneven = cluster("2x6xH100")
    assert uneven.crosses("tp", Split(dp=3, tp=4).axes) == "InfiniBand"  # devices 4 to 7 lie in both nodes
    assert uneven.crosses("tp", Split(dp=6, tp=2).axes) == "NVLink"
    assert cluster("12xH100").crosses("tp", Split(dp=3, tp=4).axes) == "NVLink"
    assert cluster("12xH100").crosses("tp", Split(dp=2, tp=6).axes) == "PCIe"
