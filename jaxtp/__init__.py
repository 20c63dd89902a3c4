"""jaxtp: a Llama on more than one GPU, in JAX.

from jaxtp import LLM, SamplingParams

llm = LLM("path/to/checkpoint", tensor_parallel_size=4)
for request in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
    print(request.outputs[0].text)
"""

from jaxtp.config import ModelConfig
from jaxtp.draw import draw_schedule, draw_shardings
from jaxtp.generate import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams
from jaxtp.mesh import AXES, make_mesh, use_virtual_devices
from jaxtp.model import Cache, Llama
from jaxtp.parallel.schedules import Circulation, Schedule
from jaxtp.planner import Plan, plan
from jaxtp.presets import PRESETS, preset
from jaxtp.sharding import Rules, describe

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
    "draw_schedule",
    "draw_shardings",
    "make_mesh",
    "plan",
    "preset",
    "use_virtual_devices",
]
