"""Where one patch lies in SigLIP's joint space. Ours, not published: TRIM's paper and code know CLIP only.

SigLIP has no CLS row and no projection matrix. Its image embedding is an attention pooling of all patches of the last
layer: a learned query attends to the normed patches, the attention's output matrix follows, then an MLP on top of a
norm, added to its input. That embedding is compared with the text's.

CLIP's patches are scored as if each were the CLS row: final norm, then the projection. The like of it here is the
embedding of an image that has this one patch: the pooling with the patch as its only key. Attention over one key is 1,
so query and keys drop out, and what is left is a function of the patch: value matrix, output matrix, MLP with residual.
Up to the MLP the image's embedding is a mean of these, weighted by attention (head by head).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Matrix = tuple[Tensor, Tensor]
"""`[out, in]` weight and `[out]` bias."""


@dataclass(frozen=True)
class PatchPooling:
    """The parts of an attention pooling that a single patch passes through.

    Attributes:
        value, output: the attention's matrices, D to D and D to P.
        norm, inner, activation, outer: the MLP with its norm, P to its inner width and back.
    """

    value: Matrix
    output: Matrix
    norm: nn.LayerNorm
    inner: Matrix
    activation: Callable[[Tensor], Tensor]
    outer: Matrix

    def __call__(self, normed: Tensor) -> Tensor:
        """Pool each patch alone, in float32: normed patches `float32[..., D]` to `float32[..., P]`."""
        pooled = _apply(_apply(normed, self.value), self.output)
        norm = self.norm
        rest = F.layer_norm(pooled, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return pooled + _apply(self.activation(_apply(rest, self.inner)), self.outer)


def _apply(rows: Tensor, matrix: Matrix) -> Tensor:
    weight, bias = matrix
    return F.linear(rows, weight.float(), bias.float())
