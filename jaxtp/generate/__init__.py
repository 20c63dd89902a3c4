"""Generation: one compiled step, two drivers (a device loop and a stream), and `LLM` on top."""

from jaxtp.engine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxtp.engine.params import SamplingParams
from jaxtp.generate.llm import LLM

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
