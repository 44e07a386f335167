"""Build the vision tower that `mm_vision_tower` names: a Hugging Face CLIP or SigLIP, or `open_clip:<model>`."""

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llava.errors import InputError
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.loading import is_siglip, resolve_name
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower, holds_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.token_reduction import Need

OPEN_CLIP_PREFIX = "open_clip:"


def build_named_tower(
    name: str,
    *,
    folder: str | Path | None = None,
    select_layer: int = -2,
    select_feature: str = "patch",
    needs: Collection[Need] = frozenset(),
    is_stored: bool = False,
    vision_config: dict | None = None,
) -> VisionTower:
    """Build a tower without loading its weights.

    Args:
        name: `mm_vision_tower`: hub id or path of a Hugging Face CLIP or SigLIP, or
            `open_clip:<model>[,pretrained=FILE]`.
        folder: the checkpoint folder, against which relative paths are tried as well.
        select_layer: `mm_vision_select_layer`.
        select_feature: `mm_vision_select_feature`.
        needs: what token reductions look at besides the patches.
        is_stored: `unfreeze_mm_vision_tower`: the checkpoint's own weights hold the vision half, where they do; `name`
            is the CLIP that it comes from.
        vision_config: the vision half's settings, where the checkpoint has them too.

    Returns:
        The tower, empty until `load_model`.

    Raises:
        InputError: for a path that does not exist, unknown settings, or needs that such a tower does not serve.
    """
    settings = {"select_layer": select_layer, "select_feature": select_feature, "needs": needs}
    if name.startswith(OPEN_CLIP_PREFIX):
        from llava.model.multimodal_encoder.open_clip_encoder import build_open_clip_tower

        return build_open_clip_tower(name.removeprefix(OPEN_CLIP_PREFIX), folder=folder, **settings)
    if is_stored and folder and holds_tower(str(folder)):
        if is_siglip(name, folder):
            raise InputError(
                f"{folder} holds a SigLIP vision tower in its own weights (unfreeze_mm_vision_tower): only a CLIP is "
                "read from there"
            )
        return StoredVisionTower(str(folder), name, vision_config, **settings)
    place = resolve_name(name, folder)
    return (SiglipVisionTower if is_siglip(place) else CLIPVisionTower)(place, **settings)


def build_vision_tower(
    vision_tower_cfg: PreTrainedConfig, delay_load: bool = False, *, needs: Collection[Need] = frozenset()
) -> VisionTower:
    """Build the tower of a checkpoint's config.

    Args:
        vision_tower_cfg: the config, with `mm_vision_tower`.
        delay_load: leave the weights to `load_model`.
        needs: what token reductions look at besides the patches.

    Raises:
        InputError: as `build_named_tower`, and for weights that can't be loaded.
    """
    tower = build_named_tower(
        vision_tower_cfg.mm_vision_tower,
        folder=getattr(vision_tower_cfg, "_name_or_path", None),
        select_layer=getattr(vision_tower_cfg, "mm_vision_select_layer", -2),
        select_feature=getattr(vision_tower_cfg, "mm_vision_select_feature", "patch"),
        needs=needs,
        is_stored=bool(getattr(vision_tower_cfg, "unfreeze_mm_vision_tower", False)),
        vision_config=getattr(vision_tower_cfg, "vision_config", None),
    )
    if not delay_load:
        tower.load_model()
    return tower


def load_tower(
    name: str,
    *,
    needs: Collection[Need] = frozenset(),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> VisionTower:
    """Build and load a tower on its own, outside any LLaVA checkpoint.

    Args:
        name: as in `build_named_tower`.
        needs: what token reductions look at besides the patches; `TEXT` loads the text half.
        device: where to put it.
        dtype: what to run it in.

    Returns:
        The tower, ready.

    Raises:
        InputError: when it can't be loaded.
    """
    if not name:
        raise InputError("no vision tower given: name a folder, a hub id or open_clip:<model>")
    tower = build_named_tower(name, needs=needs)
    tower.load_model(device=device, dtype=dtype)
    return tower
