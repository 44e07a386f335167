"""TRIM (Token Reduction using CLIP Metric): TextSim+ whose budget is automatic unless the spec says otherwise."""

from dataclasses import dataclass
from typing import ClassVar

from llava.model.token_reduction.text_sim import TextSimilarityReducer


@dataclass(frozen=True)
class Trim(TextSimilarityReducer):
    """Outlying patches by the IQR rule, then the mean of all others (arXiv 2409.10994, section 3).

    Zero outliers: the mean token alone. Everything kept (`TRIM:1.0`): all patches and no mean token, that is, plain
    LLaVA; the published code crashes in both cases.
    """

    spec_name: ClassVar[str] = "TRIM"
