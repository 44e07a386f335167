"""GQA's metrics: accuracy overall and by group, consistency, validity, plausibility, distribution.

Source: GQA `eval.py` version 1.2, without its grounding score, which needs attention maps. Records are those of GQA's
question files, percentages are unrounded.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llava.eval.metrics.means import collect, mean_percent

GqaRecord = Mapping[str, Any]

OPEN_TYPE = "query"
COMMON_PROPERTIES = ("color", "material", "shape")
"""Valid answers to a question for something in common; the choices files do not list them."""
UNCOUNTED_STEPS = ("exist", "query: name", "choose name")


def clean_prediction(text: str) -> str:
    """Rewrite an answer as LLaVA does for GQA's script: drop the periods at its end, lowercase, nothing else."""
    return text.rstrip(".").lower()


def score_gqa(
    records: Mapping[str, GqaRecord],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Collection[str]]] | None = None,
) -> dict[str, Any]:
    """Compute every number of the official script.

    Args:
        records: GQA's questions by id; unbalanced ones count for consistency alone.
        predictions: after `clean_prediction`, by id. At least one is to a balanced question; balanced questions
            without a prediction take no part.
        choices: `valid` and `plausible` answers by id, where there is such a file.

    Returns:
        Percent: `accuracy`, `binary`, `open`, with choices `validity` and `plausibility`, `consistency` where all
        predictions that it needs are there; `distribution` (lower is better); and `accuracyPer...`, each a mapping
        from a group to its `accuracy` and its number `n` of questions.
    """
    balanced = {identity: each for identity, each in records.items() if each["isBalanced"] and identity in predictions}
    hits = {identity: predictions[identity] == record["answer"] for identity, record in balanced.items()}
    is_open = {identity: record["types"]["structural"] == OPEN_TYPE for identity, record in balanced.items()}
    scores: dict[str, Any] = {
        "accuracy": mean_percent(hits.values()),
        "binary": mean_percent(hit for identity, hit in hits.items() if not is_open[identity]),
        "open": mean_percent(hit for identity, hit in hits.items() if is_open[identity]),
    }
    if choices is not None:
        for title, name in (("validity", "valid"), ("plausibility", "plausible")):
            scores[title] = mean_percent(
                is_allowed(predictions[identity], record, choices[identity][name])
                for identity, record in balanced.items()
            )
    consistency = measure_consistency(records, predictions, hits)
    if consistency is not None:
        scores["consistency"] = consistency
    scores["distribution"] = measure_distribution(balanced, predictions)
    for title, choose_group in GROUPINGS.items():
        scores[title] = tabulate_hits(hits, {identity: choose_group(record) for identity, record in balanced.items()})
    return scores


def is_allowed(prediction: str, record: GqaRecord, allowed: Collection[str]) -> bool:
    """Return whether an answer is among those that make sense for a question."""
    return prediction in (COMMON_PROPERTIES if "Common" in (record["types"].get("detailed") or "") else allowed)


def measure_consistency(
    records: Mapping[str, GqaRecord], predictions: Mapping[str, str], hits: Mapping[str, bool]
) -> float | None:
    """Average, over correctly answered questions that entail others, the fraction of those that is correct too.

    Returns:
        Percent; None where an entailed question has no prediction or no record.
    """
    parts = []
    for identity, hit in hits.items():
        entailed = [other for other in records[identity].get("entailed") or () if other != identity]
        if not hit or not entailed:
            continue
        if any(other not in predictions or other not in records for other in entailed):
            return None
        parts.append(sum(predictions[other] == records[other]["answer"] for other in entailed) / len(entailed))
    return mean_percent(parts)


def measure_distribution(balanced: Mapping[str, GqaRecord], predictions: Mapping[str, str]) -> float:
    """Compare how often answers are given with how often they are right, by chi-square within the global groups."""
    right: dict[str, Counter[str]] = {}
    given: dict[str, Counter[str]] = {}
    for identity, record in balanced.items():
        group = record["groups"]["global"]
        if group is not None:
            right.setdefault(group, Counter())[record["answer"]] += 1
            given.setdefault(group, Counter())[predictions[identity]] += 1
    total = num_questions = 0.0
    for group, expected in right.items():
        chi_square = sum((given[group][answer] - count) ** 2 / count for answer, count in expected.items())
        total += chi_square * expected.total()
        num_questions += expected.total()
    return total / num_questions / 100 if num_questions else 0.0


def count_steps(record: GqaRecord) -> int:
    """Count the reasoning steps of a question, without those that only name or check for an object."""
    steps = [f"{step['operation']}: {step['argument']}" for step in record["semantic"]]
    return sum(not any(uncounted in step for uncounted in UNCOUNTED_STEPS) for step in steps)


def tabulate_hits(hits: Mapping[str, bool], groups: Mapping[str, str | int]) -> dict[str, dict[str, float]]:
    """Give the accuracy and the number of questions of each group, in the order of the groups."""
    members = collect((groups[identity], hit) for identity, hit in hits.items())
    return {str(group): {"accuracy": mean_percent(part), "n": len(part)} for group, part in sorted(members.items())}


GROUPINGS: Mapping[str, Callable[[GqaRecord], str | int]] = {
    "accuracyPerStructuralType": lambda record: record["types"]["structural"],
    "accuracyPerSemanticType": lambda record: record["types"]["semantic"],
    "accuracyPerSteps": count_steps,
    "accuracyPerLength": lambda record: len(record["question"].split()),
}
"""Official title of each grouping, and the group of a question."""
