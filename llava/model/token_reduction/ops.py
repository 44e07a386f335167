"""The mathematics of choosing and gathering patches: pure functions of tensors, each image on its own.

Deciding (scores, counts, masks) and applying (gather, mean) are apart, so the same decision can be drawn, counted,
cached or replayed. Source: Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient
Multi-modal LLMs" (TRIM, arXiv 2409.10994), and the behaviour of its released code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TUKEY_FENCE = 1.5  # Tukey, Exploratory Data Analysis (1977): outliers lie 1.5 IQR beyond the quartiles.


def score_patches(joint: Tensor, text: Tensor, *, negated: bool = True, cosine: bool = False) -> Tensor:
    """Score each patch against its image's query.

    The published metric is the plain dot product, negated: in OpenAI's CLIP the penultimate layer's patches of the
    asked-for object have the *lowest* product with the text. Which sign fits is a property of the tower
    (`python -m llava.calibrate` measures it).

    Args:
        joint: `float32[I, N, P]`.
        text: `float32[I, P]`.
        negated: the published sign; False takes the product as it is.
        cosine: normalise both sides first (the published code does not).

    Returns:
        `float32[I, N]`, unbounded.
    """
    if cosine:
        joint, text = F.normalize(joint, dim=-1), F.normalize(text, dim=-1)
    similarity = torch.einsum("inp,ip->in", joint, text)
    return -similarity if negated else similarity


def count_upper_outliers(probabilities: Tensor, fence: float = TUKEY_FENCE) -> Tensor:
    """Count each image's probabilities above the upper Tukey fence, Q3 + fence * (Q3 - Q1).

    Args:
        probabilities: `float32[I, N]`, each row sums to 1.
        fence: the factor on the interquartile range.

    Returns:
        `int64[I]`, between 0 and N // 4 for a fence >= 0. Rows never influence each other (the published code pools
        the quartiles over the batch; at batch size one both agree).
    """
    levels = torch.tensor([0.25, 0.75], dtype=probabilities.dtype, device=probabilities.device)
    first, third = torch.quantile(probabilities, levels, dim=1, interpolation="linear")
    upper = third + fence * (third - first)
    return (probabilities > upper[:, None]).sum(dim=1)


def select_top(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark each image's patches with the largest scores.

    Args:
        scores: `float32[I, N]`.
        counts: `int64[I]`, how many to keep, between 0 and N.

    Returns:
        `bool[I, N]` with `counts[i]` True in row i; among equal scores the earlier patch wins.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank.scatter_(1, order, places)
    return rank < counts[:, None]


def gather_kept(patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move each image's kept patches to the front, in raster order, bit for bit.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.

    Returns:
        `[I, K, D]` with K the largest count, zeros behind shorter rows, and `int64[I]` the counts, on the CPU.
    """
    counts = kept.sum(dim=1)
    # The one moment of a reduction at which the host waits for the device: everybody downstream cuts by these numbers.
    host_counts = counts.cpu()
    longest = int(host_counts.max()) if kept.numel() else 0
    # A stable sort of "dropped" (False before True) lists the kept positions first and keeps their order.
    front = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    gathered = patches.gather(1, front[:, :, None].expand(-1, -1, patches.shape[2]))
    filled = torch.arange(longest, device=patches.device)[None, :] < counts[:, None]
    return gathered.masked_fill(~filled[:, :, None], 0), host_counts


def mean_of_dropped(patches: Tensor, kept: Tensor) -> Tensor:
    """Average each image's dropped patches, in float32.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.

    Returns:
        `[I, D]`, dtype of the patches; zeros where nothing was dropped.
    """
    dropped = (~kept).to(torch.float32)
    total = torch.einsum("in,ind->id", dropped, patches.to(torch.float32))
    return (total / dropped.sum(dim=1, keepdim=True).clamp(min=1)).to(patches.dtype)


def append_mean_token(patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Kept patches in raster order, then one token that is the mean of all others.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.

    Returns:
        `[I, M, D]` zero-padded on the right, and `int64[I]` lengths: the number kept plus one, or N where everything
        is kept (nothing is left to average, so no token is added); lengths are on the CPU.
    """
    num_patches = patches.shape[1]
    features, counts = gather_kept(patches, kept)
    mean = mean_of_dropped(patches, kept)[:, None]
    # Behind each row's last patch. Where everything is kept, that is the column that is cut off again.
    place = kept.sum(dim=1)[:, None, None].expand_as(mean)
    features = F.pad(features, (0, 0, 0, 1)).scatter(1, place, mean)
    lengths = (counts + 1).clamp(max=num_patches)
    return features[:, :num_patches], lengths
