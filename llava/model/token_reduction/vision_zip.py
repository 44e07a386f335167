"""VisionZip: the patches that CLS attends to, CLS itself, and the others merged into a few contextual tokens.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467.
Repository dvlab-research/VisionZip at 3151f6df4fca, Apache-2.0; tokens equal those of its code on the recorded cases
(tests/golden/methods).

1. Dominant tokens: CLS and the patches with the largest sum over heads of its attention, in raster order.
2. Targets: every so-many-th of the other patches. Each patch left joins the target whose key, averaged over heads, has
   the greatest cosine with its own.
3. Contextual tokens: a target plus the mean of the patches that have joined it.

The budget is the authors' "dominant" number, which counts CLS. A "64-token setting" is `VisionZip:54,contextual=10`: 53
patches, CLS and 10 merged tokens; 192 is 162 + 30, 128 is 108 + 20, 32 is 27 + 5. CLS goes to the language model. With
fewer patches left than contextual tokens, which the code cannot take, each becomes one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import (
    Budget,
    ClsAttentionReducer,
    Need,
    ReducedTokens,
    VisualTokens,
    cosines,
    gather_kept,
    mark,
    select_top,
)

PUBLISHED_BUDGET = Budget(54)
CONTEXTUAL_SHARE = 5 / 32
"""Of a setting: 10 of 64, 20 of 128, 30 of 192, 5 of 32."""


def choose_targets(num_rest: int, contextual: int, device: torch.device | None = None) -> Tensor:
    """Choose every so-many-th of the patches that are left: `int64[contextual]` places among them."""
    return torch.arange(contextual, device=device) * max(1, num_rest // contextual)


def merge_into_targets(patches: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """Add to each target the mean of the patches that are most like it.

    Args:
        patches: `[I, R, D]` those that are left.
        keys: `float32[I, R, d]` averaged over heads.
        targets: `int64[T]` places among the R.

    Returns:
        `[I, T, D]`, dtype of the patches.
    """
    nearest = cosines(keys, keys[:, targets]).argmax(dim=2)  # [I, R]
    joins = F.one_hot(nearest, len(targets)).float()  # [I, R, T]
    joins = joins.index_fill(1, targets, 0)  # targets themselves join nobody
    total = joins.transpose(1, 2) @ patches.float()
    mean = total / joins.sum(dim=1).clamp(min=1)[..., None]
    return (patches[:, targets].float() + mean).to(patches.dtype)


@dataclass(frozen=True)
class VisionZip(ClsAttentionReducer):
    """CLS, dominant patches, and contextual tokens, in this order.

    Attributes:
        budget: a fraction or a count of dominant tokens, CLS among them.
        layer: whose attention, keys and CLS row are taken, as in `ClsAttentionReducer`.
        contextual: number of merged tokens.
    """

    budget: Budget = PUBLISHED_BUDGET
    contextual: int = 10

    spec_name: ClassVar[str] = "VisionZip"
    scores_name: ClassVar[str] = "CLS attention, summed over heads"
    made_name: ClassVar[str] = "CLS, rest merged around centres"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: a negative number of merged tokens.
        """
        super().__post_init__()
        if self.contextual < 0:
            raise InputError(f"contextual={self.contextual} must be 0 or more")

    @property
    def needs(self) -> frozenset[Need]:
        kinds = ("cls_attention", "cls", "keys") if self.contextual else ("cls_attention", "cls")
        return frozenset(Need(kind, self.layer, "layer") for kind in kinds)

    def at_budget(self, num_tokens: int) -> Self:
        """Compose a setting of so many tokens as the authors do."""
        contextual = round(num_tokens * CONTEXTUAL_SHARE)
        return replace(self, budget=Budget(max(2, num_tokens - contextual)), contextual=contextual)

    def most_tokens(self, num_patches: int) -> int:
        dominant = self.count_kept(num_patches + 1)
        return dominant + min(self.contextual, num_patches + 1 - dominant)

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Zip each image."""
        patches = tokens.patches
        num_images, num_patches, _ = patches.shape
        # 1. Dominant patches; CLS is one of the dominant tokens.
        scores = tokens.require(self.cls_attention).sum(dim=1)  # [I, N]
        num_kept = self.count_kept(num_patches + 1) - 1
        kept = select_top(scores, num_kept)
        dominant, _ = gather_kept(patches, kept, num_kept)  # [I, K, D]
        cls = tokens.require(Need("cls", self.layer))[:, None]  # [I, 1, D]
        # 2. Contextual tokens from the rest, in raster order.
        num_rest = num_patches - num_kept
        contextual = min(self.contextual, num_rest)
        features, centres = [dominant, cls.to(patches.dtype)], None
        place = (~kept).to(torch.uint8).argsort(dim=1, stable=True)  # kept patches, then the rest
        places = [place[:, :num_kept], torch.zeros_like(place[:, :1])]
        if contextual:
            place = place[:, num_kept:]  # [I, R]
            keys = tokens.require(Need("keys", self.layer)).float().mean(dim=1)[:, 1:]  # [I, N, d]
            targets = choose_targets(num_rest, contextual, place.device)
            rest, rest_keys = (
                each.gather(1, place[..., None].expand(-1, -1, each.shape[-1])) for each in (patches, keys)
            )
            features.append(merge_into_targets(rest, rest_keys, targets))
            centres = mark(place[:, targets], num_patches)
            places.append(place[:, targets])
        # 3. CLS is read first, and stands where the first patch does.
        features = torch.cat(features, dim=1)
        row = torch.arange(features.shape[1], device=patches.device)
        order = torch.cat([row[num_kept : num_kept + 1], row[:num_kept], row[num_kept + 1 :]])
        lengths = torch.full((num_images,), features.shape[1])
        order = order.expand(num_images, -1)
        return ReducedTokens(
            features, lengths, kept, scores, centres=centres, order=order, places=torch.cat(places, dim=1)
        )
