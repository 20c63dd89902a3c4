"""Between text and token ids: a checkpoint's tokenizer and chat template, text that grows token by token, and stop strings."""

from jaxtp.text.grow import GrowingText
from jaxtp.text.stops import find_stop, held
from jaxtp.text.tokenizer import Tokenizer

__all__ = ["GrowingText", "Tokenizer", "find_stop", "held"]
