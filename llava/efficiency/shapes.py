"""The sizes of a LLaVA model, read from its config.json alone: what counting FLOPs and bytes needs, and no more.

Nothing here reads weights or loads a deep-learning library. Shape letters: `N` patches, `D` vision width, `P` joint
width, `E` language model width, `V` vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import InputError

# config.json of liuhaotian/llava-v1.5-7b and -13b: Vicuna v1.5 (the shapes of Llama 2, arXiv 2307.09288, table 1 of its
# predecessor arXiv 2302.13971), CLIP ViT-L/14 at 336 px, layer -2, two-layer projector (arXiv 2310.03744).
_LLAVA_1_5 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
    "tie_word_embeddings": False,
}
PUBLISHED_MODELS: dict[str, dict[str, Any]] = {
    "llava-v1.5-7b": _LLAVA_1_5
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llava-v1.5-13b": _LLAVA_1_5
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}

# Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", tables 19 and 20. The
# keys are Hugging Face's names; transformers' own defaults are those of ViT-B/32.
_VISION_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TEXT_BASE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_INPUT = {"vocab_size": 49408, "max_position_embeddings": 77}


def _clip(vision: dict, text: dict, joint_width: int, image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "projection_dim": joint_width,
        "vision_config": vision | {"image_size": image_size, "patch_size": patch_size},
        "text_config": text | _TEXT_INPUT,
    }


# Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", and Tschannen et al. 2025, "SigLIP 2": both halves
# have one shape ("so400m" is that of Alabdulmohsin et al. 2023), texts 64 tokens.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def _siglip(half: dict, image_size: int, patch_size: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "model_type": "siglip",
        "vision_config": half | {"image_size": image_size, "patch_size": patch_size},
        "text_config": half | {"vocab_size": vocabulary, "max_position_embeddings": 64},
    }


PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": _clip(_VISION_LARGE, _TEXT_LARGE, 768, 336, 14),
    "openai/clip-vit-large-patch14": _clip(_VISION_LARGE, _TEXT_LARGE, 768, 224, 14),
    "openai/clip-vit-base-patch16": _clip(_VISION_BASE, _TEXT_BASE, 512, 224, 16),
    "openai/clip-vit-base-patch32": _clip(_VISION_BASE, _TEXT_BASE, 512, 224, 32),
    "google/siglip-base-patch16-224": _siglip(_VISION_BASE, 224, 16),
    "google/siglip-so400m-patch14-384": _siglip(_SO400M, 384, 14),
    "google/siglip2-so400m-patch14-384": _siglip(_SO400M, 384, 14, 256000),
}
_CLIP_DEFAULTS = PUBLISHED_TOWERS["openai/clip-vit-base-patch32"]
_SIGLIP_DEFAULTS = PUBLISHED_TOWERS["google/siglip-base-patch16-224"]

# The same models under open_clip's names (`open_clip:<model>`), with and without "-quickgelu".
OPEN_CLIP_TOWERS = {
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16-SigLIP": "google/siglip-base-patch16-224",
    "ViT-SO400M-14-SigLIP-384": "google/siglip-so400m-patch14-384",
}


BIASED_TYPES = ("qwen2", "llava_qwen2", "llava_qwen")


@dataclass(frozen=True)
class TransformerShape:
    """A stack of CLIP's or SigLIP's encoder layers: `layers` of width `width`, MLPs of width `inner`."""

    layers: int
    width: int
    inner: int


@dataclass(frozen=True)
class TowerShape:
    """A CLIP or a SigLIP.

    Attributes:
        vision: the vision layers that lead to the selected hidden state.
        num_layers: all vision layers, those that are not run included.
        patch_size: side of a patch in pixels.
        image_size: side of the picture in pixels.
        text: the text layers.
        text_vocabulary: size of the text tower's vocabulary.
        text_context: most tokens that the text tower reads.
        joint_width: P; of a SigLIP the vision width.
        is_siglip: no CLS row, and a patch's way into the joint space leads through the pooling head.
    """

    vision: TransformerShape
    num_layers: int
    patch_size: int
    image_size: int
    text: TransformerShape
    text_vocabulary: int
    text_context: int
    joint_width: int
    is_siglip: bool = False

    @property
    def side(self) -> int:
        """Rows of the patch grid, as many as columns."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, without the CLS row."""
        return self.side**2

    @property
    def num_rows(self) -> int:
        """Rows that a layer reads: the patches, and CLS where there is one."""
        return self.num_patches + (not self.is_siglip)


@dataclass(frozen=True)
class LanguageShape:
    """A Llama, Mistral or Qwen2.

    Attributes:
        layers: decoder layers.
        width: E.
        inner: width inside the MLP (three matrices).
        query_width: heads times their width.
        cache_width: width of the keys, and of the values, of one position in one layer.
        vocabulary: V.
        is_tied: whether the output layer is the embedding matrix.
        has_biases: whether queries, keys and values have biases, as in Qwen2.
    """

    layers: int
    width: int
    inner: int
    query_width: int
    cache_width: int
    vocabulary: int
    is_tied: bool
    has_biases: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA: tower, projector (`projector_depth` linear layers) and language model."""

    tower: TowerShape
    projector_depth: int
    language: LanguageShape


@dataclass(frozen=True)
class ModelSource:
    """What `--model-path` stands for.

    Attributes:
        name: as given.
        config: the model's config.json.
        tower_config: the vision tower's config.json, in Hugging Face's keys.
        shape: the sizes in them.
        has_weights: whether a folder with weights was given.
    """

    name: str
    config: Mapping[str, Any]
    tower_config: Mapping[str, Any]
    shape: ModelShape
    has_weights: bool


def read_source(model_path: str) -> ModelSource:
    """Find out what a model looks like.

    Args:
        model_path: a folder with a config.json (weights may be missing), or the name of a published model.

    Raises:
        InputError: nothing is there, or a config lacks a size.
    """
    folder = Path(model_path).expanduser()
    has_weights = False
    if folder.is_dir():
        config = _read_json(folder / "config.json")
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    else:
        published = model_path.removeprefix("liuhaotian/")
        if published not in PUBLISHED_MODELS:
            raise InputError(
                f"no folder {model_path}: give one with a config.json, or one of {', '.join(PUBLISHED_MODELS)}"
            )
        config = PUBLISHED_MODELS[published]
    vision = None
    if isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict):
        config, vision = _from_hf_layout(config)
    if not config.get("mm_vision_tower"):
        raise InputError(f"{model_path}: its config.json names no mm_vision_tower: a language model without eyes")
    tower_config = read_tower_config(str(config["mm_vision_tower"]), folder)
    if vision is not None:
        tower_config = {**tower_config, "vision_config": vision}
    shape = read_shape(config, tower_config, f"config of {model_path}")
    return ModelSource(model_path, config, tower_config, shape, has_weights)


def _from_hf_layout(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the sizes of a llava-hf folder, transformers' own LLaVA, in LLaVA's keys; the vision half's come apart.

    What its files leave out is what transformers assumes: the sizes of the 7B model and its tower.
    """
    usual = PUBLISHED_TOWERS[_LLAVA_1_5["mm_vision_tower"]]["vision_config"]
    vision = {**usual, **config["vision_config"]}
    own = {key: value for key, value in config.items() if key.startswith("mm_")}
    aspect = "anyres" if config.get("model_type") == "llava_next" else "pad"
    sizes = {
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "image_aspect_ratio": aspect,
    }
    return {**PUBLISHED_MODELS["llava-v1.5-7b"], **config["text_config"], **sizes, **own}, vision


def read_tower_config(name: str, folder: Path) -> dict[str, Any]:
    """Find the config of a vision tower.

    Args:
        name: `mm_vision_tower`.
        folder: the checkpoint's folder, against which relative paths are tried as well.

    Raises:
        InputError: neither a folder nor a known name.
    """
    for candidate in (Path(name).expanduser(), folder / name):
        if (candidate / "config.json").is_file():
            return _read_json(candidate / "config.json")
    if name.startswith("open_clip:"):
        model = name.removeprefix("open_clip:").split(",")[0].removesuffix("-quickgelu")
        name = OPEN_CLIP_TOWERS.get(model, name)
    if name not in PUBLISHED_TOWERS:
        known = ", ".join([*PUBLISHED_TOWERS, *(f"open_clip:{model}" for model in OPEN_CLIP_TOWERS)])
        raise InputError(
            f"the shape of vision tower {name} is not known: give a folder with its config.json, or one of {known}"
        )
    return PUBLISHED_TOWERS[name]


def read_shape(config: Mapping[str, Any], tower_config: Mapping[str, Any], origin: str) -> ModelShape:
    """Read the sizes out of two configs.

    Args:
        config: the model's.
        tower_config: the vision tower's.
        origin: where they come from, for messages.

    Raises:
        InputError: a size is missing, or the model is of a kind that is not counted.
    """
    if config.get("image_aspect_ratio") == "anyres":
        raise InputError(f"{origin}: image_aspect_ratio anyres (several crops per picture) is not counted")
    try:
        return ModelShape(
            _tower_shape(config, tower_config),
            projector_depth(config.get("mm_projector_type")),
            _language_shape(config),
        )
    except KeyError as error:
        raise InputError(f"{origin} lacks {error.args[0]}") from None
    except ZeroDivisionError:
        raise InputError(f"{origin} holds a size of 0") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin} holds a size that is no number: {error}") from None


def projector_depth(kind: str | None) -> int:
    """Return how many linear layers an `mm_projector_type` has.

    Raises:
        InputError: for an unknown type.
    """
    kind = kind or "linear"
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    depth = kind.removeprefix("mlp").removesuffix("x_gelu") if isinstance(kind, str) else ""
    if kind != f"mlp{depth}x_gelu" or not depth.isdigit():
        raise InputError(f'mm_projector_type "{kind}" is unknown: use linear, mlp2x_gelu (any depth) or identity')
    return int(depth)


def _language_shape(config: Mapping[str, Any]) -> LanguageShape:
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or width // heads)
    return LanguageShape(
        layers=int(config["num_hidden_layers"]),
        width=width,
        inner=int(config["intermediate_size"]),
        query_width=heads * head_width,
        cache_width=int(config.get("num_key_value_heads") or heads) * head_width,
        vocabulary=int(config["vocab_size"]),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_biases=config.get("model_type") in BIASED_TYPES,
    )


def _tower_shape(config: Mapping[str, Any], tower_config: Mapping[str, Any]) -> TowerShape:
    is_siglip = is_siglip_config(tower_config)
    usual = _SIGLIP_DEFAULTS if is_siglip else _CLIP_DEFAULTS
    vision = usual["vision_config"] | dict(tower_config["vision_config"])
    text = usual["text_config"] | dict(tower_config.get("text_config") or {})
    joint_width = vision["hidden_size"] if is_siglip else tower_config.get("projection_dim", usual["projection_dim"])
    num_layers, select = int(vision["num_hidden_layers"]), int(config.get("mm_vision_select_layer", -2))
    layers_run = select if select >= 0 else num_layers + 1 + select
    if not 0 <= layers_run <= num_layers:
        raise ValueError(f"mm_vision_select_layer {select} of a tower with {num_layers} layers")
    return TowerShape(
        vision=TransformerShape(layers_run, int(vision["hidden_size"]), int(vision["intermediate_size"])),
        num_layers=num_layers,
        patch_size=int(vision["patch_size"]),
        image_size=int(vision["image_size"]),
        text=TransformerShape(int(text["num_hidden_layers"]), int(text["hidden_size"]), int(text["intermediate_size"])),
        text_vocabulary=int(text["vocab_size"]),
        text_context=int(text["max_position_embeddings"]),
        joint_width=int(joint_width),
        is_siglip=is_siglip,
    )


def is_siglip_config(tower_config: Mapping[str, Any]) -> bool:
    """Whether a tower's config.json is a SigLIP's; all others are read as CLIP's."""
    return tower_config.get("model_type") == "siglip"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is no JSON object")
    return values
