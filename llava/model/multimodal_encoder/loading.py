"""Load one Hugging Face module completely, or raise one line with what is missing."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.config_rules import CONFIG_FILE, SIGLIP_TYPES, check_generation_config
from llava.model.hf_layout import rename
from llava.model.stored_weights import (
    COPY_AGAIN,
    check_dtypes,
    check_finite,
    check_shapes,
    find_file,
    first_line,
    holds_weights,
    is_ignored,
    list_weight_files,
    read_dtypes,
    read_shapes,
    refuse_missing,
    refuse_shape,
    refuse_unknown,
)

# What a missing weight most likely means, by role.
HINTS = {
    f"{prefix}{half} tower": f"is it a full {model} checkpoint?"
    for prefix, model in (("", "CLIP"), ("SigLIP ", "SigLIP"))
    for half in ("vision", "text")
}


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


def is_siglip(name: str, folder: str | Path | None = None) -> bool:
    """Tell whether a tower is a SigLIP, without asking the hub.

    Args:
        name: path or hub id.
        folder: the checkpoint folder, against which relative paths are tried as well.

    Returns:
        What config.json says, where it is at hand; of a hub id that is not, whether it has "siglip" in it.
    """
    try:
        place = resolve_name(name, folder)
        file = find_file(place, CONFIG_FILE, at_hand=True)
        if file is None:
            return "siglip" in name.lower() and not Path(place).exists()
        return parse_record(read_text(Path(file)), file).get("model_type") in SIGLIP_TYPES
    except InputError:  # who loads the tower says so
        return False


def load_quietly(
    module: type[PreTrainedModel],
    name: str,
    *,
    what: str,
    optional: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    config: PreTrainedConfig | None = None,
    names: Mapping[str, str] | None = None,
    **kwargs: object,
) -> tuple[PreTrainedModel, set[str]]:
    """`from_pretrained` without the report on the checkpoint's other half, but strict about this one.

    Args:
        module: the class to load.
        name: folder or hub id.
        what: the role, for messages.
        optional: weights that may be missing, or of another shape (the caller then must not use them).
        ignored: patterns of stored weights that are for something else; those that the class ignores are known.
        config: of the model; None: the one beside the weights.
        names: the stored weights' names into the model's, as in `hf_layout`; None: those that the class reads.
        **kwargs: passed on.

    Returns:
        The loaded module, in evaluation mode, and the optional weights that are missing or of another shape.

    Raises:
        InputError: when there is nothing of that name, the weights can't be read, some are missing, have no place in
            the model, another shape, or hold inf or NaN.
    """
    subject, hint = f"{what} {name}", HINTS.get(what, COPY_AGAIN)
    names = stored_names(module) if names is None else names
    ignored = (*ignored, *(module._keys_to_ignore_on_load_unexpected or ()))
    with quiet_loading(subject):
        if config is None:
            config = module.config_class.from_pretrained(name, cache_dir=kwargs.get("cache_dir"))
        check_generation_config(name, getattr(config, "vocab_size", 2**31))
        # 1. The headers alone: what does not fit is refused before memory is spent on it.
        if holds_weights(Path(name)):
            check_headers(module, name, config, what=what, optional=optional, ignored=ignored, names=names)
        # 2. The weights.
        loaded, report = module.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=dict(names),
            **kwargs,
        )
    loaded._weight_conversions = []  # it is saved under its own names, whatever it was read under
    # 3. What a hub id brought, whose headers were not at hand before.
    refuse_missing(set(report["missing_keys"]) - set(optional), subject, hint)
    for weight, stored_shape, shape in report["mismatched_keys"]:
        if weight not in optional:
            refuse_shape(weight, stored_shape, shape, subject)
    refuse_unknown({key for key in report["unexpected_keys"] if not is_ignored(key, ignored)}, subject)
    check_finite(loaded.named_parameters(), subject)
    clean_generation_config(loaded)
    return loaded.eval(), set(report["missing_keys"]) | {weight for weight, *_ in report["mismatched_keys"]}


def clean_generation_config(model: PreTrainedModel) -> None:
    """Mend settings of released checkpoints: sampling values without sampling, whole numbers where transformers wants
    others.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:  # a tower
        return
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
    for key in ("temperature", "top_p", "typical_p", "min_p", "repetition_penalty", "length_penalty"):
        value = getattr(settings, key, None)
        if value is not None:
            setattr(settings, key, float(value))


def check_headers(
    module: type[PreTrainedModel],
    name: str,
    config: PreTrainedConfig,
    *,
    what: str,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Compare the names and shapes in a checkpoint's weight files with those of the model, without reading values.

    Args:
        module: the class of the model.
        name: folder or hub id.
        config: of the model.
        what: the role, for messages.
        optional: weights that may be missing.
        ignored: patterns of stored weights that are for something else, besides those that the class ignores.
        names: as in `load_quietly`.

    Returns:
        Names, in the model's terms, and shapes as stored.

    Raises:
        InputError: as in `check_shapes` (not for quantised checkpoints, which pack their weights), or plain weights
            that the config calls quantised.
    """
    files = list_weight_files(name)
    names = stored_names(module) if names is None else names
    stored = {rename(key, names): shape for file in files for key, shape in read_shapes(file).items()}
    ignored = (*ignored, *(module._keys_to_ignore_on_load_unexpected or ()))
    expected, hint = build_shapes(build_empty(module, config)), HINTS.get(what, COPY_AGAIN)
    try:
        check_shapes(stored, expected, f"{what} {name}", optional=optional, ignored=ignored, hint=hint)
    except InputError:
        if getattr(config, "quantization_config", None) is None:
            raise
    else:
        _refuse_quantised(config, name)
        for file in files:
            dtypes = {rename(key, names): dtype for key, dtype in read_dtypes(file).items()}
            check_dtypes(dtypes, expected, f"{what} {name}")
    return stored


def stored_names(module: type[PreTrainedModel]) -> Mapping[str, str]:
    """Return the other names under which a class reads its weights."""
    return getattr(module, "stored_names", {})


def _refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Refuse a config that calls plain weights quantised: they would be read as if they were."""
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{name}/config.json has a quantization_config, but the weights are not quantised: delete it there "
            "(load_4bit and load_8bit quantise while loading)"
        )


def build_empty(module: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return module(copy.deepcopy(config))


def build_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights; a tied head need not be stored."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied}


@contextmanager
def quiet_loading(subject: str) -> Iterator[None]:
    """Silence transformers inside the block; whatever it raises becomes one line about the subject."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Many kinds: OSError (not there), hub and network errors, safetensors and pickle errors (broken file).
        raise InputError(f"{subject} can't be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
