"""ScienceQA: school questions with up to five options, half of them with an image; the headline is about those.

Files: `llava_test_CQM-A.json` (questions), `problems.json` and `pid_splits.json` (right options), `images/test/`.
Sources of the rules: LLaVA's `eval_science_qa.py`; for the breakdown lupantech/ScienceQA `tools/evaluate_acc.py`.

On the hub: ScienceQA-IMG, the 2,017 test problems with an image. It has no problem numbers: a problem's id is its row.
The problems of text alone are not in it, so the accuracy over all problems is the one over those with an image.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import from_eval_zip, read_document, take, take_strings
from llava.eval.hub import HubForm, HubRow, HubTable, Layout, ReadTable
from llava.eval.metrics.choice import FAILED, LETTER_LINE, LETTERS, parse_science_answer
from llava.eval.metrics.means import collect, mean_percent
from llava.prompt import query_of

QUESTION_FILE = "llava_test_CQM-A.json"
PROBLEM_FILE = "problems.json"
SPLIT_FILE = "pid_splits.json"
IMAGE_FOLDER = Path("images", "test")
SPLIT = "test"

IMAGE, TEXT = "image", "text"
"""The categories of questions."""
NO_OPTION = -1
"""Index of an answer that names no option of its problem."""
UNANSWERED = {"text": FAILED, "prompt": "Unknown"}
"""What LLaVA's script puts in place of a missing answer."""
SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}
LOWER_GRADES = tuple(f"grade{number}" for number in range(1, 7))

Problem = Mapping[str, Any]
"""A record of `problems.json`: question, choices, answer (index), hint, image, subject, grade, topic and others."""


# --------------------------------------------------------------------------------------------------------------- hub
FURTHER_FIELDS = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")


def convert_test(read_table: ReadTable, layout: Layout) -> None:
    """Write the test split with images."""
    problems = {}
    for number, row in enumerate(read_table("problems")):
        layout.save_image(f"{IMAGE_FOLDER}/{number}/image.png", row["image"])
        problems[str(number)] = make_problem(row)
    layout.write_json(PROBLEM_FILE, problems)
    layout.write_json(SPLIT_FILE, {SPLIT: list(problems)})
    layout.write_json(QUESTION_FILE, [make_record(pid, problem) for pid, problem in problems.items()])


def make_problem(row: HubRow) -> Problem:
    return {
        "question": row["question"],
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "hint": row["hint"] or "",
        "image": "image.png",
        **{name: row.get(name) or "" for name in FURTHER_FIELDS},
        "split": SPLIT,
    }


def make_record(pid: str, problem: Problem) -> dict[str, Any]:
    """Make a problem's record of LLaVA's question file: context, question and options, as LLaVA-1.5 words them."""
    context = [f"Context: {problem['hint']}"] if problem.get("hint") else []
    options = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, problem["choices"], strict=False)]
    image = {"image": f"{pid}/{problem['image']}"} if problem.get("image") else {}
    lines = [*([DEFAULT_IMAGE_TOKEN] if image else []), *context, problem["question"], *options]
    turns = [
        {"from": "human", "value": "\n".join(lines)},
        {"from": "gpt", "value": ascii_uppercase[problem["answer"]]},
    ]
    return {"id": pid, **image, "conversations": turns}


TEST_FORM = HubForm(
    "lmms-lab/ScienceQA",
    {"problems": HubTable("test", ("image", "question", "choices", "answer", "hint"), config="ScienceQA-IMG")},
    (QUESTION_FILE, PROBLEM_FILE, SPLIT_FILE),
    convert_test,
)


# --------------------------------------------------------------------------------------------------------- downloads
SCIENCE_PAGE = "https://github.com/lupantech/ScienceQA"
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    *(
        Download(
            (Place(name, number),),
            SCIENCE_PAGE,
            f"https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/{name}",
        )
        for name, number in {PROBLEM_FILE: 21_208, SPLIT_FILE: None}.items()
    ),
    Download(
        (Place(f"{IMAGE_FOLDER.as_posix()}/", 2_017),),
        SCIENCE_PAGE,
        "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip",
        unpack_in=IMAGE_FOLDER.parent.as_posix(),
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
class Sqa(Benchmark):
    """ScienceQA: accuracy on the test questions with an image."""

    name = "sqa"
    row = "ScienceQA (IMG)"
    folders = ("scienceqa",)
    hub: ClassVar[Mapping[str, HubForm]] = {"test": TEST_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"test": Extent(4_241, 2_017)}
    max_new_tokens = 1024

    def load(self, root: Path) -> list[Question]:
        return load_science_questions(root / QUESTION_FILE, root / IMAGE_FOLDER)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score by LLaVA's script; a question without an answer is wrong, and outside the headline."""
        problems = read_problems(root)
        keys = {pid: row_key({"question_id": pid}, self.key_fields) for pid in problems}
        verdicts = judge_answers(problems, {pid: answers[key] for pid, key in keys.items() if key in answers})
        with_image = choose_with_image(verdicts.values())
        if not with_image:
            raise InputError("ScienceQA: none of the questions with an image has an answer")
        breakdown = break_down(problems, verdicts)
        accuracy, headline = average_points(verdicts.values()), average_points(with_image)
        scores = {
            "accuracy": accuracy,
            "correct": count_correct(verdicts.values()),
            "count": len(verdicts),
            "img_accuracy": headline,
            "img_correct": count_correct(with_image),
            "img_total": len(with_image),
            "stdout": describe_accuracy(verdicts),
            "official_breakdown": {name: f"{number:.2f}" for name, number in breakdown.items()},
            "breakdown": breakdown,
            "parsed": {pid: verdict.parsed for pid, verdict in verdicts.items()},
            "pred_index": {pid: find_option(verdict.parsed, problems[pid]) for pid, verdict in verdicts.items()},
        }
        return self.sum_up(list(verdicts.values()), scores, {"IMG": headline, "All": accuracy})

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        return super().tally(verdict) if has_image(verdict) else {}


# --------------------------------------------------------------------------------------------------------- questions
def load_science_questions(path: Path, image_folder: Path, letter_line: str | None = LETTER_LINE) -> list[Question]:
    """Read LLaVA's ScienceQA question file: a JSON array of `{"id", "image", "conversations"}`.

    `image` is absent for a question of text alone; names are looked up in `image_folder`. `letter_line` is the last
    line, which says what to answer; None for none.
    """
    records = read_document(path)
    if not isinstance(records, list):
        raise InputError(f"{path} is not a question file: a JSON array is needed")
    questions = [
        ask_record(record, f"{path.name} record {number}", image_folder, letter_line)
        for number, record in enumerate(records, start=1)
    ]
    if all(question.fault for question in questions):
        raise InputError(f"{path} is not a question file: {questions[0].fault if questions else 'it is empty'}")
    return questions


def ask_record(record: object, where: str, image_folder: Path, letter_line: str | None) -> Question:
    """Make the question of one record; a record without id is called `where`."""
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
    # The query is made of the text with its placeholder, as in LLaVA's script: it starts with a space and a newline.
    images = () if name is None else (image_folder / name,)
    return Question(id=pid, prompt=prompt, query=query_of(asked), images=images, record=asked)


def read_problems(root: Path, split: str = SPLIT) -> dict[str, Problem]:
    """Read the problems of a split, by id and in its order; the fields that are scored are checked."""
    path = root / PROBLEM_FILE
    document, splits = read_document(path), read_document(root / SPLIT_FILE)
    problems = {}
    for pid in take_strings(splits, split, str(root / SPLIT_FILE)):
        problem = take(document, pid, dict, f"{path} (its problems are listed in {SPLIT_FILE})")
        where = f"{path} problem {pid}"
        num_choices, answer = len(take_strings(problem, "choices", where)), take(problem, "answer", int, where)
        if not 0 <= answer < min(num_choices, len(ascii_uppercase)):
            raise InputError(f'{where}: "answer" must be the index of one of its {num_choices} choices')
        for name in ("hint", "image", "subject", "grade", "topic"):
            if problem.get(name) is not None:
                take(problem, name, str, where)
        problems[pid] = problem
    return problems


# ----------------------------------------------------------------------------------------------------------- scoring
def judge_answers(problems: Mapping[str, Problem], rows: Mapping[str, Row]) -> dict[str, Verdict]:
    """Return a verdict for each problem, by id and in their order; one without a row (by id) is wrong.

    Whether a question has an image is read in the row's prompt, as LLaVA's script does; where there is no prompt (or no
    answer), in the problem.
    """
    verdicts = {}
    for pid, problem in problems.items():
        row = rows.get(pid, UNANSWERED)
        prompt = row.get("prompt") if pid in rows else None
        has_prompt = isinstance(prompt, str) and prompt
        has_image = DEFAULT_IMAGE_TOKEN in prompt if has_prompt else bool(problem.get("image"))
        letter = parse_science_answer(row["text"])
        verdicts[pid] = Verdict(
            key=row_key({"question_id": pid}, Sqa.key_fields),
            prediction=row["text"],
            reference=ascii_uppercase[problem["answer"]],
            points=float(find_option(letter, problem) == problem["answer"]),
            parsed=letter,
            category=IMAGE if has_image else TEXT,
            details={} if pid in rows else {"answered": False},
        )
    return verdicts


def find_option(letter: str | None, problem: Problem) -> int:
    letters = LETTERS[: len(problem["choices"])]
    return letters.index(letter) if letter in letters else NO_OPTION


def has_image(verdict: Verdict) -> bool:
    """Whether a verdict is one of the headline: on a question with an image that was answered."""
    return verdict.category == IMAGE and verdict.details.get("answered", True)


def choose_with_image(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return list(filter(has_image, verdicts))


def count_correct(verdicts: Iterable[Verdict]) -> int:
    return sum(verdict.correct for verdict in verdicts)


def average_points(verdicts: Iterable[Verdict]) -> float:
    return mean_percent(verdict.points for verdict in verdicts)


def describe_accuracy(verdicts: Mapping[str, Verdict]) -> str:
    """Write the line of results that LLaVA's script prints."""
    every = verdicts.values()
    return (
        f"Total: {len(every)}, Correct: {count_correct(every)}, Accuracy: {average_points(every):.2f}%, "
        f"IMG-Accuracy: {average_points(choose_with_image(every)):.2f}%"
    )


def break_down(problems: Mapping[str, Problem], verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Average by subject, context, grade and topic, as the official script does: percent under the official names.

    Unlike the headline, `has_image` goes by the problems, so that a question without an answer stays in.
    """
    groups = collect(
        (f"acc_{name}", verdict)
        for pid, verdict in verdicts.items()
        for name in (*name_groups(problems[pid]), "average")
    )
    return {name: average_points(members) for name, members in groups.items()}


def name_groups(problem: Problem) -> list[str]:
    names = [SUBJECTS[problem["subject"]]] if problem.get("subject") in SUBJECTS else []
    has_text, has_image = bool(problem.get("hint")), bool(problem.get("image"))
    contexts = {"has_text": has_text, "has_image": has_image, "no_context": not has_text and not has_image}
    names += [name for name, holds in contexts.items() if holds]
    if problem.get("grade"):
        names.append("grade_1_6" if problem["grade"] in LOWER_GRADES else "grade_7_12")
    return names + ([problem["topic"]] if problem.get("topic") else [])
