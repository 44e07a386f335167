"""The model `llava_trim` of lmms-eval: how lmms-eval finds it, with no import of its code before it asks.

lmms-eval reads the entry points of the group `lmms_eval.models`; pyproject.toml names `describe_model`. docs/clients.md
has usage and options. Only lmms-eval imports this package.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def describe_model() -> "ModelManifest":
    """Return what lmms-eval registers: the name, and the class by its path, imported when somebody asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_trim", simple_class_path="llava.lmms.model.LlavaTrim")
