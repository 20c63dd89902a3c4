"""The model: NNX modules whose weights name their dims, and the KV cache. It knows nothing of how it is parallelised."""

from jaxtp.model.cache import Cache, Lanes
from jaxtp.model.llama import Llama

__all__ = ["Cache", "Lanes", "Llama"]
