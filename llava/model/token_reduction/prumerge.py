"""PruMerge and PruMerge+: patches that stand out in CLS's attention, each with its nearest neighbours added to it.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv
2403.15388. Repository 42Shawn/LLaVA-PruMerge at 097c04116a58, Apache-2.0; kept patches and tokens equal those of its
code on the recorded cases (tests/golden/methods).

1. The CLS query of the last layer attends to its keys as if it had one head; the CLS column is cut off.
2. Patches whose attention lies above the upper Tukey fence are kept (or a fixed number of the most attended ones).
   PruMerge+ adds patches in regular steps, the more of them the fewer stand out.
3. To each kept patch the 32 patches with the most similar keys are added, weighted by their attention, not normalised
   (the paper speaks of a weighted average).
4. One more token is the sum of all dropped patches, weighted by attention.

Tokens are read by falling attention, then the regular ones, then the last token. `PruMerge:-1` is the adaptive rule and
the authors' setting; its count depends on the image, so that there is no "64-token setting". A fixed budget counts
patches before the last token; of PruMerge+ it is the number of the most attended ones, and about as many regular ones
come on top: `PruMerge+:32` makes about 65 tokens. The code takes one ratio for a whole batch, and PruMerge+ one image
at a time; here every image is on its own. The code ends the regular steps before patch 575, so does this before the
last patch of any grid. An image without outliers leaves the last token alone, in PruMerge+ too, where the code divides
by zero.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.token_reduction.base import (
    Budget,
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    cosines,
)
from llava.model.token_reduction.trim import count_upper_outliers

NUM_NEIGHBOURS = 32
AUTOMATIC_BUDGET = Budget(-1)
LAST_LAYER = -1


def attend_as_one_head(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the CLS query over the heads side by side.

    Args:
        query: `[I, H, d]`.
        keys: `[I, H, N + 1, d]`, CLS first.

    Returns:
        `float32[I, N]`; the softmax runs over N + 1 keys.
    """
    query, keys = query.float().flatten(1), keys.float().transpose(1, 2).flatten(2)  # [I, C], [I, N + 1, C]
    products = torch.einsum("ic,inc->in", query, keys) * query.shape[1] ** -0.5
    return products.softmax(dim=1)[:, 1:]


def find_dropped(kept: Tensor, num_patches: int) -> Tensor:
    """List the patches that are not kept, `int64[N - K]`, as the code does.

    Where a patch is kept twice, the dropped patch with the smallest number is missing for each such double.
    """
    numbers = torch.arange(num_patches, device=kept.device).index_fill(0, kept, 0)
    return numbers.sort().values[len(kept) :]


def merge_neighbours(patches: Tensor, keys: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
    """Make the tokens of one image.

    Args:
        patches: `[N, D]`.
        keys: `[N, C]` without CLS, heads side by side.
        attention: `float32[N]`.
        kept: `int64[K]` numbers of the kept patches, in reading order; one may come twice.

    Returns:
        `[K + 1, D]`: one token per kept patch, and the sum of the dropped ones.
    """
    dropped = find_dropped(kept, len(patches))
    others = torch.cat([kept, dropped])
    weighted = attention[:, None] * patches.float()  # [N, D]
    # 1. Neighbours: all entries but the token's own.
    similarity = cosines(keys[None, kept], keys[None, others])[0]  # [K, others]
    similarity[:, : len(kept)].fill_diagonal_(float("-inf"))
    nearest = others[similarity.topk(min(NUM_NEIGHBOURS, max(0, len(others) - 1))).indices]  # [K, neighbours]
    merged = patches[kept].float() + weighted[nearest].sum(dim=1)
    # 2. What is dropped, in one.
    rest = weighted[dropped].sum(dim=0, keepdim=True)
    return torch.cat([merged, rest]).to(patches.dtype)


@dataclass(frozen=True)
class PruMerge(TokenReducer):
    """Kept patches with their neighbours added, and one token for the dropped ones.

    Attributes:
        budget: -1 for the outliers of the attention, a fraction or a count.
    """

    budget: Budget = AUTOMATIC_BUDGET

    spec_name: ClassVar[str] = "PruMerge"
    scores_name: ClassVar[str] = "CLS attention of the last layer"
    made_name: ClassVar[str] = "centres with neighbours added, sum of the rest"
    needs: ClassVar[frozenset[Need]] = frozenset({Need("cls_query", LAST_LAYER), Need("keys", LAST_LAYER)})
    has_automatic_budget: ClassVar[bool] = True

    def choose(self, order: Tensor, count: int) -> Tensor:
        """Choose the patches of one image.

        Args:
            order: `int64[N]` patches by falling attention.
            count: of the most attended ones, from 0 on.

        Returns:
            `int64[K]` in reading order.
        """
        return order[:count]

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Merge each image."""
        patches, keys = tokens.patches, tokens.require(Need("keys", LAST_LAYER))
        num_images, num_patches, _ = patches.shape
        attention = attend_as_one_head(tokens.require(Need("cls_query", LAST_LAYER)), keys)  # [I, N]
        if self.budget.is_automatic:
            counts = count_upper_outliers(attention).cpu().tolist()  # waits for the device
        else:
            counts = [self.count_kept(num_patches)] * num_images
        orders = attention.argsort(dim=1, descending=True, stable=True)
        flat_keys = keys.transpose(1, 2).flatten(2)[:, 1:]  # [I, N, C]
        centres = torch.zeros(num_images, num_patches, dtype=torch.bool, device=patches.device)
        rows, places = [], []
        for image, count in enumerate(counts):
            kept = self.choose(orders[image], count)
            centres[image].index_fill_(0, kept, True)
            rows.append(merge_neighbours(patches[image], flat_keys[image], attention[image], kept))
            places.append(F.pad(kept, (0, 1), value=num_patches - 1))
        features, places = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, places))
        lengths = torch.tensor([len(row) for row in rows])
        # With everything kept nothing is dropped, and the last token is zero: it stays away.
        if counts and min(counts) == num_patches:
            features, lengths = features[:, :num_patches], lengths.clamp(max=num_patches)
            places = places[:, :num_patches]
        return ReducedTokens(features, lengths, scores=attention, centres=centres, places=places)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+: patches in regular steps besides those that stand out."""

    spec_name: ClassVar[str] = "PruMerge+"

    def at_budget(self, num_tokens: int) -> Self:
        """Half of a setting for the most attended patches, about half for the regular ones."""
        return replace(self, budget=Budget(max(2, num_tokens // 2)))

    def most_tokens(self, num_patches: int) -> int:
        count = self.count_kept(num_patches)
        return count + num_patches // max(1, num_patches // count) + 2

    def choose(self, order: Tensor, count: int) -> Tensor:
        num_patches = len(order)
        if not 0 < count < num_patches:
            return order[:count]
        top, step = order[:count], int(1 / (count / num_patches))
        if not self.budget.is_automatic:
            # A fixed ratio: regular patches are added although they may be kept already.
            return torch.cat([top, torch.arange(step // 2, num_patches - 1, step, device=order.device)])
        regular = torch.arange(0, num_patches - 1, max(1, int(step / 3)), device=order.device)
        return torch.cat([top, regular[~torch.isin(regular, top)]])
