"""The next tokens of a step's lanes, from their hidden states; and the counts that penalties need. Letters as in `step`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtp.engine.plan import AT, FLOATS, NOBODY, Shape, apart
from jaxtp.engine.state import State
from jaxtp.mesh import platform
from jaxtp.model import Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows, sample
from jaxtp.parallel.regions import locally
from jaxtp.sharding import names, size, spec_of, zeros


def emit(
    model: Llama, state: State, x: jax.Array, plan: jax.Array, emits: jax.Array, shape: Shape, features: Features
) -> tuple[State, jax.Array, jax.Array, Logprobs | None]:
    """Samples from hidden states x [G, L, D], by plan [G, W], and notes what that changes: (state, whether any row goes on, the
    lanes' new tokens [G, L] or -1, logprobs).
    """
    layout, counts = model.layout, state.counts if features.penalties else None
    logits = model.logits(x)
    batch = spec_of(plan)[0]

    def local(plan):
        return apart(plan, shape)[0][:, :, : shape.fields]

    lanes = locally(local, plan, out=jax.P(batch))
    vocab = spec_of(logits)[2]
    over: Any = jax.P(batch, None, vocab)
    if counts is not None:
        mine = locally(
            lambda a, lanes: jax.tree.map(lambda a: a[0][jnp.maximum(lanes[0, :, AT["row"]], 0)][None], a),
            counts,
            lanes,
            out=Counts(over, over),
        )

    def choose(logits, lanes, counts):
        G, L, V = logits.shape
        rows = _rows(lanes.reshape(G * L, -1), shape)
        seen = jax.tree.map(lambda a: a.reshape(G * L, V), counts)
        produced = lanes[..., AT["produced"]].reshape(-1)
        token, logprobs = sample(
            logits.reshape(G * L, V),
            rows,
            seen,
            produced,
            features=features,
            vocab_size=model.config.vocab_size,
            by_maximum=platform(layout.mesh) == "cpu" and size(layout.mesh, vocab) == 1,
        )
        ends = (token[:, None] == rows.stop_ids).any(axis=1) & (produced + 1 >= rows.min_tokens)
        ends |= produced + 1 >= rows.max_tokens
        return jax.tree.map(lambda a: a.reshape(G, L, *a.shape[1:]), (token, ends, logprobs))

    mesh = layout.mesh.abstract_mesh
    by_lane: Any = NamedSharding(mesh, jax.P(batch, None))
    best: Any = NamedSharding(mesh, jax.P(batch, None, None))
    out: Any = by_lane, by_lane, None if features.logprobs is None else Logprobs(by_lane, by_lane, best, best)
    with jax.named_scope("sampling"):
        token, ends, logprobs = jax.sharding.auto_axes(choose, out_sharding=out)(
            logits, lanes, mine if counts is not None else None
        )

    def note(token, done, lanes, new, ends, emits):
        row = jnp.where(emits[0], lanes[0, :, AT["row"]], token.shape[1])
        return token.at[0, row].set(new[0], mode="drop"), done.at[0, row].set(ends[0], mode="drop")

    newest, done = locally(
        note, state.token, state.done, lanes, token, ends, emits, out=(spec_of(state.token), spec_of(state.done))
    )
    if counts is not None:

        def count(output, lanes, token, emits):
            first = jax.lax.axis_index(names(vocab)) * output.shape[2] if names(vocab) else 0
            row = jnp.where(emits[0], lanes[0, :, AT["row"]], output.shape[1])
            here = jnp.where((token[0] >= first) & (token[0] < first + output.shape[2]), token[0] - first, output.shape[2])
            return output.at[0, row, here].add(1, mode="drop")

        output = locally(count, counts.output, lanes, token, emits, out=spec_of(counts.output))
        state = replace(state, counts=replace(counts, output=output))
    going = jnp.any(emits & ~ends)
    return replace(state, token=newest, done=done), going, jnp.where(emits, token, NOBODY), logprobs


def _rows(lanes: jax.Array, shape: Shape) -> Rows:
    """The sampling parameters of lanes [B, fields]."""
    real = jax.lax.bitcast_convert_type(lanes, jnp.float32)
    ints, end = {name: lanes[:, at] for name, at in AT.items() if name not in FLOATS}, len(AT) + shape.stops
    return Rows(
        **{name: real[:, AT[name]] for name in FLOATS},
        **{name: ints[name] for name in ("top_k", "min_tokens", "max_tokens")},
        seed=jnp.stack([ints["seed"], ints["sample"]], axis=1).astype(jnp.uint32),
        stop_ids=lanes[:, len(AT) : end],
        bias_ids=lanes[:, end : end + shape.biases],
        bias=real[:, end + shape.biases : end + 2 * shape.biases],
    )


# -- counts, for penalties -----------------------------------------------------------------------------------------------


def uncounted(model: Llama, *, rows: int) -> Counts:
    """Counts of nothing yet."""
    return zeros(abstract_counts(model, rows=rows))


def abstract_counts(model: Llama, *, rows: int) -> Counts:
    """The same as shapes and shardings."""
    shape, sharding = (model.layout.parts("batch"), rows, model.vocab_held), _counted(model)
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.bool_, jnp.int32)]
    return Counts(*arrays)


def _counted(model: Llama) -> NamedSharding:
    return model.layout.at("head").sharding("batch", None, "logits")


def recount(model: Llama, counts: Counts, at: jax.Array, prompt: jax.Array, output: jax.Array) -> Counts:
    """Counts of row at[1] of group at[0] anew, from ids [n] of its prompt and its completion so far (-1: none)."""

    def local(seen, made, at, prompt, output):
        batch, _, vocab = spec
        mine = jnp.bool_(True) if not names(batch) else jax.lax.axis_index(names(batch)) == at[0]
        first = jax.lax.axis_index(names(vocab)) * seen.shape[2] if names(vocab) else 0
        size = seen.shape[2]

        def place(ids):
            return jnp.where((ids >= first) & (ids < first + size), ids - first, size)

        row = jnp.where(mine, at[1], seen.shape[1])
        seen = seen.at[0, row].set(jnp.zeros(size, bool).at[place(prompt)].set(True, mode="drop"), mode="drop")
        made = made.at[0, row].set(jnp.zeros(size, jnp.int32).at[place(output)].add(1, mode="drop"), mode="drop")
        return seen, made

    spec = spec_of(counts.prompt)
    return Counts(*locally(local, counts.prompt, counts.output, at, prompt, output, out=(spec, spec)))
