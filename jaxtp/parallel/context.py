"""Context parallelism: rows in parts over the mesh axis cp, and attention among all of them, exact. In training the tokens of
a row are cut, as follows; in generation the slots of the cache are: see `cached`.

c ranks; a row of T tokens is 2c chunks of C = T/2c, and rank r has the chunks r and 2c-1-r, one behind the other (zigzag): what
comes late in a row sees much, what comes early little, and each rank has some of both, so that all have the same work.

    gathered   every rank gets all keys and values, at KV-head size, and attends with its own queries. For anything.
    ring       keys and values go around, a hop for each rank, while what came is attended to: no rank ever has all of them.
    heads      all-to-all, from parts of tokens with all heads to all tokens of some heads, and back (Ulysses,
               arXiv:2309.14509): KV heads must be as many as the ranks, or a multiple.

B batch, t = 2C tokens of a rank, K KV heads, G query heads per KV head, H head_dim; queries [B, t, K, G, H], keys and values
[B, t, K, H] of each rank. Chunks as they lie on the ranks: [c, 2, ...], or [2c, ...].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtp.model.cache import LayerCache
from jaxtp.ops.attention import Kernel, Scoring, attend_fresh
from jaxtp.parallel.cached import attend_cached
from jaxtp.parallel.gathered import Prefixes, Steps, Windows, gathered
from jaxtp.parallel.parts import Flash, Parts, Plain, chunked, in_order, row_of, zigzag
from jaxtp.parallel.ring import Ring, ring

Strategy = Literal["gathered", "ring", "heads"]


@dataclass(frozen=True)
class Context:
    """How rows lie over cp, and how a model's attention goes over it.

    size: ranks. strategy: default what `choose_strategy` takes, for each layer.
    """

    size: int
    strategy: Strategy | None = None
    axis: str = "cp"

    def __post_init__(self) -> None:
        if self.strategy not in (None, *get_args(Strategy)):
            raise ValueError(f"context_strategy={self.strategy!r} is none of {', '.join(get_args(Strategy))}")

    def padded(self, tokens: int) -> int:
        """So many tokens, and as many more as make chunks of one size."""
        return -(-tokens // (2 * self.size)) * 2 * self.size

    def order(self, tokens: int) -> np.ndarray:
        """Which token of the row stands at each place, rank by rank: [T] int."""
        chunks = np.arange(tokens).reshape(2 * self.size, -1)
        return np.stack([chunks[: self.size], chunks[: self.size - 1 : -1]], axis=1).reshape(-1)

    @jax.named_scope("context")
    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        kernel: Kernel,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """As `ops.attention.attend_fresh`, in a region, where each rank has its part; segment_ids [B, T] of the whole row."""
        t, K, G, H = q.shape[1:]
        window = None if window is None or window >= t * self.size else window
        strategy = choose_strategy(
            cp=self.size, kv_heads=K, group=G, window=window, packed=segment_ids is not None, override=self.strategy
        )
        scoring = Scoring(H**-0.5 if scale is None else scale, softcap)
        if strategy == "heads":
            among = functools.partial(attend_fresh, kernel=kernel, window=window, scale=scoring.scale, softcap=softcap)
            return _by_heads(among, self.size, self.axis, q, k, v, segment_ids)
        parts: Parts = Flash(scoring, window) if kernel == "cudnn" else Plain(scoring, window)
        if strategy == "ring":
            return ring(Ring(self.size, self.axis, parts), q, k, v)
        how = Steps if kernel != "cudnn" else Prefixes if window is None else Windows
        return gathered(how(self.size, self.axis, parts), q, k, v, segment_ids)

    @property
    def attend_cached(self) -> Callable[..., tuple[jax.Array, LayerCache]]:
        """As `model.cache.attend_cached`, in a region, where each rank has its slots of the cache; see `cached`."""
        return functools.partial(attend_cached, size=self.size, axis=self.axis)


def choose_strategy(
    *, cp: int, kv_heads: int, group: int, window: int | None = None, packed: bool = False, override: Strategy | None = None
) -> Strategy:
    """How layers attend whose devices have so many KV heads, and `group` query heads for each: the one that sends the fewest
    bytes. Raises ValueError, with what would work, where `override` cannot.

    To gather keys and values a device receives 2·K·H numbers for each token of other ranks. By heads it sends its own tokens'
    share: (2·G + 2)·K·H for each of T/c tokens, so that it is less where c > G + 1. A ring sends what gathering does, and hides
    more of it behind products, but waits at each hop: it is taken where it is asked for.
    """
    fits = kv_heads % cp == 0
    if override == "heads" and not fits:
        raise ValueError(
            f"context_strategy='heads' gives each of cp={cp} ranks whole KV heads, of which a device has {kv_heads}; use "
            "gathered, or a cp (or a smaller tp) that divides them"
        )
    if override == "ring" and (packed or window is not None):
        what = "rows of several documents" if packed else f"a window of {window} tokens"
        raise ValueError(f"context_strategy='ring' knows nothing of {what}, as they are here; use gathered or heads")
    return override or ("heads" if fits and cp > group + 1 else "gathered")


def _by_heads(
    among: Callable[..., jax.Array],
    c: int,
    axis: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """An all-to-all there and one back, and as many to go backward."""
    together = jnp.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)
    together = lax.all_to_all(together, axis, 2, 1, tiled=True)
    together = row_of(in_order(chunked(together, 2 * c)))
    segments = None if segments is None else row_of(in_order(chunked(segments, 2 * c)))
    out = among(together[:, :, :, :-2], together[:, :, :, -2], together[:, :, :, -1], segment_ids=segments)
    return lax.all_to_all(row_of(zigzag(chunked(out, 2 * c))), axis, 1, 2, tiled=True)
