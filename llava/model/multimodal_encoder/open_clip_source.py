"""Find the open_clip model that `mm_vision_tower` names, strictly: what does not fit ends in one line.

Spelling: `open_clip:<model>[,pretrained=<weights>][,quickgelu=true|false]`, where <model> is

- an architecture of open_clip (`ViT-L-14-336-quickgelu`), with `pretrained=` a weights file (.safetensors, .bin, .pt,
  .pth; OpenAI's own TorchScript files too) or one of open_clip's tags, which are downloaded;
- `local-dir:<folder>` with `open_clip_config.json` and a weights file;
- `hf-hub:<org>/<name>`, the same on the hub.

Paths are taken as given, else relative to the checkpoint folder. OpenAI's weights, and some others, were trained with
QuickGELU; run with GELU they give slightly wrong features and nothing fails. open_clip's tags know which they need and
are held to it. A weights file does not record it: the architecture decides (`-quickgelu` in its name), or
`quickgelu=` does. SigLIP has GELU only.
"""

import difflib
import logging
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.pretrained import download_pretrained_from_hf
from timm.layers import AttentionPoolLatent
from torch import nn

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.config_rules import (
    OPEN_CLIP_PIXEL_RULES,
    OPEN_CLIP_RULES,
    OPEN_CLIP_TEXT_RULES,
    OPEN_CLIP_VISION_RULES,
    check_values,
    refuse,
    require,
)
from llava.model.multimodal_encoder.open_clip_weights import choose_weights, fill_model, read_weights
from llava.model.stored_weights import first_line

LOCAL_PREFIX, HUB_PREFIX, QUICK_SUFFIX = "local-dir:", "hf-hub:", "-quickgelu"
CONFIG_FILE = "open_clip_config.json"
NEEDED = (
    "this tower needs a CLIP-style ViT (CLS token, ln_post + proj, plain text transformer) or a SigLIP (timm's ViT "
    "without CLS, attention pooling, a text transformer read at its last position)"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenClipSource:
    """Where an open_clip model comes from.

    Attributes:
        name: as written in `mm_vision_tower`, for messages.
        model: what open_clip calls it: an architecture, `local-dir:<absolute folder>` or `hf-hub:<id>`.
        weights: file, or tag of open_clip; None for hub models.
        quick_gelu: which activation; None leaves it to the model's config.
    """

    name: str
    model: str
    weights: Path | str | None
    quick_gelu: bool | None

    @cached_property
    def vision_config(self) -> open_clip.CLIPVisionCfg:
        """The vision half's settings; on the first call a hub model's config is downloaded.

        Raises:
            InputError: for a config that is broken, or not of a model that this tower can run.
        """
        return check_architecture(self._settings["model_cfg"], self.name)

    @property
    def is_siglip(self) -> bool:
        """Whether it is a SigLIP: timm's ViT with attention pooling, and a text transformer beside it."""
        return self.vision_config.timm_model_name is not None

    @property
    def preprocessing(self) -> dict:
        """What the config holds about pixel values: mean, std, interpolation; may be empty."""
        return self._settings.get("preprocess_cfg") or {}

    @property
    def vocab_size(self) -> int:
        """How many ids the text half knows, as the config says."""
        text_config = self._settings["model_cfg"].get("text_cfg") or {}
        return text_config.get("vocab_size", open_clip.CLIPTextCfg.vocab_size)

    def load(self) -> open_clip.CLIP | open_clip.CustomTextCLIP:
        """Build the whole model, in float32 on the CPU, with its weights.

        Returns:
            The model in evaluation mode.

        Raises:
            InputError: for weights that are broken or do not fit, and settings that open_clip refuses.
        """
        _ = self.vision_config  # checked before anything large is read
        config = {key: value for key, value in self._settings["model_cfg"].items() if key != "custom_text"}
        if self.quick_gelu is not None:
            config["quick_gelu"] = self.quick_gelu
        if self.is_siglip:
            config["vision_cfg"] = config["vision_cfg"] | {"timm_model_pretrained": False}
        path = self._find_weights()
        weights = read_weights(path, self.name)
        try:
            with torch.device("meta"):  # drawing random weights would take longer than reading the real ones
                model = (open_clip.CustomTextCLIP if self.is_siglip else open_clip.CLIP)(**config)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise InputError(f"vision tower {self.name}: open_clip refuses its config: {first_line(error)}") from error
        fill_model(model, weights, f"vision tower {self.name}: weights {path}")
        return model.eval()

    def load_tokenizer(self, vocab_size: int) -> object:
        """Load the tokenizer that belongs to the text half.

        Args:
            vocab_size: how many ids the text half knows.

        Returns:
            A callable: S strings to `int64[S, context length]`, cut and padded.

        Raises:
            InputError: when it isn't there, or has more ids than the text half.
        """
        try:
            tokenizer = open_clip.get_tokenizer(self.model)
        except Exception as error:
            # Many kinds: whatever transformers and the hub raise for a tokenizer that isn't there or is broken.
            raise InputError(f"text tower {self.name}: its tokenizer can't be loaded: {first_line(error)}") from error
        size = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
        if size > vocab_size:
            raise InputError(
                f"text tower {self.name} knows {vocab_size} token ids, its tokenizer has {size}: "
                f"put the right tokenizer next to {CONFIG_FILE} and name it there (text_cfg: hf_tokenizer_name)"
            )
        return tokenizer

    @cached_property
    def _settings(self) -> dict:
        """The model's `open_clip_config.json`, or the same put together from open_clip's own lists."""
        if self.model.startswith(LOCAL_PREFIX):
            return read_settings(Path(self.model.removeprefix(LOCAL_PREFIX)) / CONFIG_FILE, self.name)
        if self.model.startswith(HUB_PREFIX):
            return read_settings(self._download(CONFIG_FILE), self.name)
        tag = self.weights if isinstance(self.weights, str) else ""
        preprocessing = open_clip.get_pretrained_cfg(self.model, tag)
        return {"model_cfg": open_clip.get_model_config(self.model), "preprocess_cfg": preprocessing}

    def _find_weights(self) -> Path:
        return self.weights if isinstance(self.weights, Path) else self._download(None)

    def _download(self, filename: str | None) -> Path:
        """Fetch a file of a hub model, or with None the weights (of a hub model or a tag)."""
        try:
            if self.model.startswith(HUB_PREFIX):
                return Path(download_pretrained_from_hf(self.model.removeprefix(HUB_PREFIX), filename=filename))
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(self.model, self.weights)))
        except Exception as error:
            # Many kinds: hub, network and file errors.
            what = filename or "weights"
            raise InputError(f"vision tower {self.name}: {what} can't be downloaded: {first_line(error)}") from error


def parse_source(spec: str, folder: str | Path | None = None) -> OpenClipSource:
    """Parse what follows `open_clip:`; looks at local files, downloads and loads nothing.

    Args:
        spec: `<model>[,pretrained=<weights>][,quickgelu=true|false]`.
        folder: the checkpoint folder, against which relative paths are tried as well.

    Returns:
        The source; a local model's config has been checked.

    Raises:
        InputError: for whatever is wrong with the spelling, or not there.
    """
    name = f"open_clip:{spec}"
    model, options = _split_options(spec, name)
    pretrained = options.get("pretrained")
    quick_gelu = {None: None, "true": True, "false": False}[options.get("quickgelu")]
    if model.startswith((LOCAL_PREFIX, HUB_PREFIX)) and pretrained:
        raise InputError(f"vision tower {name}: weights come with the model there, leave pretrained= out")
    if model.startswith(HUB_PREFIX):
        return OpenClipSource(name, model, None, quick_gelu)
    if model.startswith(LOCAL_PREFIX):
        place, tried = _find_path(model.removeprefix(LOCAL_PREFIX), folder)
        if place is None or not place.is_dir():
            raise InputError(f"vision tower {name}: there is no such folder (tried {tried})")
        source = OpenClipSource(name, f"{LOCAL_PREFIX}{place}", choose_weights(place, name), quick_gelu)
    else:
        model = model.replace("/", "-")  # "ViT-B/32" is what people call it
        source = OpenClipSource(name, model, _resolve_weights(name, model, pretrained, folder), quick_gelu)
        _check_activation(source)
    if source.is_siglip and source.quick_gelu is not None:
        raise InputError(f"vision tower {name} is a SigLIP, which has GELU: leave quickgelu= out")
    return source


def _split_options(spec: str, name: str) -> tuple[str, dict[str, str]]:
    # Only a comma before `name=` separates, so that paths may hold commas.
    model, *parts = re.split(r",(?=\w+=)", spec)
    options: dict[str, str] = {}
    for part in parts:
        key, value = part.split("=", 1)
        if key not in ("pretrained", "quickgelu") or key in options or not value:
            raise InputError(f'vision tower {name}: can\'t read "{part}"; use ,pretrained=WEIGHTS and ,quickgelu=true')
        options[key] = value
    if options.get("quickgelu", "true") not in ("true", "false"):
        raise InputError(f"vision tower {name}: quickgelu is true or false, not {options['quickgelu']}")
    if not model or model in (LOCAL_PREFIX, HUB_PREFIX):
        raise InputError(f"vision tower {name} names no model: use open_clip:ViT-L-14-336-quickgelu,pretrained=WEIGHTS")
    return model, options


def _find_path(path: str, folder: str | Path | None) -> tuple[Path | None, str]:
    """Where a path leads (absolute), or None; and what was tried."""
    candidates = [Path(path).expanduser()]
    if folder and not candidates[0].is_absolute():
        candidates.append(Path(folder).expanduser() / path)
    found = next((candidate.absolute() for candidate in candidates if candidate.exists()), None)
    return found, " and ".join(str(candidate) for candidate in candidates)


def _resolve_weights(name: str, model: str, pretrained: str | None, folder: str | Path | None) -> Path | str:
    known = open_clip.list_models()
    if model not in known:
        spelled = {entry.lower(): entry for entry in known}
        close = [spelled[entry] for entry in difflib.get_close_matches(model.lower(), spelled, n=4, cutoff=0.5)]
        hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() lists them"
        raise InputError(f"vision tower {name}: open_clip knows no model {model}; {hint}")
    check_architecture(open_clip.get_model_config(model), name)
    own_tags = open_clip.list_pretrained_tags_by_model(model)
    tags = ", ".join(own_tags[:6] + ["..."] * (len(own_tags) > 6)) or "none"
    if pretrained is None:
        raise InputError(f"vision tower {name} has no weights: add ,pretrained=FILE or a tag of open_clip ({tags})")
    place, tried = _find_path(pretrained, folder)
    if place is not None and place.is_file():
        return place
    if open_clip.is_pretrained_cfg(model, pretrained):
        return pretrained
    raise InputError(
        f"vision tower {name}: weights {pretrained} are neither a file (tried {tried}) "
        f"nor one of open_clip's tags for {model} ({tags})"
    )


def _check_activation(source: OpenClipSource) -> None:
    """Refuse a tag with the wrong activation; point out that a file leaves the question open."""
    if source.quick_gelu is not None:
        return
    has_quick = bool(open_clip.get_model_config(source.model).get("quick_gelu"))
    if isinstance(source.weights, str):
        needs_quick = bool(open_clip.get_pretrained_cfg(source.model, source.weights).get("quick_gelu"))
        if needs_quick != has_quick:
            right = "true" if needs_quick else "false"
            raise InputError(
                f"vision tower {source.name}: {source.weights} was trained {'with' if needs_quick else 'without'} "
                f"QuickGELU, unlike the model {source.model}: add ,quickgelu={right}"
            )
    elif not has_quick and source.model + QUICK_SUFFIX in open_clip.list_models():
        logger.warning(
            "vision tower %s runs with GELU, as open_clip's %s does; weights from OpenAI need ,quickgelu=true "
            "(,quickgelu=false silences this)",
            source.name,
            source.model,
        )


def read_settings(path: Path, name: str) -> dict:
    """Read an `open_clip_config.json`.

    Raises:
        InputError: when it is absent or broken.
    """
    if not path.is_file():
        raise InputError(
            f"vision tower {name}: no {path.name} in {path.parent} (a Hugging Face CLIP is named without open_clip:)"
        )
    settings = parse_record(read_text(path), f"vision tower {name}: {path}")
    if not isinstance(settings.get("model_cfg"), dict):
        raise InputError(f"vision tower {name}: {path} has no model_cfg")
    pixels = settings.get("preprocess_cfg") or {}
    if not isinstance(pixels, dict):
        refuse(str(path), "preprocess_cfg", pixels, "an object")
    check_values(pixels, OPEN_CLIP_PIXEL_RULES, str(path), "preprocess_cfg")
    return settings


def check_architecture(config: dict, name: str) -> open_clip.CLIPVisionCfg:
    """Check that a tower of this kind can run a model, from its `model_cfg` alone.

    Returns:
        The vision half's settings, defaults filled in, `image_size` and `patch_size` as one number.

    Raises:
        InputError: for anything but a CLIP-style ViT, or a SigLIP, on square images.
    """
    where = f"vision tower {name}: model_cfg"
    check_values(config, OPEN_CLIP_RULES, where)
    require(config, ("embed_dim", "vision_cfg", "text_cfg"), where)
    try:
        vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
        text = open_clip.CLIPTextCfg(**config["text_cfg"])
    except (KeyError, TypeError) as error:
        raise InputError(f"vision tower {name}: its model_cfg is none of open_clip: {first_line(error)}") from None
    if vision.timm_model_name and vision.timm_pool == "map":
        return check_siglip(config, vision, text, name)
    obstacles = {
        "a custom text tower": config.get("custom_text") or text.hf_model_name or "multimodal_cfg" in config,
        "a timm image tower": vision.timm_model_name,
        "a ResNet": not isinstance(vision.layers, int),
        "attention pooling": vision.attentional_pool,
    }
    found = [what for what, is_there in obstacles.items() if is_there]
    if found:
        raise InputError(f"vision tower {name} has {' and '.join(found)}: {NEEDED}")
    sides = {key: _one_side(getattr(vision, key), key, name) for key in ("image_size", "patch_size")}
    check_values(vars(vision) | sides, OPEN_CLIP_VISION_RULES, where, "vision_cfg")
    check_values(vars(text), OPEN_CLIP_TEXT_RULES, where, "text_cfg")
    if vision.width % vision.head_width:
        refuse(where, "vision_cfg.head_width", vision.head_width, f"a divisor of width {vision.width}")
    if sides["patch_size"] > sides["image_size"]:
        refuse(where, "vision_cfg.patch_size", sides["patch_size"], f"at most image_size {sides['image_size']}")
    vision.image_size, vision.patch_size = sides["image_size"], sides["patch_size"]
    return vision


def check_siglip(
    config: dict, vision: open_clip.CLIPVisionCfg, text: open_clip.CLIPTextCfg, name: str
) -> open_clip.CLIPVisionCfg:
    """Check a model whose image half is timm's ViT with attention pooling; return its settings with timm's sizes.

    Raises:
        InputError: for anything but a SigLIP.
    """
    where = f"vision tower {name}: model_cfg"
    obstacles = {
        "a text tower of another library": text.hf_model_name or "multimodal_cfg" in config,
        "no text tower of its own": not config.get("custom_text"),
        "a projection behind the pooling": vision.timm_proj not in ("none", "", None),
        "a causal text tower": not text.no_causal_mask,
        f"a text tower read at {text.pool_type}": text.pool_type != "last" or text.embed_cls,
    }
    found = [what for what, is_there in obstacles.items() if is_there]
    if found:
        raise InputError(f"vision tower {name} has {' and '.join(found)}: {NEEDED}")
    if not text.hf_tokenizer_name:  # open_clip would read its texts with CLIP's
        refuse(where, "text_cfg.hf_tokenizer_name", text.hf_tokenizer_name, "the name of SigLIP's tokenizer")
    check_values(vars(text), OPEN_CLIP_TEXT_RULES, where, "text_cfg")
    trunk = build_trunk(vision.timm_model_name, where)
    if not isinstance(getattr(trunk, "attn_pool", None), AttentionPoolLatent) or trunk.num_prefix_tokens:
        raise InputError(f"vision tower {name}: {vision.timm_model_name} is not SigLIP's ViT: {NEEDED}")
    sides = {"image_size": trunk.patch_embed.img_size[0], "patch_size": trunk.patch_embed.patch_size[0]}
    if _one_side(vision.image_size, "image_size", name) != sides["image_size"]:
        refuse(where, "vision_cfg.image_size", vision.image_size, f"{sides['image_size']}, that of its timm model")
    if config["embed_dim"] != trunk.embed_dim:
        refuse(where, "embed_dim", config["embed_dim"], f"{trunk.embed_dim}, the width of its timm model")
    return replace(vision, **sides, width=trunk.embed_dim, layers=len(trunk.blocks))


def build_trunk(model: str, where: str) -> nn.Module:
    """Build timm's image half of a SigLIP, with attention pooling and without memory for its weights.

    Raises:
        InputError: timm knows no such model, or it has no attention pooling.
    """
    if not timm.is_model(model):
        refuse(where, "vision_cfg.timm_model_name", model, "a model of timm, such as vit_base_patch16_siglip_224")
    try:
        with torch.device("meta"):
            return timm.create_model(model, num_classes=0, global_pool="map")
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{where}: timm refuses {model} with attention pooling: {first_line(error)}") from error


def _one_side(size: int | list[int], what: str, name: str) -> int:
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not sides or any(side != sides[0] for side in sides):
        raise InputError(f"vision tower {name}: {what} {size} is not square; LLaVA reads square images")
    return sides[0]
