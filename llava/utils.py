"""What published clients import from here: `from llava.utils import disable_torch_init`. Nothing new belongs here."""

from llava.gone import look_up

__getattr__ = look_up(__name__)


def disable_torch_init() -> None:
    """Do nothing: transformers 5 builds models without initialising weights that are about to be loaded."""
