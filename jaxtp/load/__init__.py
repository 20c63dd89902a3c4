"""Load on a server with an OpenAI-compatible API: requests of known lengths at a known rate, and how they fare.

from jaxtp.load import Endpoint, Level, Lengths, TokenPrompts, measure

found = measure(Endpoint("http://localhost:8000"), TokenPrompts(Lengths(128), Lengths(64)), [Level(1, 32), Level(16, 64)])
print(found)
"""

from jaxtp.load.client import Answer, Endpoint
from jaxtp.load.figures import Figures, Levels
from jaxtp.load.prompts import Dataset, Lengths, Prompt, Source, TextPrompts, TokenPrompts
from jaxtp.load.run import Level, arrivals, measure

__all__ = [
    "Answer",
    "Dataset",
    "Endpoint",
    "Figures",
    "Lengths",
    "Level",
    "Levels",
    "Prompt",
    "Source",
    "TextPrompts",
    "TokenPrompts",
    "arrivals",
    "measure",
]
