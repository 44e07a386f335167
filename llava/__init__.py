"""LLaVA with TRIM: a vision-language model that reads only the image tokens a question needs.

Importing the package, or `llava.constants`, loads no deep-learning library: the exports below are looked up when
they are first used.
"""

import sys
from importlib import import_module

from llava.packages import start_command

__version__ = "1.1.0"

_EXPORTS = {
    "Answer": "llava.answer",
    "Llava": "llava.assistant",
    "LlavaConfig": "llava.model.language_model.llava_llama",
    "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
    "load_pretrained_model": "llava.model.builder",
}

if sys.argv[:1] == ["-m"]:  # `python -m llava...` is looking for its module: a command starts
    start_command()
# Not before a Python that is too old has been told so.
import_module("llava.auto_classes").introduce()
import_module("llava.gone").watch()

__all__ = ["Answer", "Llava", "LlavaConfig", "LlavaLlamaForCausalLM", "__version__", "load_pretrained_model"]


def __getattr__(name: str) -> object:
    """Import an export when it is first asked for."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
