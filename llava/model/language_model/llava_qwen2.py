"""LLaVA on Qwen2 and Qwen1.5, whose queries, keys and values have biases."""

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.language_model.causal import LlavaCausalLM, LlavaDecoder


class LlavaQwen2Config(Qwen2Config):
    """A Qwen2 config with LLaVA's `mm_*` keys, which pass through as they are in config.json."""

    model_type = "llava_qwen2"


class LlavaQwen2Model(LlavaDecoder, Qwen2Model):
    """The decoder with a vision tower and a projector."""

    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(LlavaCausalLM, Qwen2ForCausalLM):
    """LLaVA on Qwen2."""

    config_class = LlavaQwen2Config

    def __init__(self, config: LlavaQwen2Config):
        """See `LlavaCausalLM.build`."""
        super(Qwen2ForCausalLM, self).__init__(config)
        self.build(config, LlavaQwen2Model)


# `AutoConfig` finds the config by `llava.auto_classes`.
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LlavaQwen2Config, LlavaQwen2ForCausalLM, exist_ok=True)
