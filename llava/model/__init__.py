"""The model: towers, token reduction, projector, splice, language model, loading.

Under LLaVA's names its language models can be imported from here; they are looked up when they are first used.
"""

from importlib import import_module

from llava.gone import look_up

_EXPORTS = {
    "LlavaConfig": "llava.model.language_model.llava_llama",
    "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
    "LlavaMistralConfig": "llava.model.language_model.llava_mistral",
    "LlavaMistralForCausalLM": "llava.model.language_model.llava_mistral",
}
_refuse = look_up(__name__)


def __getattr__(name: str) -> object:
    """Import an export when it is first asked for."""
    return getattr(import_module(_EXPORTS[name]), name) if name in _EXPORTS else _refuse(name)
