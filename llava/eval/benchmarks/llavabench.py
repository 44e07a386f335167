"""LLaVA-Bench (in the wild): free answers, each marked by a language model beside a reference answer.

Files: `questions.jsonl`, `context.jsonl` (what each picture shows, in words), `answers_gpt4.jsonl` (references),
`images/`; optionally `rule.json` or `table/rule.json`, LLaVA's own words of instruction to the judge. Source of the
rules: LLaVA `eval_gpt_review_bench.py` and `summarize_gpt_review.py`, which pair by line; here it is by id.

The headline is the published figure, rounded as published: 100 times the mean mark of the answers over the mean mark of
the references. A reply that can't be read counts -1 for both, as published.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Judge, Question, Row, Scores, row_key
from llava.eval.benchmarks._files import load_question_file, read_records
from llava.eval.benchmarks._hub_llavabench import LlavaBenchWild
from llava.eval.hub import HubForm
from llava.eval.metrics.overlap import overlap_f1

QUESTION_FILE = "questions.jsonl"
CONTEXT_FILE = "context.jsonl"
REFERENCE_FILE = "answers_gpt4.jsonl"
IMAGE_FOLDER = "images"
RULE_FILES = ("rule.json", "table/rule.json")
OWN_RULE_FILE = Path(__file__).parents[1] / "table" / "rule.json"
"""The instruction in our words, with the content of the published one (docs/parity.md)."""

CATEGORY_PREFIX = "llava_bench_"
SYSTEM_MESSAGE = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
MAX_TOKENS = 1024
UNREADABLE = (-1, -1)
"""Marks of a reply that doesn't begin with two numbers."""

Marks = tuple[float, float]
"""Of the reference and of the answer, 1 to 10, or `UNREADABLE`."""
Summary = dict[str, dict[str, float]]
"""For `all` and each category: `relative` (percent), `gpt4` and `model` (mean marks times 10), as published."""


@dataclass(frozen=True)
class Comparison:
    """What the judge sees of one question.

    Attributes:
        question: what was asked, about which picture.
        context: the picture in words.
        reference: row of the reference answer.
        answer: row of the model's answer.
        rule: `role` (what the judge calls the two) and `prompt` (the instruction).
    """

    question: Question
    context: str
    reference: Row
    answer: Row
    rule: Mapping[str, str]

    @property
    def category(self) -> str:
        """The category's name in rule files, reviews and scores."""
        return CATEGORY_PREFIX + str(self.question.category)

    def case(self) -> Case:
        """Return what is judged, for judges that compute."""
        return Case(
            task=LlavaBench.name,
            key=str(self.question.id),
            question=self.question.prompt,
            references=(self.reference["text"],),
            prediction=self.answer["text"],
        )

    def messages(self) -> list[dict[str, str]]:
        """Return the chat, to the character as published (but for the words of the rule)."""
        role = self.rule["role"]
        blocks = [
            f"[Context]\n{self.context}",
            f"[Question]\n{self.question.prompt}",
            f"[{role} 1]\n{self.reference['text']}",
            f"[End of {role} 1]",
            f"[{role} 2]\n{self.answer['text']}",
            f"[End of {role} 2]",
            f"[System]\n{self.rule['prompt']}",
        ]
        content = "".join(f"{block}\n\n" for block in blocks)
        return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": content}]


@dataclass(frozen=True)
class JudgedRun:
    """One round of the judge over all answers.

    Attributes:
        summary: the published numbers.
        marks: by question id; `UNREADABLE` where the reply could not be read.
    """

    summary: Summary
    marks: Mapping[str, Marks]

    def list_numbers(self) -> dict[str, Any]:
        """List the numbers for a result."""
        return {
            **self.summary,
            "parsed_scores": {key: list(marks) for key, marks in self.marks.items()},
            "unparsable": [key for key, marks in self.marks.items() if marks == UNREADABLE],
        }


class LlavaBench(Benchmark):
    """LLaVA-Bench: the answers' marks relative to the references' marks."""

    name = "llavabench"
    row = "LLaVA-Bench (Wild)"
    folders = ("llava-bench-in-the-wild",)
    hub: ClassVar[Mapping[str, HubForm]] = {"wild": LlavaBenchWild()}
    max_new_tokens = 1024
    uses_judge = "always"

    def offline_reply(self, case: Case) -> str:
        """Rate the reference 10, and the answer 1 to 10 by the words it shares with the reference."""
        likeness = max(overlap_f1(case.prediction, reference) for reference in case.references)
        return f"10 {1 + 9 * likeness:.1f}\nWords in common with the reference, not a judgement."

    def load(self, root: Path) -> list[Question]:
        """Read the questions; each is about one picture."""
        questions = load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER)
        return [question if question.images or question.fault else mark_faulty(question) for question in questions]

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Let the judge mark every answer, as often as it is told to, and average the runs.

        Raises:
            InputError: a file of the benchmark is missing or does not fit, there is no judge, or none of its replies
                can be read.
        """
        if judge is None:
            raise InputError(f"{self.name} is scored by a judge, and none is given")
        references = read_records(root / REFERENCE_FILE)
        comparisons = pair_comparisons(self.load(root), references, answers, root / CONTEXT_FILE, find_rule_file(root))
        rounds = [(each, run) for run in range(judge.num_runs) for each in comparisons]
        replies = judge.map(lambda each: ask_judge(judge, each[0], run=each[1]), rounds)
        size = len(comparisons)
        runs = [score_replies(comparisons, replies[start : start + size]) for start in range(0, len(replies), size)]
        summary = average_summaries([run.summary for run in runs])
        scores = runs[0].list_numbers() if len(runs) == 1 else {**summary, "runs": [run.list_numbers() for run in runs]}
        columns = {name.removeprefix(CATEGORY_PREFIX): numbers["relative"] for name, numbers in summary.items()}
        return Scores(headline=summary["all"]["relative"], scores=scores, count=size, columns=columns)


def mark_faulty(question: Question) -> Question:
    """Say of a question without a picture that it can't be asked."""
    return replace(question, fault="the record has no image")


def find_rule_file(root: Path) -> Path:
    """Return LLaVA's rule file, if the benchmark's folder has it, or ours."""
    own = [root / name for name in RULE_FILES if (root / name).is_file()]
    return own[0] if own else OWN_RULE_FILE


def read_rules(path: Path) -> dict[str, dict[str, str]]:
    """Read the instructions to the judge, by `llava_bench_<category>`.

    Raises:
        InputError: the file is missing, or no rule file.
    """
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the rule file {path}: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path} is not JSON") from None
    if not isinstance(rules, dict):
        raise InputError(f'{path} is no rule file: {{"{CATEGORY_PREFIX}conv": {{"role", "prompt"}}, ...}} is needed')
    for name, rule in rules.items():
        if not isinstance(rule, dict) or not all(isinstance(rule.get(part), str) for part in ("role", "prompt")):
            raise InputError(f'{path}: "{name}" must have the strings "role" and "prompt"')
    return rules


def read_contexts(path: Path) -> dict[str, str]:
    """Read what each picture shows, by the picture's name; a list of sentences is joined by newlines.

    Raises:
        InputError: the file is missing, or a record lacks something.
    """
    contexts = {}
    for record in read_records(path):
        image, caption = record.get("image"), record.get("caption")
        sentences = caption if isinstance(caption, list) else [caption]
        if not isinstance(image, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise InputError(f'{path}: "image" and "caption" must be text, in the record {json.dumps(record)[:80]}')
        contexts[Path(image).name] = "\n".join(sentences)
    return contexts


def pair_comparisons(
    questions: Sequence[Question],
    references: Sequence[Row],
    answers: Mapping[str, Row],
    context_file: Path,
    rule_file: Path,
) -> list[Comparison]:
    """Put together what the judge sees of each answered question, in the order of the questions.

    Args:
        questions: of the question file.
        references: rows of the reference answers, in any order.
        answers: rows by question key; questions without a row take no part.
        context_file: the pictures in words.
        rule_file: the instruction to the judge.

    Raises:
        InputError: nothing was answered, or a question lacks its context, reference or rule.
    """
    contexts, rules = read_contexts(context_file), read_rules(rule_file)
    by_key = {row_key(row, LlavaBench.key_fields): row for row in references if isinstance(row.get("text"), str)}
    comparisons = []
    for question in questions:
        key = row_key(question.head(), LlavaBench.key_fields)
        if key not in answers:
            continue
        image = question.images[0].name if question.images else None
        rule = rules.get(f"{CATEGORY_PREFIX}{question.category}")
        if image not in contexts:
            raise InputError(f"{context_file} says nothing of {image}, the picture of question {question.id}")
        if key not in by_key:
            raise InputError(f"there is no reference answer to question {question.id}")
        if rule is None:
            raise InputError(f"question {question.id}: {rule_file} has no rule for the category {question.category!r}")
        comparisons.append(Comparison(question, contexts[image], by_key[key], answers[key], rule))
    if not comparisons:
        raise InputError("LLaVA-Bench: none of the questions has an answer")
    return comparisons


def ask_judge(judge: Judge, comparison: Comparison, *, run: int = 0, max_tokens: int = MAX_TOKENS) -> str:
    """Return the judge's reply about one question."""
    return judge.ask(
        comparison.case(), comparison.messages(), attempt=run, temperature=TEMPERATURE, max_tokens=max_tokens
    )


def parse_marks(reply: str) -> Marks:
    """Read the two marks in the first line of a reply, to the letter as published.

    Commas count as blanks, and between the marks stands exactly one: `7,8` can be read, `7, 8` and `8/10 7/10` can't.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(pieces) != len(UNREADABLE):
        return UNREADABLE
    try:
        first, second = map(float, pieces)
    except ValueError:
        return UNREADABLE
    # The published script would let "nan" spoil every mean.
    return (first, second) if math.isfinite(first) and math.isfinite(second) else UNREADABLE


def make_review(number: int, comparison: Comparison, reply: str) -> dict[str, Any]:
    """Make a line of the published review file; `number` counts from 1."""
    return {
        "id": number,
        "question_id": comparison.question.id,
        "answer1_id": comparison.reference.get("answer_id", comparison.question.id),
        "answer2_id": comparison.answer.get("answer_id", comparison.question.id),
        "category": comparison.category,
        "content": reply,
        "tuple": list(parse_marks(reply)),
    }


def score_replies(comparisons: Sequence[Comparison], replies: Sequence[str]) -> JudgedRun:
    """Score one reply per comparison.

    Raises:
        InputError: none of the replies can be read; -1 over -1 would be 100 percent.
    """
    marks = [parse_marks(reply) for reply in replies]
    if all(each == UNREADABLE for each in marks):
        raise InputError(
            f"none of the judge's {len(replies)} replies begins with two marks; the first is {replies[0][:80]!r}"
        )
    by_id = {str(each.question.id): pair for each, pair in zip(comparisons, marks, strict=True)}
    return JudgedRun(summarize_marks([each.category for each in comparisons], marks), by_id)


def summarize_marks(categories: Sequence[str | None], marks: Sequence[Sequence[float]]) -> Summary:
    """Average marks as published: means to 3 digits, then the relative mark and ten times the means to 1 digit.

    Args:
        categories: of each pair of marks; None counts for `all` alone.
        marks: of the reference and of the answer, the unreadable ones included.
    """
    groups: dict[str, list[Sequence[float]]] = {"all": list(marks)}
    for category, pair in zip(categories, marks, strict=True):
        if category is not None:
            groups.setdefault(category, []).append(pair)
    summary = {}
    for name, pairs in groups.items():
        first, second = (round(fmean(column), 3) for column in zip(*pairs, strict=True))
        relative = round(second / first * 100, 1) if first else 0.0
        summary[name] = {"relative": relative, "gpt4": round(first * 10, 1), "model": round(second * 10, 1)}
    return summary


def average_summaries(summaries: Sequence[Summary]) -> Summary:
    """Average the published numbers of several runs, as the paper does with three."""
    return {
        name: {title: fmean(summary[name][title] for summary in summaries) for title in numbers}
        for name, numbers in summaries[0].items()
    }
