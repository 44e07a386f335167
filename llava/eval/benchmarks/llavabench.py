"""LLaVA-Bench (in the wild): free answers, each rated by a language model beside a reference answer.

Files: `questions.jsonl`, `context.jsonl` (what each image shows, in words), `answers_gpt4.jsonl` (references),
`images/`; optionally `rule.json` or `table/rule.json`, LLaVA's own instruction to the judge. Source of the rules: LLaVA
`eval_gpt_review_bench.py` and `summarize_gpt_review.py`, which pair by line; here it is by id.

The headline is rounded as LLaVA does it: 100 times the mean rating of the answers over the mean rating of the
references. A reply that cannot be read counts -1 for both, as there.

On the hub: lmms-lab/llava-bench-in-the-wild, all 60 questions. The references have no answer ids there, which no score
reads. Images are numbered as they first appear unless the dataset names them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Extent, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import load_question_file, read_document, read_records
from llava.eval.hub import (
    HubForm,
    HubRow,
    HubTable,
    Layout,
    ReadTable,
    guess_suffix,
    image_bytes,
    question_line,
    safe_name,
)
from llava.eval.metrics.means import COUNT, collect
from llava.eval.metrics.overlap import overlap_f1

QUESTION_FILE = "questions.jsonl"
CONTEXT_FILE = "context.jsonl"
REFERENCE_FILE = "answers_gpt4.jsonl"
REFERENCE_MODEL = "gpt-4"
IMAGE_FOLDER = "images"
RULE_FILES = ("rule.json", "table/rule.json")
OWN_RULE_FILE = Path(__file__).parents[1] / "table" / "rule.json"
"""The instruction in our words, with the content of LLaVA's (docs/parity.md)."""

CATEGORY_PREFIX = "llava_bench_"
SYSTEM_MESSAGE = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
MAX_TOKENS = 1024
BEST_RATING = 10
UNREADABLE = (-1, -1)
"""Ratings of a reply that does not begin with two numbers."""

Ratings = tuple[float, float]
"""Of the reference and of the answer, 1 to 10, or `UNREADABLE`."""
Summary = dict[str, dict[str, float]]
"""For `all` and each category: `relative` (percent), `gpt4` and `model` (mean ratings times 10), LLaVA's names."""


# --------------------------------------------------------------------------------------------------------------- hub
def convert_train(read_table: ReadTable, layout: Layout) -> None:
    """Write all sixty questions."""
    numbered: dict[str, str] = {}  # file names by digest
    questions, references, contexts = [], [], {}
    for row in read_table("questions"):
        image = choose_file(row, numbered)
        layout.save_image(f"{IMAGE_FOLDER}/{image}", row["image"])
        contexts[image] = {"id": image.rsplit(".", 1)[0], "image": image, "caption": row["caption"]}
        identity, text = row["question_id"], row["question"]
        questions.append(question_line(identity, image, text, row["category"].removeprefix(CATEGORY_PREFIX)))
        reference = {"question_id": identity, "prompt": text, "answer_id": f"hub-{identity}"}
        references.append(reference | {"model_id": REFERENCE_MODEL, "metadata": {}, "text": row["gpt_answer"]})
    layout.write_lines(CONTEXT_FILE, contexts.values())
    layout.write_lines(REFERENCE_FILE, references)
    layout.write_lines(QUESTION_FILE, questions)


def choose_file(row: HubRow, numbered: dict[str, str]) -> str:
    """Return the file name of an image: the dataset's, or the next number for one not seen before."""
    if row.get("image_id"):
        name = safe_name(row["image_id"], "questions")
        return name if "." in name else f"{name}{guess_suffix(row['image'])}"
    digest = hashlib.sha256(image_bytes(row["image"]) or b"").hexdigest()
    return numbered.setdefault(digest, f"{len(numbered) + 1:03d}{guess_suffix(row['image'])}")


WILD = HubForm(
    "lmms-lab/llava-bench-in-the-wild",
    {"questions": HubTable("train", ("question_id", "image", "question", "caption", "gpt_answer", "category"))},
    (QUESTION_FILE, CONTEXT_FILE, REFERENCE_FILE),
    convert_train,
)


# --------------------------------------------------------------------------------------------------------- downloads
WILD_PAGE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
NUM_IMAGES = 24
WILD_FILES = {
    QUESTION_FILE: 60,
    CONTEXT_FILE: 24,
    REFERENCE_FILE: 60,
    **{f"{IMAGE_FOLDER}/{number:03d}.jpg": None for number in range(1, NUM_IMAGES + 1)},
}
DOWNLOADS = tuple(
    Download((Place(name, number),), WILD_PAGE, f"{WILD_PAGE}/resolve/main/{name}")
    for name, number in WILD_FILES.items()
)


# --------------------------------------------------------------------------------------------------------- benchmark
class LlavaBench(Benchmark):
    """LLaVA-Bench: the answers' ratings relative to the references' ratings."""

    name = "llavabench"
    row = "LLaVA-Bench (Wild)"
    folders = ("llava-bench-in-the-wild",)
    answers_file = "answers/{run}.jsonl"
    hub: ClassVar[Mapping[str, HubForm]] = {"wild": WILD}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"wild": Extent(60, NUM_IMAGES)}
    max_new_tokens = 1024
    uses_judge = "always"
    headline_name = "rating in percent of the reference's"

    def offline_reply(self, case: Case) -> str:
        """Rate the reference 10, and the answer 1 to 10 by the words it shares with the reference."""
        likeness = max(overlap_f1(case.prediction, reference) for reference in case.references)
        return f"10 {1 + 9 * likeness:.1f}\nWords in common with the reference, not a judgement."

    def load(self, root: Path) -> list[Question]:
        return load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Let the judge rate every answer, as often as it is told to, and average the runs."""
        if judge is None:
            raise InputError(f"{self.name} is scored by a judge, and none is given")
        references = read_records(root / REFERENCE_FILE)
        rule_file = next((root / name for name in RULE_FILES if (root / name).is_file()), OWN_RULE_FILE)
        comparisons = pair_comparisons(self.load(root), references, answers, root / CONTEXT_FILE, rule_file)
        # 1. Ask about all questions, run by run.
        rounds = [(each, run) for run in range(judge.num_runs) for each in comparisons]
        replies = judge.map(lambda each: ask_judge(judge, each[0], run=each[1]), rounds)
        size = len(comparisons)
        runs = [read_ratings(replies[start : start + size]) for start in range(0, len(replies), size)]
        # 2. Average as LLaVA does: each run for itself, then over the runs.
        verdicts = [make_verdict(*each) for each in zip(comparisons, zip(*runs, strict=True), strict=True)]
        summaries = summarize_runs(verdicts)
        summary = average_summaries(summaries)
        numbers = []
        for run_summary, run in zip(summaries, runs, strict=True):
            parsed = {str(each.question.id): list(pair) for each, pair in zip(comparisons, run, strict=True)}
            unread = [name for name, pair in parsed.items() if tuple(pair) == UNREADABLE]
            numbers.append({**run_summary, "parsed_scores": parsed, "unparsable": unread})
        scores = numbers[0] if len(numbers) == 1 else {**summary, "runs": numbers}
        columns = {name.removeprefix(CATEGORY_PREFIX): each["relative"] for name, each in summary.items()}
        return self.sum_up(verdicts, scores, columns)

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        """Return the ratings of the reference and of the answer in each run of the judge."""
        # Exact numbers: `fmean`, which the other scores come from, adds without rounding.
        sums: dict[str, Fraction | int] = {COUNT: 1}
        for run, (reference, answer) in enumerate(verdict.details["ratings"]):
            sums |= {f"reference {run}": Fraction(reference), f"answer {run}": Fraction(answer)}
        return sums

    def combine(self, sums: Mapping[str, float]) -> float:
        means = {name: float(total) / sums[COUNT] for name, total in sums.items()}
        runs = range(len(means) // 2)
        return fmean(relate(means[f"reference {run}"], means[f"answer {run}"])["relative"] for run in runs)


# ------------------------------------------------------------------------------------------------ what the judge sees
@dataclass(frozen=True)
class Comparison:
    """What the judge sees of one question.

    Attributes:
        question: what was asked, about which image.
        context: the image in words.
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

    def messages(self) -> list[dict[str, str]]:
        """Return the chat, to the character as LLaVA sends it (but for the words of the rule)."""
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


def read_rules(path: Path) -> dict[str, dict[str, str]]:
    """Read the instructions to the judge, by `llava_bench_<category>`."""
    rules = read_document(path)
    if not isinstance(rules, dict):
        raise InputError(f'{path} is no rule file: {{"{CATEGORY_PREFIX}conv": {{"role", "prompt"}}, ...}} is needed')
    for name, rule in rules.items():
        if not isinstance(rule, dict) or not all(isinstance(rule.get(part), str) for part in ("role", "prompt")):
            raise InputError(f'{path}: "{name}" must have the strings "role" and "prompt"')
    return rules


def read_captions(path: Path) -> dict[str, str]:
    """Read what each image shows, by the image's file name; a list of sentences is joined by newlines."""
    captions = {}
    for record in read_records(path):
        image, caption = record.get("image"), record.get("caption")
        sentences = caption if isinstance(caption, list) else [caption]
        if not isinstance(image, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise InputError(f'{path}: "image" and "caption" must be text, in the record {json.dumps(record)[:80]}')
        captions[Path(image).name] = "\n".join(sentences)
    return captions


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
        context_file: the images in words.
        rule_file: the instruction to the judge.
    """
    pairs = LlavaBench.pair(questions, answers)
    contexts, rules = read_captions(context_file), read_rules(rule_file)
    by_key = {row_key(row, LlavaBench.key_fields): row for row in references if isinstance(row.get("text"), str)}
    comparisons = []
    for key, question, answer in pairs:
        image = question.images[0].name if question.images else None
        rule = rules.get(f"{CATEGORY_PREFIX}{question.category}")
        if image not in contexts:
            raise InputError(f"{context_file} says nothing about {image}, the image of question {question.id}")
        if key not in by_key:
            raise InputError(f"there is no reference answer to question {question.id}")
        if rule is None:
            raise InputError(f"question {question.id}: {rule_file} has no rule for the category {question.category!r}")
        comparisons.append(Comparison(question, contexts[image], by_key[key], answer, rule))
    return comparisons


def ask_judge(judge: Judge, comparison: Comparison, *, run: int = 0, max_tokens: int = MAX_TOKENS) -> str:
    question, references = comparison.question, (comparison.reference["text"],)
    case = Case(LlavaBench.name, str(question.id), question.prompt, references, comparison.answer["text"])
    return judge.ask(case, comparison.messages(), attempt=run, temperature=TEMPERATURE, max_tokens=max_tokens)


# ----------------------------------------------------------------------------------------------------------- ratings
def parse_ratings(reply: str) -> Ratings:
    """Read the two ratings in the first line of a reply, to the letter as LLaVA does.

    Commas count as spaces, and exactly one separates the ratings: `7,8` can be read, `7, 8` and `8/10 7/10` cannot.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(pieces) != len(UNREADABLE):
        return UNREADABLE
    try:
        first, second = map(float, pieces)
    except ValueError:
        return UNREADABLE
    # In LLaVA's script "nan" spoils every mean.
    return (first, second) if math.isfinite(first) and math.isfinite(second) else UNREADABLE


def make_review(number: int, comparison: Comparison, reply: str) -> dict[str, Any]:
    """Make a line of LLaVA's review file; `number` counts from 1."""
    return {
        "id": number,
        "question_id": comparison.question.id,
        "answer1_id": comparison.reference.get("answer_id", comparison.question.id),
        "answer2_id": comparison.answer.get("answer_id", comparison.question.id),
        "category": comparison.category,
        "content": reply,
        "tuple": list(parse_ratings(reply)),
    }


def read_ratings(replies: Sequence[str]) -> list[Ratings]:
    """Read the ratings of one run. None that can be read is an error: -1 over -1 would be 100 percent."""
    ratings = [parse_ratings(reply) for reply in replies]
    if all(each == UNREADABLE for each in ratings):
        raise InputError(
            f"none of the judge's {len(replies)} replies begins with two ratings; the first is {replies[0][:80]!r}"
        )
    return ratings


def make_verdict(comparison: Comparison, ratings: Sequence[Ratings]) -> Verdict:
    """Make a question's verdict; `ratings` has one pair per run."""
    return Verdict(
        key=LlavaBench.key(comparison.question),
        prediction=comparison.answer["text"],
        reference=comparison.reference["text"],
        points=fmean(min(max(answer / BEST_RATING, 0.0), 1.0) for _, answer in ratings),
        category=comparison.category,
        details={"ratings": [list(pair) for pair in ratings]},
    )


def summarize_runs(verdicts: Sequence[Verdict]) -> list[Summary]:
    categories = [verdict.category for verdict in verdicts]
    runs = zip(*(verdict.details["ratings"] for verdict in verdicts), strict=True)
    return [summarize_ratings(categories, ratings) for ratings in runs]


def summarize_ratings(categories: Sequence[str | None], ratings: Sequence[Sequence[float]]) -> Summary:
    """Average ratings as LLaVA does: means to 3 digits, then their ratio and ten times the means to 1 digit.

    Args:
        categories: of each pair of ratings; None counts for `all` alone.
        ratings: of the reference and of the answer, the unreadable ones included.
    """
    named = collect(zip(categories, ratings, strict=True))
    groups = {"all": list(ratings), **{name: pairs for name, pairs in named.items() if name is not None}}
    summary = {}
    for name, pairs in groups.items():
        summary[name] = relate(*map(fmean, zip(*pairs, strict=True)))
    return summary


def relate(reference: float, answer: float) -> dict[str, float]:
    """Put the mean ratings of references and answers in relation, rounded as in LLaVA."""
    first, second = round(reference, 3), round(answer, 3)
    relative = round(second / first * 100, 1) if first else 0.0
    return {"relative": relative, "gpt4": round(first * 10, 1), "model": round(second * 10, 1)}


def average_summaries(summaries: Sequence[Summary]) -> Summary:
    """Average the numbers of several runs, as the paper does with three."""
    return {
        name: {title: fmean(summary[name][title] for summary in summaries) for title in numbers}
        for name, numbers in summaries[0].items()
    }
