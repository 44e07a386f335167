"""Open answers against ten people's: leave-one-out accuracy as VQAv2, VizWiz and TextVQA define it.

An answer that three of the other nine people gave counts in full. The three scorers differ in what they rewrite before
they compare; each has a function here, from one answer and its references to a fraction in [0, 1]. Sources:
GT-Vision-Lab/VQA `vqaEval.py` (2021-03-11, and as it was before), the VizWiz API, facebookresearch/mmf
`m4c_evaluators.py`, written anew.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import groupby
from typing import Any

from llava.eval.metrics.contractions import VIZWIZ_CONTRACTIONS
from llava.eval.metrics.means import collect, mean_percent
from llava.eval.metrics.vqa_text import flatten_lines, normalize_m4c, normalize_punctuation, normalize_vqa

NUM_AGREEING = 3
UNANSWERABLE = "unanswerable"


def leave_one_out(prediction: str, references: Sequence[str]) -> float:
    """Average min(1, agreeing others / 3) over the references, each left out in turn by its position.

    Returns:
        Of ten references 0, 0.3, 0.6, 0.9 and 1.0 when none, one, two, three and more than three equal the prediction.
    """
    num_equal = references.count(prediction)
    accuracies = [min(1.0, (num_equal - (reference == prediction)) / NUM_AGREEING) for reference in references]
    return sum(accuracies) / len(accuracies)


def grade_vqa(prediction: str, references: Sequence[str]) -> float:
    """Grade as the VQA v2 scorer does: where all references are identical, nothing is rewritten, not even the case."""
    prediction, references = flatten_lines(prediction), [flatten_lines(reference) for reference in references]
    if len(set(references)) > 1:
        prediction, references = normalize_vqa(prediction), [normalize_vqa(reference) for reference in references]
    return leave_one_out(prediction, references)


def grade_vqa_before_2021(prediction: str, references: Sequence[str]) -> float:
    """Grade as the VQA v2 scorer did before 2021-03-11: the prediction is always rewritten, references hardly."""
    if len(set(references)) > 1:
        references = [normalize_punctuation(reference) for reference in references]
    return leave_one_out(normalize_vqa(flatten_lines(prediction)), references)


def grade_vizwiz(prediction: str, references: Sequence[str]) -> float:
    """Grade as the VizWiz scorer does: the prediction is always rewritten, the references are taken as they are."""
    return leave_one_out(normalize_vizwiz(prediction), references)


def grade_textvqa(prediction: str, references: Sequence[str]) -> float:
    """Grade as the TextVQA scorer does: both sides are always rewritten."""
    return leave_one_out(normalize_m4c(prediction), [normalize_m4c(reference) for reference in references])


def normalize_vizwiz(text: str) -> str:
    return normalize_vqa(flatten_lines(text), VIZWIZ_CONTRACTIONS)


def rank_references(references: Sequence[str]) -> tuple[str, ...]:
    """List the distinct reference answers, most frequent first; ties are in the order given."""
    return tuple(text for text, _ in Counter(references).most_common())


def round_half_up(percent: float) -> float:
    """Round to two digits as Python 2 does, which runs the VQA v2 scorer: ties go up, not to the even digit."""
    return float(Decimal(percent).quantize(Decimal("0.01"), ROUND_HALF_UP))


def round_half_even(percent: float) -> float:
    """Round to two digits as Python 3 does, which runs the other scorers."""
    return round(percent, 2)


def summarize_grades(
    grades: Sequence[float], groupings: Mapping[str, Sequence[str]], rounded: Callable[[float], float]
) -> dict[str, Any]:
    """Average grades (fractions, at least one) overall and per group, under the official names.

    Args:
        grades: of the answers.
        groupings: for each title, such as `perAnswerType`, the group of each grade.
        rounded: how the scorer rounds a percentage.

    Returns:
        `accuracy` (rounded) and `accuracy_unrounded`, both percent with `overall` and the titles.
    """
    exact: dict[str, Any] = {"overall": mean_percent(grades)}
    for title, groups in groupings.items():
        members = collect(zip(groups, grades, strict=True))
        exact[title] = {group: mean_percent(part) for group, part in members.items()}
    accuracy = {
        title: {group: rounded(value) for group, value in part.items()} if isinstance(part, dict) else rounded(part)
        for title, part in exact.items()
    }
    return {"accuracy": accuracy, "accuracy_unrounded": exact}


def average_precision(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Sum precision times gain in recall over the distinct scores from the highest on, as scikit-learn does.

    Returns:
        A fraction; 0 where no label is positive.
    """
    ranked = sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])
    num_positive = sum(labels)
    total, num_seen, num_found = 0.0, 0, 0
    for _, ties in groupby(ranked, key=lambda pair: pair[0]):
        found = [label for _, label in ties]
        num_seen += len(found)
        num_found += sum(found)
        total += (num_found / num_seen) * (sum(found) / max(num_positive, 1))
    return total


def f1_score(labels: Sequence[bool], predictions: Sequence[bool]) -> float:
    """Return the harmonic mean of precision and recall of the positives, a fraction; 0 where there are none."""
    num_both = sum(label and prediction for label, prediction in zip(labels, predictions, strict=True))
    num_either = sum(labels) + sum(predictions)
    return 2 * num_both / num_either if num_either else 0.0
