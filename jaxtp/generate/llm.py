"""LLM: prompts in, text out, on any mesh. The interface is vLLM's."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtp import compilation_cache
from jaxtp.buckets import MAX_BATCHED_TOKENS, MAX_NUM_SEQS
from jaxtp.config import ModelConfig
from jaxtp.engine.outputs import RequestOutput
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.programs import Programs
from jaxtp.generate import memory
from jaxtp.generate.arguments import check_engine, check_ids, check_request
from jaxtp.generate.auto import Choice, split_of
from jaxtp.generate.batch import Batch, slots_needed
from jaxtp.generate.load import eos_of, load_model, tokenizer_of
from jaxtp.generate.prompts import Prompt, listed, token_id
from jaxtp.generate.request import Row
from jaxtp.generate.step import CALL_TOKENS
from jaxtp.generate.timing import Timing
from jaxtp.log import console, interactive, logger, show
from jaxtp.mesh import told
from jaxtp.model import Llama
from jaxtp.ops.attention import Kernel
from jaxtp.ops.quantized import Quantization
from jaxtp.parallel.circulate import stages_of
from jaxtp.planner import Split
from jaxtp.text import Tokenizer


class LLM:
    """A model on a mesh that generates text.

    model: a checkpoint folder, a hub id, "demo" (a small model that ships with the package), with load_format="dummy" also the
    name of a preset, or a `Llama` that is loaded (on the mesh, and with the dtype and plan, that it has).
    tensor_parallel_size × pipeline_parallel_size × data_parallel_size devices are used, or as many as `plan` says: "auto" takes
    all devices at hand, in the layout that the planner holds best for one request; a `Plan` its own. With stages, groups of
    rows circulate through them, at best as many as there are stages. layers_per_stage: their sizes (default: balanced).
    dtype: "auto" is the checkpoint's. quantization: "int8" keeps the layers' kernels in 8 bits, rounded as they are loaded.
    lora: an adapter in PEFT's format, a folder or a hub id, merged into the weights as they are loaded.
    max_model_len: tokens of prompt and completion together (default: the model's own, which is its RoPE scaling's).
    gpu_memory_utilization: the share of each device's memory that weights and KV cache may take. max_num_seqs: rows that run
    together. max_num_batched_tokens: prompt tokens that one prefill call takes. tp_plan, sequence_parallel, kernel: see
    `Llama.from_pretrained`. seed: of requests that have none. Over several processes (`distributed.processes`) each of them
    makes the same calls; tp stays within a process unless tp_across_nodes. Raises FileNotFoundError or ValueError, before any
    device work where it can be known then.
    """

    def __init__(
        self,
        model: str | Path | Llama,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        layers_per_stage: Sequence[int] | None = None,
        plan: Choice | None = None,
        dtype: str = "auto",
        quantization: Quantization | None = None,
        lora: str | Path | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_BATCHED_TOKENS,
        load_format: str = "auto",
        tp_plan: str | Mapping[str, str] = "auto",
        sequence_parallel: bool = False,
        kernel: Kernel | None = None,
        tp_across_nodes: bool = False,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if progress:
            show()
        check_engine(
            model,
            counts={
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": pipeline_parallel_size,
                "data_parallel_size": data_parallel_size,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
            },
            layers_per_stage=layers_per_stage,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            load_format=load_format,
            hf_overrides=hf_overrides,
            seed=seed,
            switches={"sequence_parallel": sequence_parallel, "tp_across_nodes": tp_across_nodes, "progress": progress},
        )
        split = Split(tp=tensor_parallel_size, pp=pipeline_parallel_size, dp=data_parallel_size)
        if isinstance(model, Llama) and quantization not in (None, model.quantization):
            raise ValueError(f"quantization={quantization!r} is said when a model is loaded, as this one is already")
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
            return split_of(plan, config, dtype=dtype, quantization=quantization, **limits)

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
                lora=lora,
                tp_plan=tp_plan,
                sequence_parallel=sequence_parallel,
                kernel=kernel,
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
        self.budget = memory.budget(self.model, utilization=gpu_memory_utilization)
        self.max_model_len = memory.context(self.config, self.budget, max_model_len)
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.timing = Timing(self.programs, self.budget)  # of the last call of `generate`
        self._progress, self._seeds = progress, itertools.count(seed * 1_000_003)
        self._requests = itertools.count()
        self._idle_said: set[int] = set()  # what was said of stages that idle
        self._hidden_said: set[str] = set()  # and of stop strings that no text shows
        self._report(time.perf_counter() - start)

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt (text, or a list of token ids); outputs are in the order of the prompts.

        sampling_params: one for all, or one for each. Raises ValueError for an empty batch, an empty prompt, one that leaves no
        room in `max_model_len`, and text without a tokenizer.
        """
        requests, rows = self._requests_of(prompts, sampling_params)
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        timer = self.timing = Timing(self.programs, self.budget)
        with Progress(*columns, disable=not (self._progress and interactive()), transient=True, console=console) as bar:
            task = bar.add_task("", total=len(rows))
            for batch in self._batches(rows):
                for _ in timer.watch(batch, steps=CALL_TOKENS):
                    bar.update(task, completed=sum(row.finished for row in rows))
        timer.report()
        for request in requests:
            request.finished = True
        return requests

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """The same token by token: yields a request whenever it has grown. Its outputs are updated in place."""
        requests, rows = self._requests_of(prompts, sampling_params)
        owner = {id(output): request for request in requests for output in request.outputs}
        for batch in self._batches(rows):
            grown = [0] * len(batch.rows)
            for _ in batch.run(steps=1, show=True):
                for i, row in enumerate(batch.rows):
                    if len(row.output.token_ids) > grown[i]:
                        grown[i] = len(row.output.token_ids)
                        request = owner[id(row.output)]
                        request.finished = all(output.finish_reason for output in request.outputs)
                        yield request

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

    def compile(
        self, *, batch: int, prompt_tokens: int, max_tokens: int, sampling_params: SamplingParams | None = None
    ) -> float:
        """Compiles ahead of time what `generate` needs for `batch` prompts, the longest of `prompt_tokens` tokens.

        Shapes come in buckets (see `buckets`): other numbers that fall into the same ones need nothing more.

        `sampling_params` says which parts of sampling to compile in. Returns the seconds that it took.
        """
        before = self.programs.compile_seconds
        params = dataclasses.replace(sampling_params or SamplingParams(), max_tokens=max_tokens, n=1, seed=0)
        prompt = [0] * min(prompt_tokens, self.max_model_len - 1)
        _, rows = self._requests_of([prompt] * batch, params)
        for group in self._batches(rows):
            group.warm_up()
        return self.programs.compile_seconds - before

    # -- inside --------------------------------------------------------------------------------------------------------

    def _requests_of(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[RequestOutput], list[Row]]:
        each = listed(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(each)
        if len(params) != len(each):
            raise ValueError(f"{len(each)} prompts but {len(params)} sampling parameters")
        requests, rows = [], []
        for prompt, wanted in zip(each, params, strict=True):
            ids = self._ids(prompt)
            if wanted.stop and self.tokenizer is None:
                raise ValueError("stop strings need a tokenizer, which this checkpoint has not: LLM(..., tokenizer=folder)")
            check_request(wanted, self.config, self.max_model_len)
            self._say_hidden(wanted)
            seed = wanted.seed if wanted.seed is not None else next(self._seeds) % 2**32
            mine = [
                Row(ids, wanted, index=i, seed=seed, limit=self.max_model_len, eos=self.eos, tokenizer=self.tokenizer)
                for i in range(wanted.n)
            ]
            rows += mine
            text = prompt if isinstance(prompt, str) else None
            requests.append(RequestOutput(next(self._requests), text, ids, [row.output for row in mine]))
        return requests, rows

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

    def _batches(self, rows: list[Row]) -> Iterator[Batch]:
        """Rows in batches that fit the KV cache, the longest prompts first."""
        waiting = sorted(rows, key=lambda row: -len(row.prompt))
        while waiting:
            count = 1
            while count < min(len(waiting), self.max_num_seqs) and self._fits(waiting[: count + 1]):
                count += 1
            batch = Batch(self.model, self.programs, waiting[:count], chunk_tokens=self.max_num_batched_tokens)
            self._say_idle(batch)
            yield batch
            waiting = waiting[count:]

    def _say_idle(self, batch: Batch) -> None:
        """What a batch wastes that is too small for the stages."""
        stages, rows = self.model.stages, len(batch.rows)
        groups = -(-rows * batch.groups // batch.size)  # those that hold any row
        if self._progress and groups < stages and groups not in self._idle_said:
            self._idle_said.add(groups)
            few, enough = f"{rows} row{'s' * (rows > 1)}", stages * self.model.layout.parts("batch")
            logger.warning(
                f"{few} on pp={stages}: each stage works in {groups} of {stages} ticks, {enough} rows would keep all busy"
            )

    def _fits(self, rows: Sequence[Row]) -> bool:
        return slots_needed(self.model, rows, self.max_num_batched_tokens) <= self.budget.cache_tokens

    def _report(self, seconds: float) -> None:
        budget, where = self.budget, told(self.model.layout.mesh.shape)
        logger.info("loaded %s in %.1f s on %s", self.model.source or "random weights", seconds, where)
        compilation_cache.say()
        logger.info("weights: %.2f GiB on each device", budget.weight_bytes / 2**30)
        if self.model.stacks:
            logger.info("%s", stages_of(self.model).told())
        logger.info("KV cache: %s tokens (%.2f GiB on each device)", f"{budget.cache_tokens:,}", budget.cache_bytes / 2**30)
        concurrency = budget.cache_tokens / self.max_model_len
        logger.info("maximum concurrency at %s tokens a request: %.1f×", f"{self.max_model_len:,}", concurrency)
