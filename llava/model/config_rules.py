"""What the JSON files of a checkpoint may say: the keys that are read, their types and ranges.

Keys that nothing here knows pass: checkpoints carry many. Each wrong value ends in one line with file, key, value and
what would be right, before any weight is read.
"""

import ast
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.chat_template import CHAT_TEMPLATE
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.crops import MERGE_TYPES
from llava.model.multimodal_projector.builder import parse_projector_type
from llava.model.stored_weights import find_file, show

Values = Mapping[str, object]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
ASPECT_RATIOS = ("square", "pad", "anyres")
MAX_LAYERS = 1000  # ten times as deep as any Llama; more is a typing error, and would take minutes to build
MAX_WIDTH = 2**18
MAX_TILES = 100  # crops of one image
MAX_BEAMS = 100
CLIP_SIDE = 224  # pixels, where a preprocessor_config.json gives no size
SIGLIP_WIDTH = 768  # of either half, where a SigLIP's config.json gives none


# --------------------------------------------------------------------------------------------------------- one rule
@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        says: what would be right, for the message.
        allows: whether a value is right.
        may_be_null: whether null, which stands for "not given", is right too.
    """

    says: str
    allows: Callable[[object], bool]
    may_be_null: bool = True


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, high: int, *, null: bool = True, why: str = "") -> Rule:
    """A whole number from `low` to `high`."""
    says = f"a whole number from {low} to {high:,}{why}"
    return Rule(says, lambda value: _is_whole(value) and low <= value <= high, null)


def number(low: float, high: float = math.inf, *, above: bool = False, null: bool = True) -> Rule:
    """A number from `low` (with `above`: above it) to `high`."""
    says = f"a number {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
    return Rule(says, lambda value: _is_number(value) and low <= value <= high and not (above and value == low), null)


def choice(*values: str, null: bool = True) -> Rule:
    """One of some texts."""
    says = f'"{values[0]}"' if len(values) == 1 else "one of " + ", ".join(f'"{value}"' for value in values)
    return Rule(says, lambda value: isinstance(value, str) and value in values, null)


def text(*, null: bool = True) -> Rule:
    """A text that is not empty."""
    return Rule(
        "a text that is not empty", lambda value: isinstance(value, str) and value.strip() != "" and "\0" not in value,
        null,
    )  # fmt: skip


def flag(*, only: bool | None = None) -> Rule:
    """True or false, or one of them only."""
    says = "true or false" if only is None else show(only)
    return Rule(says, lambda value: isinstance(value, bool) and (only is None or value is only))


def record() -> Rule:
    """A JSON object."""
    return Rule("an object", lambda value: isinstance(value, dict))


def listing(of: Rule, length: int | None = None, *, null: bool = True) -> Rule:
    """A list, of some length, whose items keep a rule."""
    says = f"a list of {length} items" if length else "a list"

    def allows(value: object) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(of.allows(item) for item in value)

    return Rule(f"{says}, each {of.says}", allows, null)


def either(*rules: Rule) -> Rule:
    """What one of some rules allows."""
    says = ", or ".join(dict.fromkeys(rule.says for rule in rules))
    return Rule(says, lambda value: any(rule.allows(value) for rule in rules), all(rule.may_be_null for rule in rules))


def check_values(values: Values, rules: Mapping[str, Rule], file: str, inside: str = "") -> None:
    """Check the keys that have a rule.

    Args:
        values: the JSON object.
        rules: by key.
        file: for the message.
        inside: the key that holds the object, where it is not the whole file.

    Raises:
        InputError: the first wrong value.
    """
    for key, rule in rules.items():
        value = values.get(key)
        if key not in values or (value is None and rule.may_be_null):
            continue
        if value is None or not rule.allows(value):
            refuse(file, f"{inside}.{key}" if inside else key, value, rule.says)


def refuse(file: str, key: str, value: object, expected: str) -> NoReturn:
    """Refuse a value of a JSON file.

    Raises:
        InputError: always.
    """
    raise InputError(f"{file}: {key} is {show(value)}; expected {expected}")


def require(values: Values, keys: tuple[str, ...], file: str, inside: str = "") -> None:
    """Refuse an object that lacks one of some keys.

    Raises:
        InputError: it does.
    """
    for key in keys:
        if values.get(key) is None:
            raise InputError(f"{file} has no {f'{inside}.{key}' if inside else key}; copy or download it again")


# -------------------------------------------------------------------------------------------------------- the tables
_TOKEN = whole(-1, 2**31)
_TOKENS = either(_TOKEN, listing(_TOKEN))
_WORDS = either(text(), listing(text()))

GENERATION_RULES = {
    "max_length": whole(1, 2**31),
    "max_new_tokens": whole(1, 2**31),
    "min_length": whole(0, 2**31),
    "min_new_tokens": whole(0, 2**31),
    "do_sample": flag(),
    "temperature": number(0),
    "top_k": whole(0, 2**31),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "typical_p": number(0, 1, above=True),
    "epsilon_cutoff": number(0, 1),
    "eta_cutoff": number(0, 1),
    "num_beams": whole(1, MAX_BEAMS),
    "num_return_sequences": whole(1, 1, why=" (answers would not fit their questions)"),
    "repetition_penalty": number(0, above=True),
    "length_penalty": number(-math.inf),
    "no_repeat_ngram_size": whole(0, 2**31),
    "early_stopping": either(flag(), choice("never")),
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _TOKEN,
    "use_cache": flag(),
    "renormalize_logits": flag(),
    "remove_invalid_values": flag(),
    "output_scores": flag(),
    "output_logits": flag(),
    "output_attentions": flag(),
    "output_hidden_states": flag(),
    "return_dict_in_generate": flag(only=False),
    # Searches of other kinds, which `generate` here does not offer; old configs spell out the values that mean none.
    "num_beam_groups": whole(1, 1),
    "diversity_penalty": number(0, 0),
    "encoder_repetition_penalty": number(1, 1),
    "encoder_no_repeat_ngram_size": whole(0, 0),
    "guidance_scale": number(1, 1),
    "penalty_alpha": number(0, 0),
    "low_memory": flag(),
    "token_healing": flag(only=False),
    "is_assistant": flag(only=False),
    "cache_implementation": choice("static", "dynamic", "offloaded", "offloaded_static", "quantized", "hybrid"),
}
GENERATION_RULES |= {
    key: Rule("null: no search of this kind is offered", lambda value: False)
    for key in (
        *("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "max_time", "stop_strings"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("decoder_start_token_id", "dola_layers", "prompt_lookup_num_tokens", "watermarking_config"),
        *("custom_generate", "compile_config", "cache_config", "continuous_batching_config"),
        *("exponential_decay_length_penalty", "assistant_early_exit"),
    )
}

_ACTIVATION = Rule(
    'the name of an activation, such as "silu" or "quick_gelu"',
    lambda value: isinstance(value, str) and value in ACT2FN,
)
_LAYERS = whole(1, MAX_LAYERS, null=False, why=f" (no such model is deeper than {MAX_LAYERS} layers)")
_WIDTH = whole(1, MAX_WIDTH, null=False)
_DTYPE = choice(*("float32", "float16", "bfloat16", "torch.float32", "torch.float16", "torch.bfloat16", "float64"))

LLAMA_RULES = {
    "architectures": listing(text()),
    "vocab_size": whole(1, 2**24, null=False),
    "hidden_size": _WIDTH,
    "intermediate_size": whole(1, 2**20, null=False),
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": whole(1, 2**12, null=False),
    "num_key_value_heads": whole(1, 2**12),
    "head_dim": whole(2, 2**14),
    "hidden_act": _ACTIVATION,
    "max_position_embeddings": whole(1, 2**31, null=False),
    "initializer_range": number(0, 1),
    "rms_norm_eps": number(0, 1, above=True, null=False),
    "attention_dropout": number(0, 1),
    "attention_bias": flag(),
    "mlp_bias": flag(),
    "tie_word_embeddings": flag(),
    "pretraining_tp": whole(1, 2**10),
    "sliding_window": Rule("null: Llama attends to all tokens before", lambda value: False),
    "layer_types": listing(choice("full_attention", null=False)),
    "rope_theta": number(0, above=True),
    "rope_scaling": record(),
    "rope_parameters": record(),
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "return_dict": flag(only=True),
    "is_encoder_decoder": flag(only=False),
    "add_cross_attention": flag(only=False),
    "is_decoder": flag(),
    "torchscript": flag(),
    "quantization_config": record(),
    "id2label": record(),
    "label2id": record(),
    "num_labels": whole(0, 2**16),
    "chunk_size_feed_forward": whole(0, 2**31),
}

_WINDOW_RULES = {
    "sliding_window": whole(1, 2**31),
    "layer_types": listing(choice("full_attention", "sliding_attention", null=False)),
}
LANGUAGE_RULES = {
    "llama": LLAMA_RULES,
    "mistral": LLAMA_RULES | _WINDOW_RULES,
    "qwen2": LLAMA_RULES
    | _WINDOW_RULES
    | {"use_sliding_window": flag(), "max_window_layers": whole(0, MAX_LAYERS), "mlp_bias": flag(only=False)},
}

_ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
ROPE_RULES = {
    "rope_type": choice(*_ROPE_TYPES),
    "type": choice(*_ROPE_TYPES),
    "factor": number(1),
    "rope_theta": number(0, above=True),
    "original_max_position_embeddings": whole(1, 2**31),
    "low_freq_factor": number(0, above=True),
    "high_freq_factor": number(0, above=True),
    "attention_factor": number(0, above=True),
    "beta_fast": number(0),
    "beta_slow": number(0),
    "short_factor": listing(number(0, above=True)),
    "long_factor": listing(number(0, above=True)),
    "partial_rotary_factor": number(0, 1, above=True),
}
# What transformers reads without a default, by the type of scaling.
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LLAVA_RULES = {
    "mm_vision_tower": text(),
    "mm_hidden_size": _WIDTH,
    "mm_projector_type": text(),
    "mm_vision_select_layer": whole(-MAX_LAYERS, MAX_LAYERS, null=False, why="; LLaVA-1.5 has -2"),
    "mm_vision_select_feature": choice("patch", "cls_patch", null=False),
    "mm_patch_merge_type": choice(*MERGE_TYPES),
    "image_aspect_ratio": choice(*ASPECT_RATIOS),
    "conv_mode": choice(*conv_templates, CHAT_TEMPLATE),
    "mm_projector_lr": number(0),
    "mm_use_im_start_end": flag(),
    "mm_use_im_patch_token": flag(),
    "unfreeze_mm_vision_tower": flag(),
    "token_reduction_range": text(),
    "mm_vision_token_reduce_query": choice("questions", "turns", "conversation"),
    "vision_config": record(),
    "use_mm_proj": flag(),
    "tune_mm_mlp_adapter": flag(),
    "freeze_mm_mlp_adapter": flag(),
    "tokenizer_padding_side": choice("left", "right"),
    "tokenizer_model_max_length": whole(1, 2**62),
    "max_sequence_length": whole(1, 2**31, null=False),
}

_SIDE = whole(1, 2**12, null=False)
_TOWER_HALF = {
    "hidden_size": _WIDTH,
    "intermediate_size": whole(1, 2**20, null=False),
    "projection_dim": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": whole(1, 2**12, null=False),
    "hidden_act": _ACTIVATION,
    "layer_norm_eps": number(0, 1, above=True, null=False),
    "attention_dropout": number(0, 1),
    "initializer_range": number(0),
    "initializer_factor": number(0),
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "return_dict": flag(only=True),
    "output_attentions": flag(only=False),
    "output_hidden_states": flag(),
}
VISION_RULES = _TOWER_HALF | {"image_size": _SIDE, "patch_size": _SIDE, "num_channels": whole(3, 3, null=False)}
TEXT_RULES = _TOWER_HALF | {
    "vocab_size": whole(1, 2**24, null=False),
    "max_position_embeddings": whole(1, 2**20, null=False),
    "bos_token_id": _TOKEN,
    "eos_token_id": whole(0, 2**31, null=False),
    "pad_token_id": _TOKEN,
}
SIGLIP_VISION_RULES = VISION_RULES | {"vision_use_head": flag()}
SIGLIP_TEXT_RULES = TEXT_RULES | {"projection_size": _WIDTH, "eos_token_id": _TOKEN}
CLIP_RULES = {
    "projection_dim": _WIDTH,
    "vision_config": record(),
    "text_config": record(),
    "logit_scale_init_value": number(-math.inf),
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
}

ADAPTER_RULES = {
    "peft_type": choice("LORA", null=False),
    "base_model_name_or_path": text(),
    "r": whole(1, 2**16, null=False),
    "lora_alpha": number(0, above=True, null=False),
    "lora_dropout": number(0, 1),
    "bias": choice("none", "all", "lora_only"),
    "target_modules": _WORDS,
    "exclude_modules": _WORDS,
    "modules_to_save": listing(text()),
    "layers_to_transform": either(whole(0, MAX_LAYERS), listing(whole(0, MAX_LAYERS))),
    "layers_pattern": _WORDS,
    "rank_pattern": record(),
    "alpha_pattern": record(),
    "fan_in_fan_out": flag(),
    "use_rslora": flag(),
    "use_dora": flag(),
    "inference_mode": flag(),
    "task_type": text(),
}

_SIZE = either(
    _SIDE, Rule('an object such as {"shortest_edge": 336}', lambda value: isinstance(value, dict), may_be_null=False)
)
PREPROCESSOR_RULES = {
    "do_resize": flag(),
    "do_center_crop": flag(),
    "do_normalize": flag(),
    "do_rescale": flag(),
    "do_convert_rgb": flag(),
    "size": _SIZE,
    "crop_size": _SIZE,
    "image_mean": listing(number(0, 1), 3, null=False),
    "image_std": listing(number(0, above=True), 3, null=False),
    "rescale_factor": number(0, above=True, null=False),
    "resample": whole(0, 5, null=False),
    "return_tensors": choice("pt", "np"),
    "data_format": choice("channels_first"),
    "input_data_format": choice("channels_first", "channels_last"),
}
SIGLIP_PREPROCESSOR_RULES = PREPROCESSOR_RULES | {"do_resize": flag(only=True), "do_center_crop": flag(only=False)}
OPEN_CLIP_RULES = {"embed_dim": _WIDTH, "quick_gelu": flag(), "vision_cfg": record(), "text_cfg": record()}
_OPEN_CLIP_HALF = {
    "width": _WIDTH,
    "layers": _LAYERS,
    "mlp_ratio": number(0, 64, above=True),
    "ls_init_value": number(0),
    "act_kwargs": record(),
    "norm_kwargs": record(),
}
OPEN_CLIP_VISION_RULES = _OPEN_CLIP_HALF | {
    "head_width": whole(1, 2**14, null=False),
    "image_size": _SIDE,
    "patch_size": _SIDE,
    "patch_dropout": number(0, 1),
}
OPEN_CLIP_TEXT_RULES = _OPEN_CLIP_HALF | {
    "heads": whole(1, 2**12, null=False),
    "context_length": whole(2, 2**20, null=False),
    "vocab_size": whole(1, 2**24, null=False),
}
OPEN_CLIP_PIXEL_RULES = {
    "mean": listing(number(0, 1), 3),
    "std": listing(number(0, above=True), 3),
    "interpolation": text(),
}
SIZE_RULES = {"shortest_edge": _SIDE, "height": _SIDE, "width": _SIDE}

TOKENIZER_RULES = {
    "tokenizer_class": text(),
    "add_bos_token": flag(),
    "add_eos_token": flag(only=False),
    "model_max_length": number(1),
    "padding_side": choice("left", "right"),
    "truncation_side": choice("left", "right"),
    "legacy": flag(),
    "clean_up_tokenization_spaces": flag(),
    "added_tokens_decoder": record(),
    "additional_special_tokens": Rule("a list", lambda value: isinstance(value, list)),
    "sp_model_kwargs": record(),
    "chat_template": Rule("a text or a list", lambda value: isinstance(value, str | list | dict)),
} | {f"{name}_token": either(text(), record()) for name in ("bos", "eos", "unk", "pad")}


# -------------------------------------------------------------------------------------------------- model types
# The language model's family by model_type, LLaVA or not.
LANGUAGE_TYPES = {
    **dict.fromkeys(("llama", "llava", "llava_llama"), "llama"),
    **dict.fromkeys(("mistral", "llava_mistral"), "mistral"),
    **dict.fromkeys(("qwen2", "llava_qwen2", "llava_qwen"), "qwen2"),
}
_ARCHITECTURE_WORDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}
HF_TYPES = ("llava", "llava_next")  # transformers' own, with the language model in `text_config`
CLIP_TYPES = ("clip", "clip_vision_model")
SIGLIP_TYPES = ("siglip", "siglip_vision_model")
_TOWER_TYPES = ("clip", "siglip", "dinov2", "dinov3", "vit", "eva", "convnext", "blip", "altclip", "chinese_clip")
# What each role is filled by.
ROLES = {
    "checkpoint": "a LLaVA on Llama, Mistral or Qwen2 (model_type llava, llava_llama, llava_mistral, llava_qwen2), "
    "such as liuhaotian/llava-v1.5-7b or llava-hf/llava-1.5-7b-hf",
    "model base": "the Llama, Mistral, Qwen2 or LLaVA that the adapter or projector was trained on, such as "
    "lmsys/vicuna-7b-v1.5",
    "model to train": "a Llama, Mistral, Qwen2 or a LLaVA on one of them, such as lmsys/vicuna-7b-v1.5",
    "vision tower": "a CLIP in Hugging Face's layout, such as openai/clip-vit-large-patch14-336, or a SigLIP, such as "
    "google/siglip-so400m-patch14-384",
}


def family_of(kind: object) -> str:
    """Return the family of a known model_type: llama (also for none, as in the oldest files), mistral or qwen2."""
    return LANGUAGE_TYPES.get(kind, "llama") if isinstance(kind, str) else "llama"


def is_hf_layout(values: Values) -> bool:
    """Return whether a config.json is that of a llava-hf folder, transformers' own LLaVA."""
    return values.get("model_type") in HF_TYPES and "text_config" in values


def check_model_type(values: Values, file: str, role: str) -> None:
    """Refuse a model of another architecture by its name, whatever role it is to play.

    Args:
        values: of its config.json.
        file: for the message.
        role: one of `ROLES`.

    Raises:
        InputError: what the model is, and what the role needs.
    """
    kind = values.get("model_type")
    known = CLIP_TYPES + SIGLIP_TYPES if role == "vision tower" else tuple(LANGUAGE_TYPES)
    if kind is not None and not isinstance(kind, str):
        refuse(file, "model_type", kind, f"one of {', '.join(known)}: {ROLES[role]}")
    names = values.get("architectures") or []
    architectures = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    is_known = kind in known or (kind is None and role != "vision tower")
    if role != "vision tower":
        is_known = is_known and "text_config" not in values and _are_of(family_of(kind), architectures)
    if not is_known:
        given = "has no model_type" if kind is None else f'has model_type "{kind}"'
        raise InputError(
            f"{file} {given}{_describe(kind, values, architectures, role)}; the {role} must be {ROLES[role]}"
        )


def _are_of(family: str, architectures: list[str]) -> bool:
    return all(_ARCHITECTURE_WORDS[family] in name for name in architectures)


def _describe(kind: str | None, values: Values, architectures: list[str], role: str) -> str:
    """Say what a foreign model is, as far as its config tells."""
    names = " ".join(architectures)
    kind = kind or ""
    if "text_config" in values and kind.startswith(("llava", "vipllava", "video_llava")):
        if role == "vision tower":
            advice = "it holds no text half; name the full CLIP that its own tower comes from"
        elif is_hf_layout(values):
            advice = "convert it first (python -m llava.convert --to llava)"
        else:
            advice = "take the original checkpoint instead"
        return f", transformers' own LLaVA format ({names or 'LlavaForConditionalGeneration'}): {advice}"
    if kind.startswith(("llava_", "llava-")) and kind not in LANGUAGE_TYPES:
        return f", a LLaVA on another language model ({kind[6:]})"
    if kind.startswith("siglip2"):
        return ", a SigLIP 2 for images of any size (NaFlex; those of one size have model_type siglip)"
    if kind.startswith(_TOWER_TYPES):
        return ", a vision tower (mm_vision_tower names those)" if kind not in CLIP_TYPES else ", a CLIP vision tower"
    if kind in LANGUAGE_TYPES and not _are_of(family_of(kind), architectures):
        return f" and architectures {names}, another model"
    return ", another language model" if kind else ""


# ------------------------------------------------------------------------------------------------------- the files
def read_settings(path: str, name: str, what: str, cache_dir: str | None = None) -> tuple[dict, str]:
    """Read one of the JSON files of a folder or hub id.

    Args:
        path: the folder or hub id.
        name: of the file.
        what: the role, for messages.
        cache_dir: where files of a hub id are kept; None: the usual place.

    Returns:
        The JSON object, and the file's path.

    Raises:
        InputError: no such folder or file, or not a JSON object (with line and column).
    """
    file = find_file(path, name, cache_dir)
    if file is None:
        if Path(path).is_dir():
            raise InputError(f"{what} folder {path} holds no {name}")
        raise InputError(f"{what} {path}: no {name} to be found; there is no such folder, and no such hub id in reach")
    return parse_record(read_text(Path(file)), file), file


def check_generation_config(path: str, vocab_size: int) -> None:
    """Check the generation_config.json of a language model, if it has one.

    Args:
        path: folder or hub id.
        vocab_size: of the model.

    Raises:
        InputError: the first wrong value.
    """
    file = find_file(path, GENERATION_FILE)
    if file is not None:
        values = parse_record(read_text(Path(file)), file)
        check_values(values, GENERATION_RULES, file)
        _check_tokens(values, file, vocab_size)


def check_config(values: Values, file: str, role: str = "checkpoint") -> None:
    """Check the config.json of a language model, LLaVA or not.

    Raises:
        InputError: the first key that is wrong, or contradicts another.
    """
    check_model_type(values, file, role)
    check_values(values, LANGUAGE_RULES[family_of(values.get("model_type"))] | GENERATION_RULES | LLAVA_RULES, file)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(inner := values.get(key), dict):
            check_values(inner, ROPE_RULES, file, key)
            kind = inner.get("rope_type", inner.get("type"))
            for needed in ROPE_NEEDS.get(kind, ()):
                if inner.get(needed) is None:
                    refuse(file, f"{key}.{needed}", None, f'a number, which rope_type "{kind}" needs')
    _check_heads(values, file)
    _check_tokens(values, file, values.get("vocab_size", 32_000))
    if values.get("mm_vision_tower"):
        _check_vision(values, file)


def _check_tokens(values: Values, file: str, vocab_size: int) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokens = values.get(key)
        if any(token >= vocab_size for token in (tokens if isinstance(tokens, list) else [tokens or 0])):
            refuse(file, key, tokens, f"null, or a token below vocab_size {vocab_size}")


def _check_heads(values: Values, file: str) -> None:
    width, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    if width % heads:
        refuse(file, "num_attention_heads", heads, f"a divisor of hidden_size {width}")
    groups = values.get("num_key_value_heads")
    if groups is not None and heads % groups:
        refuse(file, "num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
    if (values.get("head_dim") or width // heads) % 2:
        refuse(file, "num_attention_heads", heads, "heads of an even width (rotary embeddings turn pairs)")


def _check_vision(values: Values, file: str) -> None:
    require(values, ("mm_hidden_size",), file)
    if isinstance(inner := values.get("vision_config"), dict):
        _check_half(inner, VISION_RULES, file, "vision_config")
    kind = values.get("mm_projector_type") or "linear"
    try:
        parse_projector_type(kind)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    widths = values["mm_hidden_size"], values.get("hidden_size", 4096)
    if kind == "identity" and widths[0] != widths[1]:
        refuse(
            file,
            "mm_projector_type",
            kind,
            f"a projector (linear, mlp2x_gelu) from mm_hidden_size {widths[0]} to hidden_size {widths[1]}",
        )
    if values.get("image_aspect_ratio") == "anyres":
        check_pinpoints(values.get("image_grid_pinpoints"), file)


def check_pinpoints(pinpoints: object, file: str, crop_size: int | None = None) -> None:
    """Check the canvases of multi-crop images, (width, height) in pixels.

    Args:
        pinpoints: `image_grid_pinpoints`: a list, or its text.
        file: for the message.
        crop_size: side of a crop in pixels, once it is known.

    Raises:
        InputError: not a list of pairs, or canvases that crops do not tile.
    """
    canvases = read_canvases(pinpoints)
    side = crop_size or 336
    example = f"[[{side}, {2 * side}], [{2 * side}, {side}]] (width, height) for image_aspect_ratio anyres"
    is_list = isinstance(canvases, list | tuple) and len(canvases) > 0
    if not is_list or not all(_is_canvas(canvas) for canvas in canvases):
        refuse(file, "image_grid_pinpoints", pinpoints, example)
    if crop_size is None:
        return
    for width, height in canvases:
        if width % crop_size or height % crop_size or width * height > MAX_TILES * crop_size**2:
            sides = f"multiples of the vision tower's {crop_size} pixels, at most {MAX_TILES} crops in all"
            refuse(file, "image_grid_pinpoints", [width, height], f"sides that are {sides}")


def read_canvases(pinpoints: object) -> object:
    """Return `image_grid_pinpoints` as a list where a config has it as text; None for a text that is no list."""
    if not isinstance(pinpoints, str):
        return pinpoints
    try:
        return ast.literal_eval(pinpoints)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _is_canvas(canvas: object) -> bool:
    is_pair = isinstance(canvas, list | tuple) and len(canvas) == 2
    return is_pair and all(_is_whole(side) and 0 < side <= 2**16 for side in canvas)


def read_tower_config(path: str, *, is_siglip: bool = False) -> dict:
    """Read and check the config.json of a CLIP or a SigLIP in Hugging Face's layout.

    Args:
        path: folder or hub id.
        is_siglip: which of them it shall be.

    Returns:
        The JSON object; `vision_config` (and `text_config`) inside it, or the vision half alone.

    Raises:
        InputError: no such file, another model, a wrong value.
    """
    values, file = read_settings(path, CONFIG_FILE, "vision tower")
    check_model_type(values, file, "vision tower")
    if (values["model_type"] in SIGLIP_TYPES) != is_siglip:
        told = "a CLIP, whose name says SigLIP" if is_siglip else "a SigLIP, whose name does not say so"
        raise InputError(f"vision tower {path} is {told}: set mm_vision_tower to a folder with its files")
    halves = (SIGLIP_VISION_RULES, SIGLIP_TEXT_RULES) if is_siglip else (VISION_RULES, TEXT_RULES)
    if values["model_type"].endswith("_vision_model"):
        _check_half(values, halves[0], file, "")
        return values
    check_values(values, CLIP_RULES, file)
    for key, rules in zip(("vision_config", "text_config"), halves, strict=True):
        _check_half(values.get(key) or {}, rules, file, key)
    if is_siglip:
        _check_joint_width(values, file)
    return values


def _check_joint_width(values: Values, file: str) -> None:
    """Compare what SigLIP's halves end in: the vision width, and the text half's head."""
    vision, text = values.get("vision_config") or {}, values.get("text_config") or {}
    width = vision.get("hidden_size", SIGLIP_WIDTH)
    found = text.get("projection_size") or text.get("hidden_size", SIGLIP_WIDTH)
    if found != width:
        refuse(file, "text_config.projection_size", found, f"{width}, the width of the vision half")


def _check_half(values: Values, rules: Mapping[str, Rule], file: str, inside: str) -> None:
    check_values(values, rules, file, inside)
    prefix = f"{inside}." if inside else ""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width is not None and heads is not None and width % heads:
        refuse(file, f"{prefix}num_attention_heads", heads, f"a divisor of hidden_size {width}")
    image, patch = values.get("image_size"), values.get("patch_size")
    if image is not None and patch is not None and patch > image:
        refuse(file, f"{prefix}patch_size", patch, f"at most image_size {image}")


def check_preprocessor(values: Values, file: str, image_size: int, *, is_siglip: bool = False) -> None:
    """Check the settings of an image processor against the tower that reads its pixels.

    Args:
        values: of preprocessor_config.json.
        file: for the message.
        image_size: side of the images that the tower reads, in pixels.
        is_siglip: whether the tower is a SigLIP, whose images are scaled to a square and not cropped.

    Raises:
        InputError: a wrong value, another library's processor, or another image size than the tower's.
    """
    kind = values.get("image_processor_type") or values.get("feature_extractor_type")
    own, like = ("SiglipImageProcessor", ("Siglip",)) if is_siglip else ("CLIPImageProcessor", ("CLIP", "Llava"))
    if kind is not None and not (isinstance(kind, str) and kind.startswith(like)):
        refuse(file, "image_processor_type", kind, f'"{own}"')
    if is_siglip:
        check_values(values, SIGLIP_PREPROCESSOR_RULES, file)
        square = {"height": image_size, "width": image_size}
        if (size := values.get("size", {"height": CLIP_SIDE, "width": CLIP_SIDE})) != square:
            sides = f"{image_size} x {image_size} pixels"
            refuse(file, "size", size, f"{json.dumps(square)}: the vision tower reads {sides}")
        return
    check_values(values, PREPROCESSOR_RULES, file)
    for key in ("size", "crop_size"):
        if isinstance(inner := values.get(key), dict):
            check_values(inner, SIZE_RULES, file, key)
            if not ("shortest_edge" in inner or {"height", "width"} <= inner.keys()):
                refuse(file, key, inner, f'{{"shortest_edge": {image_size}}}, or height and width')
    if values.get("do_center_crop", True) and (crop := values.get("crop_size", CLIP_SIDE)) is not None:
        sides = set(crop.values()) if isinstance(crop, dict) else {crop}
        if sides != {image_size}:
            refuse(file, "crop_size", crop, f"{image_size}: the vision tower reads {image_size} x {image_size} pixels")
    size = values.get("size", CLIP_SIDE)
    smallest = min((side for side in size.values() if _is_whole(side)), default=0) if isinstance(size, dict) else size
    if values.get("do_resize", True) and smallest is not None and smallest < image_size:
        refuse(file, "size", size, f"at least {image_size}: the vision tower reads {image_size} x {image_size} pixels")


def find_token(value: object) -> str | None:
    """Return a token's text from a tokenizer's settings, which have it as it is, or in an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
