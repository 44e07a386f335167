"""Find the fence with which TRIM keeps a given mean number of patches on a benchmark's questions.

The vision tower runs once per image and the text tower once per query. Of the scores no more is stored than the fence
can reach: every image's quartiles and the probabilities above the upper one. Then each trial of a fence is one
comparison over all questions. Shape letters: `Q` pairs of a question and a crop of its image, `N` patches of a crop.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava.cli import LoadedModel
from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.features import FeatureCache, QueryCache, apply_in_parts
from llava.eval.metrics.evidence import Sample, headline_interval
from llava.eval.predict import CACHED_IMAGES, REDUCTION_BATCH, choose_unit_size, look_ahead, plan_units
from llava.model.token_reduction import Target
from llava.model.token_reduction.trim import AUTOMATIC_BUDGET, Trim, count_above_fence, find_quartiles

STEPS = 100
"""Of the bisection; it ends at neighbouring numbers."""
WIDEST = 1e38
"""A fence that nothing passes, unless both quartiles are one. Scores with a sharp peak need large ones."""
TOLERANCE = 5e-4
"""Share of the mean by which a fence of few digits may miss it."""
MOST_DIGITS = 12


@dataclass(frozen=True)
class Scores:
    """What a fence decides on, for each crop of the image of each question.

    Attributes:
        above: float32[Q, ceil((N - 1) / 4)] the highest probabilities, all that a fence can let pass.
        first, third: float32[Q] the quartiles.
        images: Q names; crops and questions of one image share it.
        num_patches: N.
        num_questions: that these come from.
    """

    above: Tensor
    first: Tensor
    third: Tensor
    images: Sequence[str]
    num_patches: int
    num_questions: int

    def count(self, reducer: Trim) -> Tensor:
        """Patches that a rule with its fence keeps: int64[Q]."""
        counts = count_above_fence(self.above, self.first, self.third, reducer.fence)
        return reducer.limit(counts, self.num_patches)

    def mean(self, reducer: Trim) -> float:
        """Patches kept on average."""
        return float(self.count(reducer).double().mean())

    def interval(self, reducer: Trim) -> tuple[float, float]:
        """The 95 % interval of the mean, over images."""
        tallies: dict[str, dict[str, float]] = {}
        for image, count in zip(self.images, self.count(reducer).tolist(), strict=True):
            sums = tallies.setdefault(image, {"kept": 0.0, "count": 0.0})
            sums["kept"] += count
            sums["count"] += 1
        # No image could keep more than a fence lets pass, or the least that the rule keeps.
        most = float(max(self.above.shape[1], reducer.min_keep))
        sample = Sample.of(tallies, lambda sums: sums["kept"] / sums["count"], full_marks=most)
        interval = headline_interval(sample)
        return interval.low, interval.high


def score_questions(loaded: LoadedModel, questions: Sequence[Question]) -> Scores:
    """Score the patches of every question's images, with the model's token reduction.

    Args:
        loaded: a model whose token reduction is TRIM's rule or one of its names.
        questions: those without image, or that cannot be asked, are left out.

    Raises:
        InputError: an image cannot be read, or no question has one.
    """
    asked = [question for question in questions if question.images and not question.fault]
    if not asked:
        raise InputError("none of the questions has an image to calibrate on")
    _, model, image_processor = loaded
    features, queries = FeatureCache(model, image_processor, CACHED_IMAGES), QueryCache(model)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    images: list[str] = []
    num_patches = model.get_vision_tower().num_patches

    def announce(unit: Sequence[Question]) -> None:
        features.announce(image for question in unit for image in question.images)

    with torch.inference_mode(), closing(features), tqdm(total=len(asked), unit="q", desc="calibrating") as progress:
        for unit in look_ahead(plan_units(asked, choose_unit_size(model)), announce):
            # 1. Each image and each query once.
            encoded, unreadable = features.encode(image for question in unit for image in question.images)
            if unreadable:
                raise InputError(next(iter(unreadable.values())))
            embeds = queries.embed([question.query for question in unit])
            pairs = [(image, question.query) for question in unit for image in question.images]

            def choose(some: Sequence[Any], encoded: Any = encoded, embeds: Any = embeds) -> Sequence[Any]:
                texts = [query for _, query in some]
                text_embeds = torch.stack([embeds[query] for query in texts])
                return model.choose_tokens([encoded[image].features for image, _ in some], texts, text_embeds)

            # 2. What the reduction would decide on.
            for (image, _), reduced in zip(pairs, apply_in_parts(choose, pairs, REDUCTION_BATCH), strict=True):
                parts.append(keep_upper(reduced.scores))
                images += [str(image)] * reduced.scores.shape[0]
            progress.update(len(unit))
    above, first, third = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(above, first, third, images, num_patches, len(asked))


def keep_upper(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep of float32[C, N] what a fence can let pass, and the quartiles; on the CPU."""
    first, third = find_quartiles(probabilities)
    most = -(-(probabilities.shape[1] - 1) // 4)
    return probabilities.topk(most, dim=1).values.cpu(), first.cpu(), third.cpu()


def fit_fence(target: Target, scores: Scores, place: str) -> Trim:
    """Find the fence by bisection: the mean falls as the fence grows.

    Args:
        target: of kind "avg".
        scores: of the questions.
        place: names them in the message.

    Returns:
        The rule with the fence, of as few digits as the mean allows.

    Raises:
        InputError: no fence keeps that mean; says what can be reached.
    """
    reducer = replace(target.method, budget=AUTOMATIC_BUDGET)

    def mean(fence: float) -> float:
        return scores.mean(replace(reducer, fence=fence))

    # 1. What can be reached.
    most, least = mean(0.0), mean(WIDEST)
    if not least <= target.value <= most:
        fixed = f"{reducer.spec_name}:{max(2, round(target.value))}"
        raise InputError(
            f"{target}: on {place} a fence keeps means of {least:.2f} to {most:.2f} patches (outliers are at most a "
            f"quarter of an image's {scores.num_patches}): ask for a mean between them, or fix the number: {fixed}"
        )
    # 2. The last fence that keeps as many, and the first that keeps fewer.
    low, high = 0.0, WIDEST
    for _ in range(STEPS):
        # The range spans many magnitudes at first.
        middle = (low + high) / 2 if high <= 2 else max(1.0, (max(low, 1.0) * high) ** 0.5)
        low, high = (middle, high) if mean(middle) >= target.value else (low, middle)
    best = min((low, high), key=lambda fence: abs(mean(fence) - target.value))
    # 3. As few digits as change nothing that counts.
    allowed = max(abs(mean(best) - target.value), TOLERANCE * target.value)
    rounded = (float(f"{best:.{digits}g}") for digits in range(2, MOST_DIGITS))
    fence = next((each for each in rounded if abs(mean(each) - target.value) <= allowed), best)
    return replace(reducer, fence=fence)
