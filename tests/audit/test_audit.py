"""The reader of compiled programs: against programs whose collectives are known, and on the model's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxtp import Llama, Rules, make_mesh
from jaxtp.audit import audit, compile_decode, compile_prefill, hlo


def compiled(function, mesh, shape, spec, out_spec, **options):
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec, **options))
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    return audit(run.lower(array).compile(), mesh)


CASES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "tp"), P("tp"), P(), 16 * 8 * 4 // 4, 2 * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tp", tiled=True), P("tp"), P(), 16 * 8 * 4, 3 / 4),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "tp", tiled=True), P(), P("tp"), 16 * 8 * 4, 3 / 4),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "tp", 1, 0, tiled=True), P("tp"), P("tp"), 16 * 8 * 4 // 4, 3 / 4),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "tp", [(0, 1), (1, 0)]), P("tp"), P("tp"), 16 * 8 * 4 // 4, 1),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_of_collective_with_its_axis_and_bytes(kind):
    function, spec, out_spec, size, share = CASES[kind]
    report = compiled(function, make_mesh(dp=2, tp=4), (16, 8), spec, out_spec, check_vma=False)
    (found,) = report.collectives
    assert (found.kind, found.axes, found.dtype, found.bytes, found.loops) == (kind, ("tp",), "f32", size, 0)
    assert found.traffic == size * share


@pytest.mark.parametrize("axes", [("dp",), ("tp",), ("dp", "tp"), ("ep", "tp")])
def test_axes_and_their_products(axes):
    mesh = make_mesh(dp=2, ep=2, tp=2)
    report = compiled(lambda x: jax.lax.psum(x, axes), mesh, (16, 8), P(axes), P(), check_vma=False)
    assert [c.axes for c in report.collectives] == [axes]
    assert report.count("all-reduce", axis=axes[0]) == 1


def test_groups_in_all_the_forms_that_xla_prints():
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert hlo.groups("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x") == pairs
    assert hlo.groups("replica_groups=[4,2]<=[2,4]T(1,0), x") == pairs
    assert hlo.groups("replica_groups=mesh['a'=2,'b'=4] {'a'}, x") == pairs
    assert hlo.groups("replica_groups={}, x") is None
    sizes = {"dp": 2, "tp": 4}
    assert hlo.axes_of(pairs, sizes) == ("dp",)
    assert hlo.axes_of(((0, 1, 2, 3), (4, 5, 6, 7)), sizes) == ("tp",)
    assert hlo.axes_of(((0, 5), (1, 4), (2, 7), (3, 6)), sizes) == ("?",)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 4}, {"tp": 8}], ids=str)
def test_decode_all_reduces_twice_a_layer_and_once_for_the_embedding(mesh):
    model = Llama(tiny.config(), mesh=make_mesh(**mesh))
    batch = 2 * mesh.get("dp", 1)
    report = audit(compile_decode(model, batch=batch, slots=128), model.layout.mesh)
    assert report.name == "decode"
    assert report.count("all-reduce", axis="tp", dtype="f32") == 2 * 2 + 1
    assert {c.bytes for c in report.collectives if c.kind == "all-reduce" and c.dtype == "f32"} == {2 * 64 * 4}
    cache = 2 * 2 * batch * max(4, mesh["tp"]) * 128 * 8 * 4 // mesh["tp"] // mesh.get("dp", 1)
    assert report.aliased_bytes >= cache
    assert report.copies(cache // 4) == []


@pytest.mark.parametrize("tp", [2, 4])
def test_prompts_beside_rows(tp):
    """One program for both: as many sums as a decode step, of more tokens."""
    model = Llama(tiny.config(), mesh=make_mesh(tp=tp))
    report = audit(compile_prefill(model, tokens=64, batch=2, slots=128), model.layout.mesh)
    assert report.name == "mixed"
    assert report.count("all-reduce", axis="tp", dtype="f32") == 2 * 2 + 1
    assert {c.bytes for c in report.collectives if c.kind == "all-reduce" and c.dtype == "f32"} == {(2 + 64) * 64 * 4}


@pytest.mark.parametrize("tp", [2, 4])
def test_prompts_under_sequence_parallelism(tp):
    """XLA:CPU spells a reduce-scatter as an all-reduce of which each device keeps its part; the gathers are there."""
    model = Llama(tiny.config(), mesh=make_mesh(tp=tp), rules=Rules().sequence_parallel())
    report = audit(compile_prefill(model, tokens=32), model.layout.mesh)
    gathers = [c for c in report.collectives if c.kind == "all-gather" and c.bytes == 32 * 64 * 4]
    assert len(gathers) == 2 * 2 + 1  # and before the head
    scattered = report.count("reduce-scatter") + sum(
        c.kind == "all-reduce" and c.bytes == 32 * 64 * 4 for c in report.collectives
    )
    assert scattered == 2 * 2 + 1


def test_data_parallel_decoding_communicates_nothing_but_whether_all_are_done():
    model = Llama(tiny.config(), mesh=make_mesh(dp=8))
    report = audit(compile_decode(model, batch=8, slots=128), model.layout.mesh)
    assert [(c.kind, c.axes, c.bytes) for c in report.collectives] == [("all-reduce", ("dp",), 1)]


def test_a_report_prints_and_shows():
    model = Llama(tiny.config(), mesh=make_mesh(tp=4))
    report = audit(compile_decode(model, batch=1, slots=128), model.layout.mesh, name="one token")
    text = str(report)
    assert "one token: what each device communicates" in text
    assert "all-reduce" in text
    assert "each step of the loop" in text
    assert "<pre" in report._repr_html_()
    assert np.isfinite(report.temp_bytes)
