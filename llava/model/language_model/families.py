"""The language models that LLaVA is on: which class reads a checkpoint, by the `model_type` of its config.json."""

from dataclasses import dataclass

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from llava.model.config_rules import family_of
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM


@dataclass(frozen=True)
class Family:
    """The classes of a language model.

    Attributes:
        config: of LLaVA on it.
        model: LLaVA on it.
        plain: the language model alone.
    """

    config: type[PreTrainedConfig]
    model: type[LlavaCausalLM]
    plain: type[PreTrainedModel]


FAMILIES = {
    "llama": Family(LlavaConfig, LlavaLlamaForCausalLM, LlamaForCausalLM),
    "mistral": Family(LlavaMistralConfig, LlavaMistralForCausalLM, MistralForCausalLM),
    "qwen2": Family(LlavaQwen2Config, LlavaQwen2ForCausalLM, Qwen2ForCausalLM),
}


def classes_of(config: PreTrainedConfig) -> Family:
    """Return the classes of a config, a LLaVA's or a plain language model's."""
    return FAMILIES[family_of(config.model_type)]
