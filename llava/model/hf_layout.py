"""The layout of llava-hf folders, transformers' own LLaVA: its settings and tensor names in LLaVA's terms, and back.

transformers keeps the language model's settings in `text_config` and the vision tower's in `vision_config`, stores the
tower beside the language model, and adds two tokens (`<image>`, `<pad>`) and rows of embeddings up to a multiple of 64.
Version 5 of it has other names in memory than in its files; both are found in folders.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.config_rules import (
    GENERATION_RULES,
    LANGUAGE_RULES,
    LLAVA_RULES,
    MAX_LAYERS,
    PREPROCESSOR_FILE,
    VISION_RULES,
    Values,
    check_pinpoints,
    check_values,
    choice,
    family_of,
    flag,
    read_canvases,
    record,
    refuse,
    require,
    whole,
)
from llava.model.stored_weights import find_file
from llava.model.token_reduction import CONFIG_KEY

PROCESSOR_FILE = "processor_config.json"
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
# The text half that a folder without `mm_vision_tower` is completed by: all of LLaVA's are trained on this CLIP.
USUAL_TOWER = "openai/clip-vit-large-patch14-336"
ROW_MULTIPLE = 64
VOCABULARY_KEY = "llava_vocab_size"  # in a converted config.json: rows of LLaVA's own embeddings
ADDED_TOKENS = ("<image>", "<pad>")  # behind the tokenizer's own

# Names in the files of transformers 4 (and of transformers 5, which renames while it loads and saves) and 5's own, as
# regular expressions; what they become here. LLaVA's own names match none of them.
STORED_PREFIX = "model.vision_tower.vision_tower."
_VISION_PREFIX = f"{STORED_PREFIX}vision_model."
NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^image_newline$": "model.image_newline",
    r"^vision_tower\.(?:vision_model\.)?": _VISION_PREFIX,
    r"^model\.vision_tower\.(?!vision_tower\.|text_tower\.)(?:vision_model\.)?": _VISION_PREFIX,
}
# The other way, into the names that every version reads.
HF_NAMES = {
    r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^model\.image_newline$": "image_newline",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.": "language_model.model.",
}

# Language models, by their model_type: what their architectures are called.
_MODELS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_VISION_TYPE = "clip_vision_model"
_SELECT_FEATURES = {"default": "patch", "full": "cls_patch"}
HF_RULES = {
    "text_config": record(),
    "vision_config": record(),
    "image_token_index": whole(0, 2**24),
    "image_token_id": whole(0, 2**24),
    "projector_hidden_act": choice("gelu"),
    "multimodal_projector_bias": flag(only=True),
    "vision_feature_layer": whole(-MAX_LAYERS, MAX_LAYERS, null=False, why="; LLaVA-1.5 has -2"),
    "vision_feature_select_strategy": choice(*_SELECT_FEATURES, null=False),
    "use_image_newline_parameter": flag(only=True),
}
_NO_SETTINGS = ("_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version")
# LLaVA's keys, which transformers keeps as they are beside its own.
_LLAVA_KEYS = tuple(
    key for key in (*LLAVA_RULES, CONFIG_KEY) if key not in ("vision_config", "unfreeze_mm_vision_tower")
)


def rename(name: str, table: Mapping[str, str]) -> str:
    """Rename a tensor: `NAMES` and the like, one after the other, as transformers' `key_mapping` does it."""
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


# -------------------------------------------------------------------------------------------------------- into LLaVA's
def to_llava_config(values: Values, file: str, path: str) -> dict:
    """Put the config.json of a llava-hf folder in LLaVA's terms.

    Keys of LLaVA that the file has beside transformers' win: `mm_vision_tower` (whose text half completes the folder's
    vision half), `image_aspect_ratio`, `mm_vision_token_reduce_func`, `conv_mode`.

    Args:
        values: the JSON object.
        file: for messages.
        path: the folder or hub id, whose image processor says how images become squares.

    Returns:
        The keys of LLaVA's config.json, and `vision_config`.

    Raises:
        InputError: a wrong value, another language model or another tower than LLaVA's.
    """
    check_values(values, HF_RULES, file)
    require(values, ("text_config", "vision_config"), file)
    language, vision = values["text_config"], values["vision_config"]
    family = language.get("model_type") or "llama"
    if not isinstance(family, str) or family not in _MODELS:
        refuse(file, "text_config.model_type", family, f"one of {', '.join(_MODELS)}")
    if vision.get("model_type", _VISION_TYPE) != _VISION_TYPE:
        refuse(file, "vision_config.model_type", vision["model_type"], f'"{_VISION_TYPE}"')
    check_values(language, LANGUAGE_RULES[family] | GENERATION_RULES, file, "text_config")
    check_values(vision, VISION_RULES, file, "vision_config")
    require(vision, ("hidden_size",), file, "vision_config")
    settings = {key: value for key, value in language.items() if key not in _NO_SETTINGS}
    settings |= {
        key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None
    }
    settings |= {
        "model_type": f"llava_{family}",
        "architectures": [f"Llava{_MODELS[family]}ForCausalLM"],
        "dtype": values.get("dtype", values.get("torch_dtype")) or "float32",
        "tie_word_embeddings": bool(values.get("tie_word_embeddings") or language.get("tie_word_embeddings")),
        "mm_vision_tower": USUAL_TOWER,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": values.get("vision_feature_layer", -2),
        "mm_vision_select_feature": _SELECT_FEATURES[values.get("vision_feature_select_strategy", "default")],
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # LLaVA's word for a checkpoint that holds its tower
        "vision_config": _vision_settings(vision),
    }
    if values["model_type"] == "llava_next":
        check_pinpoints(values.get("image_grid_pinpoints"), file)
        settings |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _turn(values["image_grid_pinpoints"]),
        }
    else:
        settings |= {"image_aspect_ratio": "pad" if read_preprocessor(path)[0].get("do_pad") else "square"}
    own = {key: values[key] for key in _LLAVA_KEYS if values.get(key) is not None}
    return settings | own


def _vision_settings(vision: Values) -> dict:
    """Copy what describes a vision half; old files have the language model's `vocab_size` beside it."""
    settings = {key: vision[key] for key in VISION_RULES if key not in _NO_SETTINGS and vision.get(key) is not None}
    return {"model_type": _VISION_TYPE, **settings}


def _turn(pinpoints: object) -> list[list[int]]:
    """Swap the sides of canvases: transformers has (height, width), LLaVA (width, height)."""
    return [[second, first] for first, second in read_canvases(pinpoints)]


def read_preprocessor(path: str) -> tuple[dict, str]:
    """Read the settings of a folder's image processor: a file of their own, or inside those of the whole processor.

    Returns:
        The settings, and the file's path.

    Raises:
        InputError: there are none.
    """
    file = find_file(path, PREPROCESSOR_FILE)
    if file is not None:
        return parse_record(read_text(Path(file)), file), file
    file = find_file(path, PROCESSOR_FILE)
    inner = None if file is None else parse_record(read_text(Path(file)), file).get("image_processor")
    if not isinstance(inner, dict):
        raise InputError(f"{path} has no {PREPROCESSOR_FILE}, and no {PROCESSOR_FILE} with an image_processor")
    return inner, file


# --------------------------------------------------------------------------------------------------- into transformers'
def to_hf_config(values: Values, file: str, vision: Values, num_patches: int, num_tokens: int) -> dict:
    """Put the config.json of a LLaVA checkpoint in transformers' terms.

    Args:
        values: the JSON object, checked.
        file: for messages.
        vision: the vision half's config.
        num_patches: N of an image or crop.
        num_tokens: of the tokenizer; `<image>` and `<pad>` come behind them.

    Returns:
        A llava-hf folder's config.json; LLaVA's own keys stay in it.

    Raises:
        InputError: a setting that transformers' LLaVA does not have.
    """
    kind = "llava_next" if values.get("image_aspect_ratio") == "anyres" else "llava"
    merge = "spatial_unpad" if kind == "llava_next" else "flat"
    if (values.get("mm_projector_type") or "linear") != "mlp2x_gelu":
        refuse(file, "mm_projector_type", values.get("mm_projector_type"), '"mlp2x_gelu": transformers has no other')
    if kind == "llava_next" and values.get("mm_patch_merge_type") != merge:
        refuse(file, "mm_patch_merge_type", values.get("mm_patch_merge_type"), f'"{merge}": transformers has no other')
    if values.get("mm_use_im_start_end"):
        refuse(file, "mm_use_im_start_end", True, "false: transformers' processor puts no tokens around an image")
    vocab_size = values.get("vocab_size", 32_000)
    llava = {key: values[key] for key in (*_LLAVA_KEYS, "unfreeze_mm_vision_tower") if values.get(key) is not None}
    dtype = values.get("dtype", values.get("torch_dtype"))
    features = {feature: strategy for strategy, feature in _SELECT_FEATURES.items()}
    settings = llava | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "text_config": {
            **to_language_config(values),
            "vocab_size": padded_size(vocab_size, num_tokens),
        },
        "vision_config": _vision_settings(vision),
        "image_token_index": num_tokens,
        "pad_token_id": num_tokens + 1,
        VOCABULARY_KEY: vocab_size,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": features[values.get("mm_vision_select_feature", "patch")],
        "image_seq_length": num_patches + int(values.get("mm_vision_select_feature") == "cls_patch"),
    }
    settings |= {key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None}
    if kind == "llava_next":
        settings |= {
            "image_grid_pinpoints": _turn(values["image_grid_pinpoints"]),
            "use_image_newline_parameter": True,
        }
    return settings


def to_language_config(values: Values) -> dict:
    """Pick the language model's own settings out of a LLaVA config, as the config.json of a plain language model."""
    family = family_of(values.get("model_type"))
    language = {
        key: value
        for key, value in values.items()
        if key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
        or (key in LANGUAGE_RULES[family] and key not in _NO_SETTINGS)
    }
    return {
        **language,
        "model_type": family,
        "architectures": [f"{_MODELS[family]}ForCausalLM"],
        "dtype": values.get("dtype", values.get("torch_dtype")),
    }


def padded_size(vocab_size: int, num_tokens: int) -> int:
    """Return the rows of embeddings that hold a vocabulary and a tokenizer's tokens with `<image>` and `<pad>`."""
    return -(-max(vocab_size, num_tokens + len(ADDED_TOKENS)) // ROW_MULTIPLE) * ROW_MULTIPLE
