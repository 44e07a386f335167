"""Load one Hugging Face module completely, or raise one line with what is missing."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from llava.errors import InputError


def resolve_name(name: str, folder: str | Path | None = None) -> str:
    """Find a tower: as given, else relative to the checkpoint that names it, else leave it to the hub.

    Args:
        name: path or hub id, as in `mm_vision_tower`.
        folder: the checkpoint folder, against which relative paths are tried as well.

    Returns:
        A path that exists, or the name itself.

    Raises:
        InputError: for something that can only be a path, and does not exist.
    """
    candidates = [Path(name).expanduser()]
    if folder and not candidates[0].is_absolute():
        candidates.append(Path(folder) / name)
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path:
        tried = " and ".join(str(candidate) for candidate in candidates)
        raise InputError(
            f"vision tower {name} is not there (tried {tried}); set mm_vision_tower to a folder or a hub id"
        )
    return name


def load_quietly(
    module: type[PreTrainedModel], name: str, *, what: str, optional: tuple[str, ...] = (), **kwargs: object
) -> tuple[PreTrainedModel, set[str]]:
    """`from_pretrained` without the report on the checkpoint's other half, but strict about this one.

    Args:
        module: the class to load.
        name: folder or hub id.
        what: the role, for messages.
        optional: weights that may be missing (the caller then must not use them).
        **kwargs: passed on.

    Returns:
        The loaded module, in evaluation mode, and the optional weights that are missing.

    Raises:
        InputError: when there is nothing of that name, the weights can't be read, or some are missing.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded, report = module.from_pretrained(name, output_loading_info=True, **kwargs)
    except Exception as error:
        # Many kinds: OSError (not there), hub and network errors, safetensors and pickle errors (broken file).
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what} {name} can't be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    missing = sorted(set(report["missing_keys"]) - set(optional))
    if missing:
        raise InputError(
            f"{what} {name} lacks {len(missing)} weights, first {missing[0]}: is it a full CLIP checkpoint?"
        )
    return loaded.eval(), set(report["missing_keys"])
