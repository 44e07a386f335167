"""The model to train: loaded, given vision, and with the right parts trainable."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava.chat_template import find_end_token
from llava.conversation import Conversation, SeparatorStyle
from llava.errors import InputError
from llava.model.adapter import EMBEDDING_KEY
from llava.model.builder import make_config
from llava.model.config_rules import CONFIG_FILE, check_config, read_settings
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.families import classes_of
from llava.model.language_model.generation_settings import add_end_tokens
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower
from llava.model.multimodal_projector.builder import PROJECTOR_PREFIX
from llava.model.packing import check_packing
from llava.model.stored_weights import check_dtypes, check_finite, iterate_tensors, list_dtypes
from llava.model.token_reduction import CONFIG_KEY, RANGE_KEY, read_training_reduction
from llava.model.tokenizer import load_tokenizer
from llava.prompt import JOINED_TURNS, POOLED_TURNS, QUERY_KEY, end_of_turn
from llava.train.arguments import TrainingArguments
from llava.train.engine import calls_head_once, detach_tower, gathered, is_partitioned, whole_weights
from llava.train.flags import DataArguments, ModelArguments
from llava.train.lora import quantisation_settings

logger = logging.getLogger(__name__)

# Values of flags that were not given, if the starting config has none either.
VISION_DEFAULTS = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    CONFIG_KEY: None,
    QUERY_KEY: JOINED_TURNS,
}
IMAGE_DEFAULTS = {"image_aspect_ratio": "square", "image_grid_pinpoints": None}


def read_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Read the config of the model to start from, LLaVA or not.

    Raises:
        InputError: no config, not readable, or of another architecture.
    """
    path = model_args.model_name_or_path
    try:
        values, file = read_settings(path, CONFIG_FILE, "model to train", model_args.cache_dir)
        check_config(values, file, "model to train")
        config = make_config(values, file)
    except InputError as error:
        raise InputError(f"--model_name_or_path {path}: {error}") from None
    config._name_or_path = path
    return config


def complete_arguments(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> tuple[ModelArguments, DataArguments]:
    """Fill flags that were not given from the starting checkpoint, else from LLaVA-1.5's settings.

    Raises:
        InputError: flags that need a vision tower, and there is none; another projector type than the checkpoint's.
    """
    tower = model_args.vision_tower or getattr(config, "mm_vision_tower", None)
    if tower is None:
        _refuse_vision_flags(model_args, data_args)
        return model_args, data_args
    known = getattr(config, "mm_projector_type", None) if hasattr(config, "mm_vision_tower") else None
    if known and model_args.mm_projector_type not in (None, known):
        raise InputError(
            f"--mm_projector_type {model_args.mm_projector_type}: {model_args.model_name_or_path} already has a {known}"
        )
    chosen = _fill(model_args, config, VISION_DEFAULTS) | {"vision_tower": tower}
    if getattr(model_args, CONFIG_KEY) is None:
        chosen[CONFIG_KEY] = _find_range(config) or chosen[CONFIG_KEY]
    images = _fill(data_args, config, IMAGE_DEFAULTS)
    if images["image_aspect_ratio"] == "anyres" and not images["image_grid_pinpoints"]:
        raise InputError("--image_aspect_ratio anyres needs --image_grid_pinpoints, e.g. [[336,672],[672,336]]")
    return replace(model_args, **chosen), replace(data_args, **images)


def _fill(arguments: object, config: PreTrainedConfig, defaults: dict[str, object]) -> dict[str, object]:
    given = {name: getattr(arguments, name) for name in defaults}
    return {
        name: getattr(config, name, default) if given[name] is None else given[name]
        for name, default in defaults.items()
    }


def _find_range(config: PreTrainedConfig) -> str | None:
    """Return the ranges that a checkpoint was trained with, unless its reduction has been changed since."""
    spec = getattr(config, RANGE_KEY, None)
    is_kept = spec and read_training_reduction(spec).middle.spec() == getattr(config, CONFIG_KEY, None)
    return spec if is_kept else None


def _refuse_vision_flags(model_args: ModelArguments, data_args: DataArguments) -> None:
    given = vars(model_args) | vars(data_args)
    for flag in ("pretrain_mm_mlp_adapter", "tune_mm_mlp_adapter", CONFIG_KEY, "feature_cache"):
        if given[flag]:
            raise InputError(f"--{flag}: {model_args.model_name_or_path} has no vision tower; give --vision_tower")


def check_start(model_args: ModelArguments, training_args: TrainingArguments, config: PreTrainedConfig) -> None:
    """Check what is trained from, as far as that takes no model.

    Raises:
        InputError: the result would overwrite the model it starts from; `--pretrain_mm_mlp_adapter` is no projector
            for this language model; or `--packing` does not fit it.
    """
    if training_args.packing:
        if model_args.vision_tower is None:
            raise InputError(f"--packing: {model_args.model_name_or_path} has no vision tower; leave it out")
        reducer = read_training_reduction(getattr(model_args, CONFIG_KEY)).middle.before
        check_packing(model_args.attn_implementation, reducer)
    start, end = Path(model_args.model_name_or_path), Path(training_args.output_dir)
    if start.is_dir() and end.is_dir() and start.samefile(end):
        raise InputError(f"--output_dir {end} is the model that the training starts from: give another folder")
    path = model_args.pretrain_mm_mlp_adapter
    if not path:
        return
    if not Path(path).is_file():
        raise InputError(f"--pretrain_mm_mlp_adapter {path}: no such file; stage 1 (scripts/pretrain.sh) makes one")
    try:
        weights = dict(iterate_tensors(path, PROJECTOR_PREFIX))
        check_dtypes(list_dtypes(weights), weights, path)
        check_finite(weights.items(), path)
    except InputError as error:
        raise InputError(f"--pretrain_mm_mlp_adapter {error}") from None
    widths = {value.shape[0] for value in weights.values() if value.ndim == 2}
    if not widths:
        raise InputError(f"--pretrain_mm_mlp_adapter {path}: no projector weights (mm_projector.*) in it")
    if config.hidden_size not in widths:
        raise InputError(
            f"--pretrain_mm_mlp_adapter {path}: a projector into width {max(widths)}, but "
            f"{model_args.model_name_or_path} has {config.hidden_size}"
        )


def record_template(
    model: PreTrainedModel, version: str, template: Conversation, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the conversation template into config.json, and the token that ends its answers among those that do.

    So commands need not guess the template from a folder's name, and generation stops where training ended.

    Args:
        model: is about to be trained; not wrapped.
        version: name of the template; captions are no dialogue and leave the model as it is.
        template: the same.
        tokenizer: the language model's.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return
    model.config.conv_mode = version
    add_end_tokens(model, find_end_token(end_of_turn(template), tokenizer))


def load_training_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, padding on the right with a token that has no loss."""
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    tokenizer.model_max_length = training_args.model_max_length
    tokenizer.padding_side = "right"
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_language_model(
    model_args: ModelArguments, training_args: TrainingArguments, config: PreTrainedConfig
) -> PreTrainedModel:
    """Load the weights to start from: LLaVA if there is a vision tower, else the plain language model.

    Master weights are float32 whatever the run computes in: the small steps of a low learning rate round to zero in
    16 bit. (DeepSpeed keeps float32 masters of its own, and takes 16-bit weights.)

    Raises:
        InputError: no such checkpoint, or an incomplete one.
    """
    settings = {
        "dtype": _choose_weight_dtype(training_args, is_trained=not training_args.lora_enable),
        "cache_dir": model_args.cache_dir,
        "attn_implementation": model_args.attn_implementation,
    }
    settings |= quantisation_settings(training_args, settings["dtype"])
    path = model_args.model_name_or_path
    if model_args.vision_tower is None:
        model, _ = load_quietly(classes_of(config).plain, path, what="language model", **settings)
        model.accepts_loss_kwargs = False  # the loss of LlavaCausalLM: a mean over micro-batches
    else:
        named = getattr(config, "mm_vision_tower", None)
        if named:
            config.mm_vision_tower = model_args.vision_tower  # the checkpoint's own may not exist here
        model, _ = load_quietly(classes_of(config).model, path, what="language model", config=config, **settings)
        if named != model_args.vision_tower and isinstance(model.get_vision_tower(), StoredVisionTower):
            logger.warning(
                "%s holds its vision tower, which stays; --vision_tower %s gives the text half alone",
                path,
                model_args.vision_tower,
            )
    return model


def _choose_weight_dtype(training_args: TrainingArguments, is_trained: bool = True) -> torch.dtype:
    """Choose float32 for weights that are their own masters, else the dtype that the run computes in."""
    if is_trained and not training_args.runs_deepspeed:
        return torch.float32
    return training_args.compute_dtype


def add_vision(
    model: LlavaCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Give the model its vision tower, projector and token reduction, and record the settings in its config.

    Args:
        model: as loaded.
        tokenizer: gets the extra tokens that the flags ask for.
        model_args: from `complete_arguments`.
        data_args: from `complete_arguments`.
        training_args: for the settings that config.json records.

    Raises:
        InputError: a tower or projector that cannot be loaded.
    """
    reduction = read_training_reduction(getattr(model_args, CONFIG_KEY))
    # What answers need of the query's source; the others are matters of training alone.
    keep_setting(model.config, QUERY_KEY, POOLED_TURNS if getattr(model_args, QUERY_KEY) == POOLED_TURNS else None)
    with whole_weights():
        settings = replace(model_args, pretrain_mm_mlp_adapter=None, **{CONFIG_KEY: reduction.middle.spec()})
        model.get_model().initialize_vision_modules(model_args=settings, fsdp=training_args.fsdp)
        own = model_args.tower_dtype
        model.get_vision_tower().to(training_args.compute_dtype if own == "run" else getattr(torch, own))
        # Also for a LLaVA checkpoint with another reduction (parity: the released code trains with the old one). Of
        # ranges the ends too, which warn of what the tower's images cannot meet; the middle stays.
        ends = (reduction.lowest, reduction.highest) if reduction.varies else ()
        for each in (*ends, reduction.middle):
            model.set_token_reduction(each.spec())
    load_projector(model, model_args.pretrain_mm_mlp_adapter, training_args)
    model.tokenizer = tokenizer
    config = model.config
    keep_setting(config, RANGE_KEY, reduction.spec() if reduction.varies else None)
    config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.image_grid_pinpoints is not None:
        config.image_grid_pinpoints = data_args.image_grid_pinpoints
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = tokenizer.model_max_length
    for flag in ("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "mm_use_im_start_end", "mm_use_im_patch_token"):
        setattr(config, flag, getattr(model_args, flag))
    config.mm_projector_lr = training_args.mm_projector_lr
    add_image_tokens(model, tokenizer, model_args)
    if training_args.runs_deepspeed or training_args.runs_fsdp:
        detach_tower(model, training_args.device)
    if calls_head_once(training_args):
        model.most_logits = None


def keep_setting(config: PreTrainedConfig, key: str, value: str | None) -> None:
    """Set a key of config.json that published checkpoints do not have; None leaves it out."""
    vars(config).pop(key, None)
    if value is not None:
        setattr(config, key, value)


def load_projector(model: LlavaCausalLM, path: str | None, training_args: TrainingArguments) -> None:
    """Give the projector its starting weights, and under DeepSpeed the dtype of the language model.

    Args:
        model: with a projector, new or from a checkpoint.
        path: `mm_projector.bin`; None keeps the present weights.
        training_args: for the dtype; ZeRO-3 needs one dtype for all that is trained.

    Raises:
        InputError: the file does not fit.
    """
    projector = model.get_model().mm_projector
    with gathered(projector.parameters(), writable=True):
        if path:
            model.get_model().load_projector(path)
    projector.to(_choose_weight_dtype(training_args))


def add_image_tokens(model: LlavaCausalLM, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    """Add the tokens that `mm_use_im_start_end` and `mm_use_im_patch_token` ask for (LLaVA-1.5 asks for none).

    Raises:
        InputError: under ZeRO-3, which partitions the embeddings; or the stage-1 file has no embeddings.
    """
    if is_partitioned() and (model_args.mm_use_im_start_end or model_args.mm_use_im_patch_token):
        raise InputError("--mm_use_im_start_end and --mm_use_im_patch_token add tokens: train with scripts/zero2.json")
    model.initialize_vision_tokenizer(model_args, tokenizer)
    if model_args.mm_use_im_start_end and model_args.pretrain_mm_mlp_adapter:
        load_token_embeddings(model, model_args.pretrain_mm_mlp_adapter)


def load_token_embeddings(model: LlavaCausalLM, path: str) -> None:
    """Copy the embeddings of the image start and end tokens from a stage-1 file that trained them.

    Args:
        model: with the two tokens added.
        path: `mm_projector.bin`.

    Raises:
        InputError: the file has no embeddings, or of another width.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True).get(EMBEDDING_KEY)
    table = model.get_input_embeddings().weight
    if stored is None or stored.shape[1] != table.shape[1]:
        raise InputError(f"{path}: no {EMBEDDING_KEY} of width {table.shape[1]}, as --mm_use_im_start_end needs")
    num_added = 2
    table.data[-num_added:] = stored[-num_added:].to(table)


def choose_trainable(model: PreTrainedModel, model_args: ModelArguments) -> None:
    """Freeze and unfreeze the parts of the model for this stage; towers are always frozen.

    Raises:
        InputError: nothing would be trained.
    """
    if model_args.freeze_backbone:
        model.model.requires_grad_(False)
    if model_args.vision_tower is not None:
        if model_args.tune_mm_mlp_adapter:
            model.requires_grad_(False)
            # The embeddings of image start and end are trained with the projector, as in LLaVA.
            model.get_input_embeddings().requires_grad_(model_args.mm_use_im_start_end)
        model.get_model().mm_projector.requires_grad_(not model_args.freeze_mm_mlp_adapter)
        model.get_vision_tower().freeze()
    # Under ZeRO-3 `numel` counts this rank's part only.
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    trainable, total = sizes[True], sum(sizes.values())
    if not trainable:
        raise InputError("these flags freeze every part of the model: nothing to train")
    logger.info("training %d of %d parameters", trainable, total)
