"""POPE: is there such an object in the image? Yes or no, in three categories of wrong objects.

Files: `llava_pope_test.jsonl` (questions), `coco/coco_pope_<category>.json` (labels, JSON Lines), `val2014/`
(images). Source of the rules: AoiDragon/POPE `evaluate.py`. The i-th question of a category goes with the i-th label of
its file, so the files are compared line by line before anything is scored.

On the hub: configuration `Full` of lmms-lab/POPE, a split per category, 3,000 questions each. It follows POPE's newest
label files, LLaVA's question file an older commit: there are 90 more `random` questions, and the older files' "in the
imange" is spelt right. Ids are LLaVA's: the category's first id plus the question's number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import load_question_file, read_records
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRows, HubTable, Layout, Tables, safe_name
from llava.eval.metrics.yes_no import YesNoCounts, count_yes_no, divide, parse_yes_no

QUESTION_FILE = "llava_pope_test.jsonl"
IMAGE_FOLDER = "val2014"
LABEL_FOLDER = "coco"
LABEL_FILE = "coco_pope_{category}.json"
FIRST_IDS = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
"""By category, in the order of LLaVA's question file; a question's number is added."""

LABELS = ("yes", "no")
LABEL_COMMIT = "e3e39262"
"""Commit of AoiDragon/POPE that LLaVA's question file was made from."""
PINNED_RANDOM_COUNT, LATEST_RANDOM_COUNT = 2910, 3000
WORDING_OF_COMMITS = {"in the imange": "in the image"}
"""The pinned commit's typo. Later label files lack it; with the same labels in the same order they serve as well."""


# --------------------------------------------------------------------------------------------------------------- hub
class PopeFull(HubForm):
    """All three categories."""

    dataset = "lmms-lab/POPE"
    tables: ClassVar[Tables] = {
        category: HubTable(category, ("question_id", "question", "answer", "image_source", "image"), config="Full")
        for category in FIRST_IDS
    }
    files = (QUESTION_FILE, *(f"{LABEL_FOLDER}/{LABEL_FILE.format(category=category)}" for category in FIRST_IDS))

    def convert(self, rows: HubRows, layout: Layout) -> None:
        questions = []
        for category, first_id in FIRST_IDS.items():
            labels = []
            for row in rows[category]:
                image = f"{safe_name(row['image_source'], self.dataset).removesuffix('.jpg')}.jpg"
                layout.save_image(f"{IMAGE_FOLDER}/{image}", row["image"])
                number, text = int(row["question_id"]), row["question"]
                labels.append({"question_id": number, "image": image, "text": text, "label": row["answer"]})
                question = {"question_id": first_id + number, "image": image, "text": text + SHORT_ANSWER_LINE}
                questions.append({**question, "category": category})
            layout.write_lines(f"{LABEL_FOLDER}/{LABEL_FILE.format(category=category)}", labels)
        layout.write_lines(QUESTION_FILE, questions)


# --------------------------------------------------------------------------------------------------------- benchmark
class Pope(Benchmark):
    """POPE on COCO: the mean F1 of the adversarial, popular and random categories."""

    name = "pope"
    row = "POPE (Avg. F1)"
    folders = ("pope",)
    hub: ClassVar[Mapping[str, HubForm]] = {"coco": PopeFull()}

    def load(self, root: Path) -> list[Question]:
        """Read the questions; where the label files are there, check at once that they fit."""
        questions = load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)
        if (root / LABEL_FOLDER).is_dir() and not any(question.fault for question in questions):
            pair_labels(questions, root / LABEL_FOLDER)
        return questions

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        return score_pope(self.load(root), answers, root / LABEL_FOLDER)

    def headline(self, verdicts: Sequence[Verdict]) -> float:
        return average_f1(count_by_category(verdicts))


def score_pope(questions: Sequence[Question], answers: Mapping[str, Row], label_folder: Path) -> Scores:
    """Score answers against the label files of a folder.

    Args:
        questions: all of the question file, in its order.
        answers: rows by question key; questions without a row take no part.
        label_folder: with `coco_pope_<category>.json` files.

    Raises:
        InputError: questions and labels do not fit together, or nothing was answered.
    """
    verdicts = []
    for question, label in pair_labels(questions, label_folder):
        key = row_key(question.head(), Pope.key_fields)
        if key in answers:
            text = answers[key]["text"]
            said = parse_yes_no(text)
            verdicts.append(Verdict(key, text, label, float(said == label), parsed=said, category=question.category))
    if not verdicts:
        raise InputError("POPE: none of the questions has an answer")
    counts = count_by_category(verdicts)
    accuracy = divide(100 * sum(each.accuracy for each in counts.values()), len(counts))
    return Scores(
        headline=average_f1(counts),
        scores={
            "categories": {category: list_counts(each) for category, each in counts.items()},
            "average_f1": average_f1(counts),
            "average_accuracy": accuracy,
        },
        count=len(verdicts),
        columns={"F1": average_f1(counts), "Accuracy": accuracy},
        verdicts=verdicts,
    )


def count_by_category(verdicts: Sequence[Verdict]) -> dict[str, YesNoCounts]:
    """Count true and false yes and no of each category, in the order in which the categories appear."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for verdict in verdicts:
        pairs.setdefault(str(verdict.category), []).append((str(verdict.parsed), str(verdict.reference)))
    return {category: count_yes_no(compared) for category, compared in pairs.items()}


def average_f1(counts: Mapping[str, YesNoCounts]) -> float:
    """Return the mean F1 of the categories, in percent."""
    return divide(100 * sum(each.f1 for each in counts.values()), len(counts))


def list_counts(counts: YesNoCounts) -> dict[str, Any]:
    """List a category's numbers under the official names; ratios are fractions."""
    return {
        "TP": counts.true_positive,
        "FP": counts.false_positive,
        "TN": counts.true_negative,
        "FN": counts.false_negative,
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "yes_ratio": counts.yes_ratio,
        "n": counts.num_questions,
    }


# ------------------------------------------------------------------------------------------------------------ labels
def pair_labels(questions: Sequence[Question], folder: Path) -> list[tuple[Question, str]]:
    """Give each question its label, "yes" or "no", after making sure that questions and label files fit.

    Raises:
        InputError: a category has no label file, the counts differ, or a question differs from its label's question.
    """
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        if question.category is None:
            raise InputError(f"{QUESTION_FILE}: question {question.id} names no category, so its label is unknown")
        by_category.setdefault(question.category, []).append(question)
    pairs = []
    for category, members in by_category.items():
        path = folder / LABEL_FILE.format(category=category)
        labels = read_records(path)
        if len(labels) != len(members):
            raise InputError(explain_count(path, len(labels), category, len(members)))
        for line, (question, label) in enumerate(zip(members, labels, strict=True), start=1):
            check_label(question, label, f"{path} line {line}")
            pairs.append((question, label["label"].lower()))
    return pairs


def explain_count(path: Path, num_labels: int, category: str, num_questions: int) -> str:
    """Explain that a label file has the wrong length, and where the right one is."""
    message = f"{path} has {num_labels} lines, {QUESTION_FILE} has {num_questions} {category} questions"
    if (num_labels, num_questions) == (LATEST_RANDOM_COUNT, PINNED_RANDOM_COUNT):
        return f"{message}: take the file from commit {LABEL_COMMIT} of AoiDragon/POPE, not from its latest version"
    return f"{message}; both must come from the same version (AoiDragon/POPE commit {LABEL_COMMIT})"


def check_label(question: Question, label: Mapping[str, Any], where: str) -> None:
    """Make sure that a label belongs to a question: same image, same first line of text.

    Raises:
        InputError: it does not, or it is not a label.
    """
    if not all(isinstance(label.get(name), str) for name in ("text", "image", "label")):
        raise InputError(f'{where}: "text", "image" and "label" must be strings')
    if label["label"].lower() not in LABELS:
        raise InputError(f'{where}: "label" must be yes or no, not {label["label"]!r}')
    if question.fault:
        return
    asked = unify_wording(question.prompt.split("\n")[0])
    if asked != unify_wording(label["text"]) or question.images[0].name != Path(label["image"]).name:
        raise InputError(
            f'{where} is about "{label["text"]}" on {label["image"]}, question {question.id} asks "{asked}" on '
            f"{question.images[0].name}; both must come from the same version (AoiDragon/POPE commit {LABEL_COMMIT})"
        )


def unify_wording(text: str) -> str:
    """Drop the one difference in wording between the versions of the label files."""
    for typo, right in WORDING_OF_COMMITS.items():
        text = text.replace(typo, right)
    return text
