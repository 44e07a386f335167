"""LLaVA on Llama (Vicuna): LLaVA-1.5, LLaVA-1.6 on Vicuna and Yi."""

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.causal import LlavaCausalLM, LlavaDecoder


class LlavaConfig(LlamaConfig):
    """A Llama config with LLaVA's `mm_*` keys, which pass through as they are in config.json."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaDecoder, LlamaModel):
    """The decoder with a vision tower and a projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):
    """LLaVA on Llama."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        """See `LlavaCausalLM.build`."""
        super(LlamaForCausalLM, self).__init__(config)
        self.build(config, LlavaLlamaModel)


# `AutoConfig` finds the config by `llava.auto_classes`. transformers has another class called LlavaConfig.
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
