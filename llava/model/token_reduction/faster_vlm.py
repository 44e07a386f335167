"""FasterVLM: keep the patches that the vision tower's CLS token attends to most; the question is not read.

Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
arXiv 2412.01818. Repository Theia-4869/FasterVLM at f5d5f12037e1, Apache-2.0; the kept patches equal those of its code
on the recorded cases (tests/golden/methods).

The score of a patch is the CLS row of one layer's attention, averaged over the heads. The budget counts patches, and
nothing is added to them: the paper's 64-token setting for LLaVA-1.5 is `FasterVLM:64`, of 576 patches.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.model.token_reduction.base import ClsAttentionReducer, ReducedTokens, VisualTokens, keep_patches, select_top


@dataclass(frozen=True)
class FasterVLM(ClsAttentionReducer):
    """The patches with the highest CLS attention, in raster order.

    Attributes:
        budget: a fraction or a count of patches.
        layer: as in `ClsAttentionReducer`.
    """

    spec_name: ClassVar[str] = "FasterVLM"

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Keep the top patches of each image."""
        scores = self.mean_attention(tokens)  # [I, N]
        num_kept = self.count_kept(scores.shape[1])
        return keep_patches(tokens.patches, select_top(scores, num_kept), num_kept, scores)
