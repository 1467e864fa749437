"""Reference models in Flax NNX, with loaders for local folders in Hugging Face layout."""

from jaxcomp.io.stacked import densified
from jaxcomp.models.attention import Attending
from jaxcomp.models.bert import Bert, BertConfig
from jaxcomp.models.generate import generate
from jaxcomp.models.gpt2 import GPT2, GPT2Config
from jaxcomp.models.llama import Llama, LlamaConfig
from jaxcomp.models.loading import (
    Model,
    build,
    from_hf,
    load,
    load_architecture,
    read_config,
    save,
    to_hf,
)
from jaxcomp.models.mixtral import Mixtral, MixtralConfig
from jaxcomp.models.partition import partition_rules
from jaxcomp.models.sizes import config_of

__all__ = [
    "GPT2",
    "Attending",
    "Bert",
    "BertConfig",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Mixtral",
    "MixtralConfig",
    "Model",
    "build",
    "config_of",
    "densified",
    "from_hf",
    "generate",
    "load",
    "load_architecture",
    "partition_rules",
    "read_config",
    "save",
    "to_hf",
]
