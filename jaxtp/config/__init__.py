"""ModelConfig: the mathematics of a Llama-family model, read from and written to a Hugging Face `config.json`.

Nothing here knows of devices. `families` is the table of what each family fixes, `experts` mixture of experts, `rope` rotary
embedding, `keys` the settings that change nothing, `reader` makes a config's arguments of a `config.json`, `model` is the
config. A setting that this library does not implement raises and is named, because a model that runs with a setting ignored is
a wrong model.
"""

from jaxtp.config.experts import Experts
from jaxtp.config.families import FAMILIES, Activation, Family, NormForm, NormPosition
from jaxtp.config.keys import DTYPES
from jaxtp.config.model import Kind, ModelConfig, RopeName
from jaxtp.config.rope import ROPE_TYPES, Rope

__all__ = [
    "DTYPES",
    "FAMILIES",
    "ROPE_TYPES",
    "Activation",
    "Experts",
    "Family",
    "Kind",
    "ModelConfig",
    "NormForm",
    "NormPosition",
    "Rope",
    "RopeName",
]
