"""ScienceQA: school questions with up to five options, half of them with a picture; the headline is about those.

Files: `llava_test_CQM-A.json` (questions), `problems.json` and `pid_splits.json` (right options), `images/test/`.
Sources of the rules: LLaVA's `eval_science_qa.py`; for the break-down lupantech/ScienceQA `tools/evaluate_acc.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, row_key
from llava.eval.benchmarks._files import read_document, take
from llava.eval.benchmarks._hub_sqa import ScienceQaImg
from llava.eval.hub import HubForm
from llava.eval.metrics.choice import FAILED, LETTER_LINE, LETTERS, parse_science_answer
from llava.prompt import query_of

QUESTION_FILE = "llava_test_CQM-A.json"
PROBLEM_FILE = "problems.json"
SPLIT_FILE = "pid_splits.json"
IMAGE_FOLDER = Path("images", "test")
SPLIT = "test"

NO_OPTION = -1
"""Index of an answer that names no option of its problem."""


class Sqa(Benchmark):
    """ScienceQA: accuracy on the test questions with an image."""

    name = "sqa"
    row = "ScienceQA (IMG)"
    folders = ("scienceqa",)
    hub: ClassVar[Mapping[str, HubForm]] = {"test": ScienceQaImg()}
    max_new_tokens = 1024

    def load(self, root: Path) -> list[Question]:
        """Read the questions, those of text alone included."""
        return load_science_questions(root / QUESTION_FILE, root / IMAGE_FOLDER)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score by the published script; a question without an answer is wrong, and outside the headline."""
        problems = read_problems(root)
        keys = {pid: row_key({"question_id": pid}, self.key_fields) for pid in problems}
        marked = mark_answers(problems, {pid: answers[key] for pid, key in keys.items() if key in answers})
        with_image = [answer for answer in marked if answer.is_multimodal]
        if not with_image:
            raise InputError("ScienceQA: none of the questions with an image has an answer")
        accuracy, img_accuracy = average_right(marked), average_right(with_image)
        num_right, num_img_right = count_right(marked), count_right(with_image)
        return Scores(
            headline=img_accuracy,
            scores={
                "accuracy": accuracy,
                "correct": num_right,
                "count": len(marked),
                "img_accuracy": img_accuracy,
                "img_correct": num_img_right,
                "img_total": len(with_image),
                "stdout": describe_accuracy(marked),
                "official_breakdown": format_breakdown(break_down(problems, marked)),
                "breakdown": break_down(problems, marked),
                "parsed": {answer.pid: answer.parsed for answer in marked},
                "pred_index": {answer.pid: answer.index for answer in marked},
            },
            count=len(marked),
            columns={"IMG": img_accuracy, "All": accuracy},
        )


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer as the published script sees it.

    Attributes:
        pid: id of the problem.
        parsed: the letter read from it, or FAILED.
        index: of the option it names, `NO_OPTION` if none.
        is_right: it is the right option.
        text: the answer.
        prompt: what was asked; `Unknown` where there is no answer.
    """

    pid: str
    parsed: str
    index: int
    is_right: bool
    text: str
    prompt: str

    @property
    def is_multimodal(self) -> bool:
        """Whether it was asked with a picture, to go by its prompt."""
        return DEFAULT_IMAGE_TOKEN in self.prompt


def load_science_questions(path: Path, image_folder: Path, letter_line: str | None = LETTER_LINE) -> list[Question]:
    """Read LLaVA's ScienceQA question file.

    Args:
        path: a JSON array of `{"id", "image", "conversations"}`; `image` is absent for a question of text alone.
        image_folder: where the `image` names are looked up.
        letter_line: what to ask for in the last line; None for nothing.

    Raises:
        InputError: the file is missing, empty or something else.
    """
    records = read_document(path)
    if not isinstance(records, list):
        raise InputError(f"{path} is not a question file: a JSON array is needed")
    questions = [
        make_science_question(record, f"{path.name} record {number}", image_folder, letter_line)
        for number, record in enumerate(records, start=1)
    ]
    if all(question.fault for question in questions):
        raise InputError(f"{path} is not a question file: {questions[0].fault if questions else 'it is empty'}")
    return questions


def make_science_question(record: Any, where: str, image_folder: Path, letter_line: str | None) -> Question:
    """Make the question of one record; `where` stands for the id of a record that has none."""
    pid = record.get("id") if isinstance(record, dict) else None
    if not isinstance(pid, str):
        return Question(id=where, fault=f'{where}: "id" must be a string')
    try:
        text = record["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    except (AttributeError, IndexError, KeyError, TypeError):
        return Question(id=pid, fault=f'{where}: "conversations" must start with a {{"value": text}}')
    name = record.get("image")
    if name is not None and not (isinstance(name, str) and name):
        return Question(id=pid, fault=f'{where}: "image" must be a file name')
    prompt = f"{text}\n{letter_line}" if letter_line else text
    asked = prompt if name is None else f"{DEFAULT_IMAGE_TOKEN}\n{prompt}"
    # The published script takes the query from the text with its image mark, so a blank and a newline come first.
    images = () if name is None else (image_folder / name,)
    return Question(id=pid, prompt=prompt, query=query_of(asked), images=images, record=asked)


def read_problems(root: Path, split: str = SPLIT) -> dict[str, dict[str, Any]]:
    """Read the problems of a split, in its order.

    Raises:
        InputError: a file is missing, or the two do not fit together.
    """
    pids = take(read_document(root / SPLIT_FILE), split, list, str(root / SPLIT_FILE))
    path = root / PROBLEM_FILE
    document = read_document(path)
    problems = {pid: take(document, pid, dict, f"{path} (its problems are listed in {SPLIT_FILE})") for pid in pids}
    for pid, problem in problems.items():
        where = f"{path} problem {pid}"
        num_choices, answer = len(take(problem, "choices", list, where)), take(problem, "answer", int, where)
        if not 0 <= answer < num_choices:
            raise InputError(f'{where}: "answer" must be the index of one of its {num_choices} choices')
    return problems


def mark_answers(problems: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Row]) -> list[MarkedAnswer]:
    """Mark the answer to each problem; a missing one is wrong.

    Args:
        problems: by id, in the order of the split.
        rows: rows of the answers file by id.
    """
    marked = []
    for pid, problem in problems.items():
        row = rows.get(pid, {"text": FAILED, "prompt": "Unknown"})
        parsed = parse_science_answer(row["text"])
        letters = LETTERS[: len(problem["choices"])]
        index = letters.index(parsed) if parsed in letters else NO_OPTION
        marked.append(
            MarkedAnswer(
                pid=pid,
                parsed=parsed,
                index=index,
                is_right=index == problem["answer"],
                text=row["text"],
                prompt=row.get("prompt") or "",
            )
        )
    return marked


def count_right(marked: Sequence[MarkedAnswer]) -> int:
    """Count the right answers."""
    return sum(answer.is_right for answer in marked)


def average_right(marked: Sequence[MarkedAnswer]) -> float:
    """Return the percentage of right answers; 0 of none."""
    return 100 * count_right(marked) / len(marked) if marked else 0.0


def describe_accuracy(marked: Sequence[MarkedAnswer]) -> str:
    """Write the published line of results."""
    with_image = [answer for answer in marked if answer.is_multimodal]
    return (
        f"Total: {len(marked)}, Correct: {count_right(marked)}, Accuracy: {average_right(marked):.2f}%, "
        f"IMG-Accuracy: {average_right(with_image):.2f}%"
    )


def break_down(problems: Mapping[str, Mapping[str, Any]], marked: Sequence[MarkedAnswer]) -> dict[str, float]:
    """Average by subject, context, grade and topic, as the official script does.

    Unlike the headline, `has_image` goes by the problems, so that a question without an answer stays in.

    Returns:
        Percent under the official names, of those groups that have problems.
    """
    groups: dict[str, list[MarkedAnswer]] = {}
    for answer in marked:
        for name in (*name_groups(problems[answer.pid]), "average"):
            groups.setdefault(f"acc_{name}", []).append(answer)
    return {name: average_right(members) for name, members in groups.items()}


SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}
LOWER_GRADES = tuple(f"grade{number}" for number in range(1, 7))


def name_groups(problem: Mapping[str, Any]) -> list[str]:
    """Name the official groups that a problem is in."""
    names = [SUBJECTS[problem["subject"]]] if problem.get("subject") in SUBJECTS else []
    has_text, has_image = bool(problem.get("hint")), bool(problem.get("image"))
    contexts = {"has_text": has_text, "has_image": has_image, "no_context": not has_text and not has_image}
    names += [name for name, holds in contexts.items() if holds]
    if problem.get("grade"):
        names.append("grade_1_6" if problem["grade"] in LOWER_GRADES else "grade_7_12")
    return names + ([problem["topic"]] if problem.get("topic") else [])


def format_breakdown(numbers: Mapping[str, float]) -> dict[str, str]:
    """Write percentages with two digits, as the official script prints them."""
    return {name: f"{number:.2f}" for name, number in numbers.items()}
