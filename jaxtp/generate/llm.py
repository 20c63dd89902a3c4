"""LLM: prompts in, text out, on any mesh. The interface is vLLM's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtp import compilation_cache
from jaxtp.buckets import MAX_NUM_SEQS
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Quantization
from jaxtp.engine.arguments import check_engine, check_ids, check_request
from jaxtp.engine.build import build
from jaxtp.engine.engine import Engine
from jaxtp.engine.outputs import RequestOutput
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.programs import Programs
from jaxtp.engine.request import Listener, Request
from jaxtp.engine.work import Policy
from jaxtp.generate import memory
from jaxtp.generate.auto import Choice, split_of
from jaxtp.generate.load import eos_of, load_model, tokenizer_of
from jaxtp.generate.prompts import Prompt, listed, token_id
from jaxtp.generate.timing import Timing
from jaxtp.log import console, interactive, logger, show
from jaxtp.mesh import told
from jaxtp.model import Llama
from jaxtp.ops.attention import Kernel
from jaxtp.ops.coded import CacheDtype
from jaxtp.ops.experts import Products
from jaxtp.parallel.circulate import stages_of
from jaxtp.parallel.compressed import Compression
from jaxtp.planner import Split
from jaxtp.sharding import ExpertDispatch, ExpertLayout
from jaxtp.text import Tokenizer


class LLM:
    """A model on a mesh that generates text.

    model: a checkpoint folder, a hub id, "demo" (a small model that ships with the package), with load_format="dummy" also the
    name of a preset, or a `Llama` that is loaded (on the mesh, and with the dtype and plan, that it has).
    tensor_parallel_size × pipeline_parallel_size × data_parallel_size × expert_parallel_size × context_parallel_size devices
    are used, or as many as `plan` says: "auto" takes all devices at hand, in the layout that the planner holds best for one
    request; a `Plan` its own.
    With stages, groups of rows circulate through them, at best as many as there are stages. layers_per_stage: their sizes
    (default: balanced). expert_parallel_size: groups of devices that hold different experts, and rows of their own.
    context_parallel_size: devices over which the slots of each row's cache are spread, for long rows and for models with fewer
    KV heads than devices; the weights lie over them and tp together (`Rules.cache_parallel`).
    dtype: "auto" is the checkpoint's. quantization: "int8", "fp8" or "int4" rounds layers' kernels as they are loaded; those
    of quantized checkpoints stay. kv_cache_dtype: "int8" or "fp8" keeps keys and values in 8 bits, with a scale for each token
    and head. compress_all_reduce: "int8" sends the sums of tp (and cp) in 8 bits, for slow links (`parallel.compressed`).
    lora: an adapter in PEFT's format, a folder or a hub id, merged into the weights as they are loaded.
    max_model_len: tokens of prompt and completion together (default: the model's own, which is its RoPE scaling's).
    gpu_memory_utilization: the share of each device's memory that weights and KV cache may take. kv_cache_memory_bytes: what
    the cache takes of each device (default: what the weights leave of that share; on CPUs 256 MiB, or what a few requests
    need).
    max_num_seqs: rows that run together. max_num_batched_tokens: tokens of one step (default: as many as it can have before it
    takes longer). enable_prefix_caching: prompts that begin alike share what was computed. scheduling_policy: "fcfs" or
    "priority". max_num_queued: requests that may wait (default: any number). tp_plan, sequence_parallel, expert_layout, kernel,
    expert_kernel: see `Llama.from_pretrained`. expert_dispatch: how tokens come to experts on ep, "gather" (all to all of its
    devices) or "ragged" (each to those that it chose: fewer bytes, the same tokens). seed: of requests that have none. Over
    several processes (`distributed.processes`) each of them makes the same calls; tp, and cp with it, stays within a process
    unless tp_across_nodes. Raises FileNotFoundError or ValueError, before any device work where it can be known then.
    """

    def __init__(
        self,
        model: str | Path | Llama,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        context_parallel_size: int = 1,
        layers_per_stage: Sequence[int] | None = None,
        plan: Choice | None = None,
        dtype: str = "auto",
        quantization: Quantization | None = None,
        kv_cache_dtype: CacheDtype = "auto",
        compress_all_reduce: Compression | None = None,
        lora: str | Path | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        scheduling_policy: Policy = "fcfs",
        max_num_queued: int | None = None,
        load_format: str = "auto",
        tp_plan: str | Mapping[str, str] = "auto",
        sequence_parallel: bool = False,
        expert_layout: ExpertLayout = "auto",
        expert_dispatch: ExpertDispatch = "gather",
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        tp_across_nodes: bool = False,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if progress:
            show()
        optional = {
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_num_queued": max_num_queued,
        }
        check_engine(
            model,
            counts={
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": pipeline_parallel_size,
                "data_parallel_size": data_parallel_size,
                "expert_parallel_size": expert_parallel_size,
                "context_parallel_size": context_parallel_size,
                "max_num_seqs": max_num_seqs,
                **{name: value for name, value in optional.items() if value is not None},
            },
            layers_per_stage=layers_per_stage,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            load_format=load_format,
            hf_overrides=hf_overrides,
            seed=seed,
            switches={
                "sequence_parallel": sequence_parallel,
                "tp_across_nodes": tp_across_nodes,
                "enable_prefix_caching": enable_prefix_caching,
                "progress": progress,
            },
            policy=scheduling_policy,
        )
        split = Split(
            dp=data_parallel_size,
            pp=pipeline_parallel_size,
            cp=context_parallel_size,
            ep=expert_parallel_size,
            tp=tensor_parallel_size,
        )
        if isinstance(model, Llama) and quantization not in (None, model.quantization):
            raise ValueError(f"quantization={quantization!r} is said when a model is loaded, as this one is already")
        if isinstance(model, Llama) and kv_cache_dtype not in ("auto", model.kv_cache_dtype):
            raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is said when a model is made, as this one is already")
        if isinstance(model, Llama) and compress_all_reduce:
            raise ValueError(
                f"compress_all_reduce={compress_all_reduce!r} is said when a model is made, as this one is already"
            )
        if isinstance(model, Llama) and lora is not None:
            raise ValueError(f"lora={str(lora)!r} is merged when a model is loaded, as this one is already")
        if plan is not None and (split != Split() or isinstance(model, Llama)):
            raise ValueError("plan says how the model is split; it goes with no parallel sizes and no loaded model")
        memory.reserve(gpu_memory_utilization)
        compilation_cache.use()

        def planned(config: ModelConfig, dtype: str) -> Split:
            if plan is None:
                return split
            limits: dict[str, Any] = {"utilization": gpu_memory_utilization, "max_model_len": max_model_len}
            return split_of(plan, config, dtype=dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype, **limits)

        start = time.perf_counter()
        self.model = (
            model
            if isinstance(model, Llama)
            else load_model(
                model,
                load_format,
                planned,
                sizes=layers_per_stage,
                dtype=None if dtype == "auto" else dtype,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                compress_all_reduce=compress_all_reduce,
                lora=lora,
                tp_plan=tp_plan,
                sequence_parallel=sequence_parallel,
                expert_layout=expert_layout,
                expert_dispatch=expert_dispatch,
                kernel=kernel,
                expert_kernel=expert_kernel,
                across=tp_across_nodes,
                hf_overrides=hf_overrides,
                revision=revision,
                progress=progress,
            )
        )
        self.config = self.model.config
        source = tokenizer or self.model.source
        self.tokenizer = source if isinstance(source, Tokenizer) else tokenizer_of(source, asked=tokenizer is not None)
        self.eos = eos_of(self.config, self.model.source, hf_overrides or {}, self.tokenizer)
        self.programs = Programs(self.model)
        self.budget = memory.budget(self.model, utilization=gpu_memory_utilization, cache_bytes=kv_cache_memory_bytes)
        self.max_model_len = memory.context(self.config, self.budget, max_model_len)
        asked = kv_cache_memory_bytes is not None
        self.cache_tokens = memory.pool_tokens(self.model, self.budget, self.max_model_len, asked=asked)
        self.max_num_seqs = max_num_seqs
        self._engine = functools.partial(
            build,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=enable_prefix_caching,
            policy=scheduling_policy,
            max_num_queued=max_num_queued,
        )
        self.timing = Timing(self.programs, self.budget)  # of the last call of `generate`
        self._progress, self._seeds = progress, itertools.count(seed * 1_000_003)
        self._requests = itertools.count()
        self._hidden_said: set[str] = set()  # stop strings that no text shows
        self._idle_said: set[int] = set()  # numbers of stages that are kept busy
        self._report(time.perf_counter() - start)

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt (text, or a list of token ids); outputs are in the order of the prompts.

        sampling_params: one for all, or one for each. Raises ValueError for an empty batch, an empty prompt, one that leaves no
        room in `max_model_len`, and text without a tokenizer.
        """
        asked = self._asked(prompts, sampling_params)
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        timer = self.timing = Timing(self.programs, self.budget)
        bar = Progress(*columns, disable=not (self._progress and interactive()), transient=True, console=console)
        with bar, self._submitted(asked, stream=False) as requests, timer.watch(self.engine):
            rows = [output for request in requests for output in request.outputs]
            task = bar.add_task("", total=len(rows))
            while self.engine.step():
                bar.update(task, completed=sum(row.finish_reason is not None for row in rows))
        timer.report()
        return [self._output(request, prompt) for request, (prompt, _, _) in zip(requests, asked, strict=True)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """The same token by token: yields a request whenever it has grown. Its outputs are updated in place."""
        asked = self._asked(prompts, sampling_params)
        grown: list[Request] = []
        with self._submitted(asked, stream=True, listener=lambda request, updates: grown.append(request)) as requests:
            outputs = {
                id(request): self._output(request, prompt) for request, (prompt, _, _) in zip(requests, asked, strict=True)
            }
            while not all(request.finished for request in requests):
                self.engine.step()
                for request in grown:
                    output = outputs[id(request)]
                    output.finished = request.finished
                    yield output
                grown.clear()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation ([{"role": "user", "content": "…"}, …]) or several, by the model's own chat template.

        A content is a text or a list of parts, [{"type": "text", "text": "…"}, …]. chat_template: a template's name or source,
        instead of the model's own. continue_final_message (which goes with add_generation_prompt=False) goes on with the last
        message. tools: JSON schemas. chat_template_kwargs: what else the template knows, such as enable_thinking. Raises
        ValueError where the model has no chat template or that refuses.
        """
        template = {**(chat_template_kwargs or {}), "chat_template": chat_template, "tools": tools}
        template |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        return self.generate(self.chat_prompts(messages, template), sampling_params)

    def chat_prompts(self, messages: Sequence[Any], template: Mapping[str, Any] | None = None) -> list[list[int]]:
        """The token ids that `chat` completes. `template`: what else `Tokenizer.chat` takes. Raises ValueError as that does."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, and so no chat template")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        texts = [self.tokenizer.chat(turns, **(template or {})) for turns in (messages if several else [messages])]
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    @functools.cached_property
    def engine(self) -> Engine:
        """What runs requests, with its KV cache: made when it is first asked for."""
        return self._engine(
            self.model,
            self.programs,
            cache_tokens=self.cache_tokens,
            max_model_len=self.max_model_len,
            tokenizer=self.tokenizer,
            eos=self.eos,
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _asked(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[str | None, list[int], SamplingParams]]:
        """Each prompt as text and as ids, and its parameters; all are looked at before any of them runs."""
        each = listed(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(each)
        if len(params) != len(each):
            raise ValueError(f"{len(each)} prompts but {len(params)} sampling parameters")
        asked = []
        for prompt, wanted in zip(each, params, strict=True):
            ids = self._ids(prompt)
            if wanted.stop and self.tokenizer is None:
                raise ValueError("stop strings need a tokenizer, which this checkpoint has not: LLM(..., tokenizer=folder)")
            check_request(wanted, self.config, self.max_model_len)
            self._say_hidden(wanted)
            asked.append((prompt if isinstance(prompt, str) else None, ids, wanted))
        return asked

    @contextlib.contextmanager
    def _submitted(
        self, asked: list[tuple[str | None, list[int], SamplingParams]], *, stream: bool, listener: Listener | None = None
    ) -> Iterator[list[Request]]:
        """The requests, longest prompts first into the queue; what has not ended at the end is given up."""
        requests: dict[int, Request] = {}
        self._say_idle(sum(params.n for _, _, params in asked))
        try:
            for i in sorted(range(len(asked)), key=lambda i: -len(asked[i][1])):
                _, ids, params = asked[i]
                seed = next(self._seeds) % 2**32
                requests[i] = self.engine.submit(ids, params, seed=seed, stream=stream, listener=listener)
            yield [requests[i] for i in range(len(asked))]
        finally:
            for request in requests.values():
                self.engine.abort(request)

    def _output(self, request: Request, prompt: str | None) -> RequestOutput:
        return RequestOutput(next(self._requests), prompt, request.prompt, request.outputs, request.finished)

    def _say_idle(self, rows: int) -> None:
        """Says what so few rows waste that they do not fill the stages."""
        stages, groups = self.model.stages, self.model.layout.parts("batch")
        busy = -(-rows // groups)
        if self._progress and busy < stages and busy not in self._idle_said:
            self._idle_said.add(busy)
            few, enough = f"{rows} row{'s' * (rows > 1)}", stages * groups
            logger.warning(
                f"{few} on pp={stages}: each stage works in {busy} of {stages} ticks, {enough} rows would keep all busy"
            )

    def _say_hidden(self, params: SamplingParams) -> None:
        """Says of stop strings that no text will show. Once each."""
        if self.tokenizer is None or not params.skip_special_tokens:
            return
        for stop in params.stop:
            if stop not in self._hidden_said and (ids := self.tokenizer.hidden(stop)):
                self._hidden_said.add(stop)
                logger.warning(
                    "the stop string %r will not be found: it holds a special token, and those are left out of the text; "
                    "skip_special_tokens=False shows them, or stop_token_ids=%s ends at them",
                    stop,
                    ids,
                )

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer: give token ids, or LLM(..., tokenizer=folder)")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [token_id(token) for token in prompt]
        if not ids:
            raise ValueError("a prompt has no tokens; an empty text needs a tokenizer that adds a beginning-of-sequence token")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, but max_model_len is {self.max_model_len}, of which one is for the completion"
                f"; {memory.longer(self.config, len(ids) + 1)}"
            )
        check_ids("a prompt", ids, self.config.vocab_size)
        return ids

    def _report(self, seconds: float) -> None:
        budget, where = self.budget, told(self.model.layout.mesh.shape)
        logger.info("loaded %s in %.1f s on %s", self.model.source or "random weights", seconds, where)
        compilation_cache.say()
        logger.info("weights: %.2f GiB on each device", budget.weight_bytes / 2**30)
        if self.model.stacks:
            logger.info("%s", stages_of(self.model).told())
        size = self.cache_tokens // (budget.groups * budget.ranks) * budget.slot_bytes
        over = f", a row's over cp={budget.ranks}" if budget.ranks > 1 else ""
        logger.info("KV cache: %s tokens (%.2f GiB on each device%s)", f"{self.cache_tokens:,}", size / 2**30, over)
        concurrency = self.cache_tokens / self.max_model_len
        logger.info("maximum concurrency at %s tokens a request: %.1f×", f"{self.max_model_len:,}", concurrency)
