"""Let transformers' Auto classes know checkpoints of LLaVA after `import llava`, without importing anything for it.

All of them begin with `AutoConfig`, which asks the class of a model type for its config. Ours are gates: they import
the models and the processor when a checkpoint of their type is really asked for, and these register themselves.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

MODEL_TYPES = ("llava_llama", "llava_mistral", "llava_qwen2")
WATCHED = "transformers.models.auto.configuration_auto"


class ConfigGate:
    """Stands for the config class of its model type in transformers' table of configs."""

    model_type: str

    def __new__(cls, *arguments: object, **settings: object) -> object:
        """Return a config."""
        return cls._open()(*arguments, **settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **settings: object) -> object:
        """Return the config of a config.json, as `AutoConfig` wants it."""
        return cls._open().from_dict(config_dict, **settings)

    @classmethod
    def _open(cls) -> type:
        return import_module("llava.processor").CONFIGS[cls.model_type]


def introduce() -> None:
    """Register the gates: now if transformers' table is there, else when it is imported."""
    if WATCHED in sys.modules:
        _register(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Watcher())


def _register(module: ModuleType) -> None:
    for model_type in MODEL_TYPES:
        gate = type("ConfigGate", (ConfigGate,), {"model_type": model_type, "__module__": __name__})
        module.AutoConfig.register(model_type, gate, exist_ok=True)


class _Watcher(MetaPathFinder):
    """Waits for one module, and is gone when it is found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, and registers the gates in it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)
