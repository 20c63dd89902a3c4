"""Generation: one compiled step, two drivers (a device loop and a stream), and `LLM` on top."""

from jaxtp.generate.llm import LLM
from jaxtp.engine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxtp.engine.params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
