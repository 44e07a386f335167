"""Whether a vision tower is the vision half of a CLIP: only then does that CLIP's text half share its joint space.

Towers out of a checkpoint come without their text half, and a CLIP of the same shape with other weights would score
patches all the same. What both make of one image of noise tells them apart.
"""

import logging

import torch

from llava.errors import InputError
from llava.model.multimodal_encoder.tower import VisionTower

logger = logging.getLogger(__name__)

SAME_FEATURES = 0.1
"""Up to which difference (`compare_features`) two towers are one: rounding to 16 bits stays below."""
OTHER_FEATURES = 0.9
"""From which difference on they have nothing to do with each other. The features of unrelated towers do not correlate,
so that they differ by 1 or more, whatever their scale (random weights in place of the pocket CLIP: 1.2). In between is
the same tower, trained further."""


def check_origin(tower: VisionTower, clip: VisionTower, named: str) -> None:
    """Check that a tower comes from a CLIP; warn where it was trained further, by how much.

    Args:
        tower: loaded.
        clip: the vision half of the CLIP, loaded, with the same selected hidden state.
        named: how the user named the CLIP, for messages.

    Raises:
        InputError: it has another shape or other weights.
    """
    sizes = [
        f"{each.image_size} pixels, {each.num_patches} patches, width {each.hidden_size}, {each.num_layers} layers"
        for each in (tower, clip)
    ]
    if sizes[0] != sizes[1]:
        raise InputError(f"{named} is another tower ({sizes[1]}) than that of {tower.name} ({sizes[0]})")
    difference = compare_features(tower, clip)
    if not difference < OTHER_FEATURES:
        raise InputError(
            f"{named} is not the CLIP that the vision tower of {tower.name} comes from: their patch features "
            f"differ by {difference:.0%} on a probe image; name that CLIP, or use a method that reads no text"
        )
    if difference > SAME_FEATURES:
        logger.warning(
            "the vision tower of %s differs from %s by %.0f %% on a probe image: it was trained further, or comes from "
            "another CLIP; scores of text-guided token reduction are as good as that text half still fits",
            tower.name, named, 100 * difference,
        )  # fmt: skip


def compare_features(tower: VisionTower, other: VisionTower) -> float:
    """Compare two towers' patches of one image of noise: their difference, over what varies between the first's."""
    side = tower.image_size
    probe = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    own, others = (each.extract(probe).patches.float() for each in (tower, other))  # [1, N, D]
    varying = own - own.mean(dim=1, keepdim=True)
    return float((own - others).norm() / varying.norm())
