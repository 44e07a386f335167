"""LLaVA on Mistral: LLaVA-1.6, with a sliding window or without."""

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
)

from llava.model.language_model.causal import LlavaCausalLM, LlavaDecoder


class LlavaMistralConfig(MistralConfig):
    """A Mistral config with LLaVA's `mm_*` keys, which pass through as they are in config.json."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaDecoder, MistralModel):
    """The decoder with a vision tower and a projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """LLaVA on Mistral."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig):
        """See `LlavaCausalLM.build`."""
        super(MistralForCausalLM, self).__init__(config)
        self.build(config, LlavaMistralModel)


# `AutoConfig` finds the config by `llava.auto_classes`.
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LlavaMistralConfig, LlavaMistralForCausalLM, exist_ok=True)
