"""Llama: one forward for training, prefill and decode.

B batch, T tokens, D embed, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtp.checkpoint import adapters, hf
from jaxtp.checkpoint.names import KERNELS, scheme_of
from jaxtp.checks import whole
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization, Schemes
from jaxtp.files import local
from jaxtp.log import logger
from jaxtp.mesh import check_mesh, make_mesh, platform
from jaxtp.model import batch
from jaxtp.model.block import Block, Stacks, each_block
from jaxtp.model.cache import Cache, Lanes, LayerCache
from jaxtp.model.initial import drawn
from jaxtp.model.layers import Context, Norm, Step, kv_heads_held, residual_dim, scaled
from jaxtp.model.legal import check_model
from jaxtp.model.moe import Dispatch
from jaxtp.ops.attention import Kernel, capped
from jaxtp.ops.coded import CacheDtype
from jaxtp.ops.experts import Products
from jaxtp.ops.linear import Reduce, embed, linear
from jaxtp.ops.quantized import Quantized, quantize
from jaxtp.ops.rope import rotation
from jaxtp.sharding import ExpertLayout, Layout, Region, Rules, check_layout, on_each_device
from jaxtp.tp_plan import rules_from_plan
from jaxtp.weights import variables
from jaxtp.xla_flags import exact


class Llama(nnx.Module):
    """A decoder of the Llama family on a mesh.

    Built abstract: its weights are shapes with shardings until `load` fills them; `from_pretrained` and `random` do both.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: Mesh,
        rules: Rules = Rules(),
        dtype: str = "float32",
        quantization: Quantization | None = None,
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        dispatch: Dispatch | None = None,
        region: Region = on_each_device,
        stacks: Stacks = (),
        kv_cache_dtype: CacheDtype = "auto",
        reduce: Reduce | None = None,
        context: Context | None = None,
    ) -> None:
        """region: how attention and experts run on each device's own part. dispatch: what sends tokens along ep to the experts
        that they chose, for rules that leave them there, or where ep is mapped over (`parallel.experts`). expert_kernel: how
        experts multiply, default what `ops.experts.choose_products` takes. stacks: for each block the layers that it is, one on
        each rank of pp (None: none there); such blocks are run by `parallel.circulate`. kv_cache_dtype: of keys and values in
        caches, "int8" or "fp8" with a scale for each token and head. reduce: in place of the all-reduces after products
        (`parallel.compressed`). context: how attention goes over the axis of a row's tokens, or of a cache's slots, for rules
        that have one (`Rules.context_parallel`, `Rules.cache_parallel`; `parallel.context.Context`).
        Raises ValueError, before any device work, where the config cannot be laid out on the mesh by the rules.
        """
        config = config.quantized(quantization)
        check_model(
            config, mesh, rules, dtype=dtype, kernel=kernel, expert_kernel=expert_kernel, kv_cache_dtype=kv_cache_dtype,
            context=context, sent=dispatch is not None,
        )  # fmt: skip
        layout = Layout(mesh, rules, jnp.dtype(dtype))
        vocab = layout.at("head" if not config.tie_word_embeddings else "embed").pad("vocab", config.vocab_size)
        self.embed = layout.param("embed", vocab=vocab, embed=config.hidden_size)
        self.layers = nnx.List(
            Block(
                config,
                layer,
                layout=replace(layout.at(f"layers.{layer}"), stack=stack),
                kernel=kernel,
                expert_kernel=expert_kernel,
                dispatch=dispatch,
                region=region,
                reduce=reduce,
                context=context,
            )
            for layer, stack in each_block(config, rules, stacks)
        )
        self.norm = Norm(config, layout=layout.at("norm"))
        self.head = None if config.tie_word_embeddings else layout.param("head", vocab=vocab, embed=config.hidden_size)
        self.config, self.layout, self.stacks, self.kv_cache_dtype = config, layout, stacks, kv_cache_dtype
        self.context, self.dispatch = context, dispatch
        self.source: str | None = None  # the folder it was loaded from
        if config.schemes and config.schemes.method:  # of a checkpoint: so its weights are from the start
            for path, weight in variables(self):
                weight.set_value(self.kept(path, weight, weight.get_value()))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        lora: str | Path | None = None,
        tp_plan: str | Mapping[str, str] = "auto",
        sequence_parallel: bool = False,
        expert_layout: ExpertLayout = "auto",
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
        progress: bool = True,
    ) -> Llama:
        """Loads a Hugging Face checkpoint (a folder or a hub id) onto a mesh (default: one device).

        dtype: "float32", "bfloat16" or "float16"; default or "auto" the checkpoint's own. quantization: "int8", "fp8" or "int4"
        rounds layers' kernels at load (`config.quantization.made`); quantized checkpoints load as they are. lora: an adapter in
        PEFT's format (a folder or a hub id), merged into each weight in float32 as it is read. tp_plan: "auto", or globs of
        module names to transformers' styles (see `tp_plan.rules_from_plan`). expert_layout: how experts are cut over tp,
        "whole" ones or each one's "width" (default: whole where ep·tp divides their number). expert_kernel: how experts
        multiply (default: `ops.experts.choose_products`).
        Raises FileNotFoundError where there is no checkpoint and ValueError where it, its config, or the mesh do not fit.
        """
        folder = hf.resolve(model, revision=revision)
        config = hf.config_of(folder, overrides=hf_overrides)
        rules, mesh = rules_from_plan(tp_plan, config, sequence_parallel=sequence_parallel), mesh or make_mesh()
        sizes = check_mesh(mesh).shape
        rules = rules.expert_parallel(config, ep=sizes["ep"], tp=sizes["tp"], layout=expert_layout)
        check_layout(config, sizes["tp"], rules)
        dtype = config.dtype_of(dtype)
        made = cls(
            config, mesh=mesh, rules=rules, dtype=dtype, quantization=quantization, kernel=kernel, expert_kernel=expert_kernel
        )
        return made.load(folder, lora=lora, progress=progress)

    def load(self, folder: Path, *, lora: str | Path | None = None, schemes: Schemes | None = None, progress: bool) -> Llama:
        """Itself, with the weights of a checkpoint folder and an adapter in them. schemes: as the folder's are quantized, of a
        model that is not: read as what they stand for. Raises ValueError where they are not those of its config, or the adapter
        is for another model, or cannot be merged into quantized weights.
        """
        own = self.config.schemes
        if own and own.method and lora is not None:
            raise ValueError(
                f"lora={str(lora)!r} is merged into the weights of a checkpoint, and cannot be where these are quantized "
                f"({own.name}); take the checkpoint of 16 bits, with quantization='int8', 'fp8' or 'int4' if need be"
            )
        adapter = None if lora is None else adapters.Adapter(hf.resolve(lora), hf.shapes(self, self.config))
        merges = adapter.merges() if adapter else None
        scales = hf.load(self, self.config, folder, schemes=schemes or own, keep=self.kept, merges=merges, progress=progress)
        if scales and self.kv_cache_dtype == "fp8":
            logger.info("keys and values are kept in fp8 with the checkpoint's own scales")
            for block in self.layers:
                block.attention.scale_cache(scales)
        elif scales:
            logger.info("the checkpoint brings scales of keys and values: kv_cache_dtype='fp8' keeps a cache with them")
        self.source = str(folder)
        return self

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        rules: Rules = Rules(),
        dtype: str = "float32",
        quantization: Quantization | None = None,
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        dispatch: Dispatch | None = None,
        region: Region = on_each_device,
        stacks: Stacks = (),
        kv_cache_dtype: CacheDtype = "auto",
        reduce: Reduce | None = None,
        context: Context | None = None,
        seed: int = 0,
    ) -> Llama:
        """Random weights made on the devices, the same on every mesh: kernels N(0, 0.02²), norms' factors 1, biases 0."""
        mesh = mesh or make_mesh()
        model = cls(
            config,
            mesh=mesh,
            rules=rules,
            dtype=dtype,
            quantization=quantization,
            kernel=kernel,
            expert_kernel=expert_kernel,
            dispatch=dispatch,
            region=region,
            stacks=stacks,
            kv_cache_dtype=kv_cache_dtype,
            reduce=reduce,
            context=context,
        )
        plain = Llama(config, mesh=model.layout.mesh, rules=model.layout.rules, dtype=dtype, dispatch=dispatch, context=context)
        keys = {path: jax.random.fold_in(jax.random.key(seed), i) for i, (path, _) in enumerate(variables(plain))}
        for path, weight in variables(model):
            weight.set_value(model.kept(path, weight, drawn(path, weight, config, keys, jnp.dtype(dtype))))
        return model

    def kept(self, path: str, weight: nnx.Variable, value: Any) -> Any:
        """What is kept of a weight that was read or drawn, or of its shape: itself, or the kernel of a block quantized."""
        if self.config.schemes is None or path.rpartition(".")[2] not in KERNELS or isinstance(value, Quantized):
            return value
        scheme = scheme_of(self.config, path, weight)
        return value if scheme is None else quantize(value, scheme, path=path, stacked=bool(weight.get_metadata()["stack"]))

    @property
    def quantization(self) -> Quantization | None:
        """How its kernels are quantized, by name; None: they are not."""
        return self.config.schemes.name if self.config.schemes else None

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes a checkpoint folder that `transformers` loads, with the tokenizer files of the folder it came from."""
        if self.quantization:
            raise ValueError(
                f"quantization={self.quantization!r} rounded the weights that were loaded; save a model loaded without"
            )
        whole("max_shard_bytes", max_shard_bytes, least=1)
        source = Path(self.source) if self.source else None
        hf.save(self, self.config, local(folder), source=source, max_shard_bytes=max_shard_bytes)

    def __call__(
        self,
        tokens: jax.Array | np.ndarray,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """tokens [B, T] int32 -> logits [B, T, V] float32; with a cache: (logits, cache).

        positions [B, T] (default 0…T-1) turn the queries and keys and, with a cache of B pages (`empty_cache`), say which slots
        of its row's page each token takes. segment_ids [B, T]: attention stays inside a segment (packed documents; without a
        cache).

        Outside of `jax.jit` this compiles once per shape, and a given cache is donated.
        """
        if not isinstance(self.embed.get_value(), jax.core.Tracer):
            tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens, np.int32)
            groups = self.layout.parts("batch")
            if tokens.ndim != 2 or tokens.shape[0] % groups:
                raise ValueError(f"tokens of shape {tokens.shape} must be [B, T], and B a multiple of dp={groups}")
            if cache is not None and (cache.pages != tokens.shape[0] or segment_ids is not None):
                raise ValueError(
                    f"a cache of {cache.pages} pages is for as many rows without segment_ids; given: {tokens.shape[0]} rows"
                )
            return _compiled(self, tokens, positions, segment_ids, cache)
        (B, T), layout = tokens.shape, self.layout
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        if cache is None:
            order = None
            if layout.parts("tokens") > 1:
                assert self.context
                tokens, positions, segment_ids, order = batch.spread(self.context, tokens, positions, segment_ids)
            logits = self.logits(self.hidden(tokens, positions, segment_ids)[0])
            if order is not None:
                logits = layout.place(logits, "batch", None, "logits")[:, np.argsort(order)[:T]]
        else:
            lengths = batch.flat(layout, jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, (B, T)))
            lanes = batch.a_page_each(layout, positions, cache)
            tokens, positions = batch.flat(layout, tokens), batch.flat(layout, positions)
            x, cache = self.hidden(tokens, positions, lengths=lengths, cache=cache, lanes=lanes)
            logits = self.logits(x)
            logits = logits.reshape(B, T, -1, out_sharding=layout.sharding("batch", "tokens", "logits"))
        if logits.shape[-1] != self.config.vocab_size:  # padded for the mesh
            logits = layout.place(logits, "batch", "tokens", None)[..., : self.config.vocab_size]
        return logits if cache is None else (logits, cache)

    def hidden(
        self,
        tokens: jax.Array | np.ndarray,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        lengths: jax.Array | None = None,
        cache: Cache | None = None,
        lanes: Lanes | None = None,
        run: Callable[[jax.Array, Step], tuple[jax.Array, Any]] | None = None,
    ) -> tuple[jax.Array, Any]:
        """The same up to the last norm: [B, T, D] in the residual stream's layout; and the cache, where there is one.

        lengths: see `step`. lanes: with a cache, where in it the tokens go and what they see. run: another way to go through
        the blocks than one after another (without a cache), as training has; what it tells beside x comes in the cache's place.
        """
        if self.stacks:
            raise ValueError(
                f"this model's layers stand in {self.stages} stages, which LLM runs; for logits load it without pp"
            )
        place, shape = self.layout.place, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        positions = place(positions, "batch", "tokens")
        if segment_ids is not None:
            segment_ids = place(segment_ids, "batch", "tokens")
        step = self.step(positions, segment_ids, lengths=lengths, lanes=lanes)
        x = self.embedded(tokens)
        if run is not None:
            x, told = run(x, step)
            return self.norm(x), told
        layers: list[LayerCache | None] = []
        for i, block in enumerate(self.layers):
            x, layer, _ = block(x, step, None if cache is None else cache.layers[i])
            layers.append(layer)
        x = self.norm(x)
        return x, None if cache is None else Cache(tuple(layers))  # type: ignore[arg-type]

    @jax.named_scope("embedding")
    def embedded(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """tokens [B, T] -> [B, T, D] in the residual stream's layout."""
        tokens = self.layout.place(jnp.asarray(tokens, jnp.int32), "batch", "tokens")
        x = embed(self.embed[...], tokens, out=self.layout.sharding("batch", residual_dim(tokens.shape[1], self.layout), None))
        if self.config.scaled_embedding:  # in the model's dtype, as Gemma was trained
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return scaled(x, self.config.embedding_multiplier)

    def step(
        self,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        lengths: jax.Array | None = None,
        lanes: Lanes | None = None,
    ) -> Step:
        """What every layer needs to know of tokens at `positions` [B, T]; in the segment 0 they are padding.

        lengths [B, T] or [B, 1]: tokens of each one's row so far, a prompt counting whole from the start (default: of a row
        that ends here).
        """
        config, lengths = self.config, positions.max(axis=1, keepdims=True) + 1 if lengths is None else lengths
        turn = functools.partial(rotation, head_dim=config.head_dim, max_position=config.max_position_embeddings)
        where = platform(self.layout.mesh)
        ropes = {name: turn(rope, positions, lengths, platform=where) for name, rope in config.ropes.items()}
        counted = None
        if segment_ids is not None:
            counted = (segment_ids != 0).astype(jnp.float32)
            segment_ids = self.layout.place(segment_ids, "batch", None)
        return Step(ropes, positions, segment_ids, lanes, counted)

    @jax.named_scope("head")
    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, V'] float32, V' the vocabulary as held (padded to what the mesh divides)."""
        table, layout = (self.embed, self.layout.at("embed")) if self.head is None else (self.head, self.layout.at("head"))
        x = self.layout.gather(x)
        logits = linear(x, table[...], out=layout.sharding("batch", "tokens", "logits"), dtype=jnp.float32)
        return capped(scaled(logits, 1 / self.config.logits_scaling), self.config.logits_softcap)

    @property
    def vocab_held(self) -> int:
        """V': the vocabulary as held, padded to what the mesh divides."""
        return self.embed.get_value().shape[0]

    @property
    def stages(self) -> int:
        """How many stages the blocks stand in, one on each rank of pp."""
        return len(self.stacks[0]) if self.stacks else 1

    def empty_cache(self, pages: int, slots: int) -> Cache:
        """An abstract cache of `pages` pages, of all groups together, of `slots` tokens each: for `__call__` a page is a row's.
        Its `.zeros()`, inside a program, makes it.
        """
        config, first = self.config, self.layers[0].attention.layout.at("qkv")
        if slots % (parts := first.parts("cached")):
            raise ValueError(f"pages of {slots} slots cannot be cut into {parts} parts, over cp; use a multiple of {parts}")
        return Cache.abstract(
            first,
            # XLA:CPU would carry a 16-bit cache through the decode loop in float32 and convert all of it at every step
            dtype=jnp.dtype(jnp.float32) if platform(first.mesh) == "cpu" else first.dtype,
            bits=self.kv_cache_dtype,
            blocks=len(self.layers),
            kv_heads=kv_heads_held(config, first),
            head_dim=config.head_dim,
            pages=pages,
            slots=slots,
        )


@functools.partial(jax.jit, donate_argnames="cache")
def _compiled(
    model: Llama, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None
) -> jax.Array | tuple[jax.Array, Cache]:
    with exact(model.layout.mesh, model.layout.dtype):
        return model(tokens, positions, segment_ids, cache)
