"""Generation: `LLM`, prompts in and text out, on top of the engine."""

from jaxtp.engine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxtp.engine.params import SamplingParams
from jaxtp.generate.llm import LLM

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
