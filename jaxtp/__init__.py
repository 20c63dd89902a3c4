"""jaxtp: a Llama on more than one GPU, in JAX.

from jaxtp import LLM, SamplingParams

llm = LLM("path/to/checkpoint", tensor_parallel_size=4)
for request in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
    print(request.outputs[0].text)
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtp.config import ModelConfig
    from jaxtp.draw import draw_context, draw_schedule, draw_shardings
    from jaxtp.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxtp.engine.params import SamplingParams
    from jaxtp.generate import LLM
    from jaxtp.mesh import AXES, make_mesh, use_virtual_devices
    from jaxtp.model import Cache, Llama
    from jaxtp.parallel.schedules import Circulation, Schedule
    from jaxtp.planner import Plan, plan
    from jaxtp.presets import PRESETS, preset
    from jaxtp.sharding import Rules
    from jaxtp.weights import describe

__all__ = [
    "AXES",
    "LLM",
    "PRESETS",
    "Cache",
    "Circulation",
    "CompletionOutput",
    "Llama",
    "Logprob",
    "ModelConfig",
    "Plan",
    "RequestOutput",
    "Rules",
    "SamplingParams",
    "Schedule",
    "describe",
    "draw_context",
    "draw_schedule",
    "draw_shardings",
    "make_mesh",
    "plan",
    "preset",
    "use_virtual_devices",
]

_ROOMS = {  # where each name lives; a room is entered when one of its names is asked for, so that importing jaxtp is free
    "config": ("ModelConfig",),
    "draw": ("draw_context", "draw_schedule", "draw_shardings"),
    "engine.outputs": ("CompletionOutput", "Logprob", "RequestOutput"),
    "engine.params": ("SamplingParams",),
    "generate": ("LLM",),
    "mesh": ("AXES", "make_mesh", "use_virtual_devices"),
    "model": ("Cache", "Llama"),
    "parallel.schedules": ("Circulation", "Schedule"),
    "planner": ("Plan", "plan"),
    "presets": ("PRESETS", "preset"),
    "sharding": ("Rules",),
    "weights": ("describe",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        found = getattr(importlib.import_module(f"jaxtp.{_ROOM_OF[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and importlib.util.find_spec(f"jaxtp.{name}"):  # import jaxtp; jaxtp.distributed.processes(...)
        return importlib.import_module(f"jaxtp.{name}")
    raise AttributeError(f"module 'jaxtp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
