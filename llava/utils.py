"""What published clients import from here: `from llava.utils import disable_torch_init`. Nothing new belongs here."""


def disable_torch_init() -> None:
    """Do nothing: transformers 5 builds models without initialising weights that are about to be loaded."""
