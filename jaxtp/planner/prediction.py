"""What the planner predicts of one way to do some work."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from jaxtp.config import ModelConfig
from jaxtp.planner import cost, memory
from jaxtp.planner.cluster import Cluster
from jaxtp.planner.cost import Machine, Time
from jaxtp.planner.memory import Memory
from jaxtp.planner.work import Generation, Split, Task, Training


@dataclass(frozen=True)
class Plan:
    """One way to do some work: what each device holds, and how long it takes. Where it cannot be, `refused` says why; full:
    memory is all that it lacks.
    """

    model: str
    config: ModelConfig
    cluster: Cluster
    split: Split
    task: Task
    refused: str | None = None
    full: bool = False

    @functools.cached_property
    def memory(self) -> Memory:
        """Bytes on each device."""
        if isinstance(self.task, Training):
            return memory.training(self.config, self.split, self.task)
        return memory.generation(self.config, self.split, self.task)

    @property
    def limit(self) -> float:
        """Bytes of each device that the work may take."""
        return self.cluster.memory * self.task.utilization

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.refused is None

    @property
    def holds(self) -> bool:
        """Whether memory is enough. Generation's workspace is what weights and cache leave; training has one limit for all."""
        if isinstance(self.task, Training):
            return self.memory.total <= self.limit
        return self.memory.arguments <= self.limit and self.memory.total <= self.cluster.memory

    @functools.cached_property
    def kv_tokens(self) -> int:
        """Tokens that the KV caches of all devices hold together."""
        assert isinstance(self.task, Generation)
        return memory.capacity(self.config, self.split, self.task, self.cluster.memory)

    @property
    def concurrency(self) -> float:
        """Requests of full length whose tokens the caches hold."""
        assert isinstance(self.task, Generation)
        return self.kv_tokens / self.task.request

    def of_rows(self, rows: int) -> Plan:
        """The same for a batch of so many rows."""
        return dataclasses.replace(self, task=dataclasses.replace(self.task, batch=rows))

    @functools.cached_property
    def most_rows(self) -> int:
        """Requests of full length that fit at once."""
        assert isinstance(self.task, Generation)
        whole = dataclasses.replace(self.task, output_len=self.task.request - self.task.prompt_len)
        longest, groups = dataclasses.replace(self, task=whole), self.split.groups
        most = max(0, self.kv_tokens) // groups // self.split.page_tokens(whole)  # of each group
        return groups * bisect.bisect(range(1, most + 1), False, key=lambda rows: not longest.of_rows(groups * rows).holds)

    @property
    def machine(self) -> Machine:
        """The rates that it is reckoned with."""
        task = self.task
        how = (task.quantization, task.kv_cache_dtype) if isinstance(task, Generation) else ()
        return Machine(self.config, self.split, self.cluster, task.dtype, *how)

    @functools.cached_property
    def prefill(self) -> Time:
        """Seconds to the first token."""
        assert isinstance(self.task, Generation)
        return cost.prefill(self.machine, self.task)

    @functools.cached_property
    def step(self) -> Time:
        """Seconds of a decode step, or of an update."""
        if isinstance(self.task, Training):
            return cost.train(self.machine, self.task)
        return cost.decode(self.machine, self.task)

    @property
    def seconds(self) -> float:
        """Of the whole work: prompts and completions, or an update."""
        if isinstance(self.task, Training):
            return self.step.total
        return self.prefill.total + (self.task.output_len - 1) * self.step.total

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs: tokens made, or learned from."""
        if isinstance(self.task, Training):
            return self.task.batch * self.task.seq_len / self.seconds
        return self.task.batch * self.task.output_len / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the data sheet says, of an update."""
        assert isinstance(self.task, Training)
        flops = cost.train_flops(self.config, self.task.seq_len)[0]
        return self.tokens_per_second * flops / self.cluster.size / (self.cluster.gpu.tflops * 1e12)

    @property
    def communication(self) -> float:
        """Its share of the time of a step."""
        return self.step.share("communication")

    def record(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON. Bytes and seconds."""
        found: dict[str, Any] = {
            "model": self.model,
            "gpus": str(self.cluster),
            "split": dataclasses.asdict(self.split),
            "task": {"kind": type(self.task).__name__.lower(), **dataclasses.asdict(self.task)},
            "refused": self.refused,
        }
        if self.full or self.fits:
            found |= {"memory": {**dataclasses.asdict(self.memory), "total": self.memory.total}}
            found |= {"step": {**dataclasses.asdict(self.step), "total": self.step.total}}
            found |= {"seconds": self.seconds, "tokens_per_second": self.tokens_per_second}
            if isinstance(self.task, Training):
                found |= {"mfu": self.mfu}
            else:
                found |= {"prefill": {**dataclasses.asdict(self.prefill), "total": self.prefill.total}}
                found |= {"kv_tokens": self.kv_tokens, "concurrency": self.concurrency, "most_rows": self.most_rows}
        return found
