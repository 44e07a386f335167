"""POPE: is there such an object in the image? Yes or no, in three categories of wrong objects.

Files: `llava_pope_test.jsonl` (questions), `coco/coco_pope_<category>.json` (labels, JSON Lines), `val2014/`
(images). Source of the rules: AoiDragon/POPE `evaluate.py`. The i-th question of a category goes with the i-th label of
its file, so the files are compared line by line before anything is scored.

On the hub: configuration `Full` of lmms-lab/POPE, a split per category, 3,000 questions each. It follows POPE's newest
label files, LLaVA's question file an older commit: there are 90 more `random` questions, and the older files' "in the
imange" is spelt right. Ids are LLaVA's: the category's first id plus the question's number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict
from llava.eval.benchmarks._files import (
    COCO_PAGE,
    COCO_VAL2014,
    COCO_VAL2014_BYTES,
    COCO_VAL2014_IMAGES,
    from_eval_zip,
    load_question_file,
    read_records,
    take,
)
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubTable, Layout, ReadTable, question_line, safe_name
from llava.eval.metrics.means import collect, mean_percent
from llava.eval.metrics.yes_no import YesNoCounts, count_yes_no, parse_yes_no

QUESTION_FILE = "llava_pope_test.jsonl"
IMAGE_FOLDER = "val2014"
LABEL_FOLDER = "coco"
LABEL_FILE = "coco_pope_{category}.json"
FIRST_IDS = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
"""By category, in the order of LLaVA's question file; a question's number is added."""

LABELS = ("yes", "no")
LABEL_COMMIT = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
"""Commit of AoiDragon/POPE that LLaVA's question file was made from."""
SAME_VERSION = f"take the labels from commit {LABEL_COMMIT[:8]} of AoiDragon/POPE, not from its latest version"
TYPO = ("in the imange", "in the image")
"""Of the pinned commit. Later label files lack it; with the same labels in the same order they serve as well."""


# --------------------------------------------------------------------------------------------------------------- hub
def convert_full(read_table: ReadTable, layout: Layout) -> None:
    """Write all three categories."""
    questions = []
    for category, first_id in FIRST_IDS.items():
        labels = []
        for row in read_table(category):
            image = f"{safe_name(row['image_source'], category).removesuffix('.jpg')}.jpg"
            layout.save_image(f"{IMAGE_FOLDER}/{image}", row["image"])
            number, text = int(row["question_id"]), row["question"]
            labels.append({"question_id": number, "image": image, "text": text, "label": row["answer"]})
            questions.append(question_line(first_id + number, image, text + SHORT_ANSWER_LINE, category))
        layout.write_lines(f"{LABEL_FOLDER}/{LABEL_FILE.format(category=category)}", labels)
    layout.write_lines(QUESTION_FILE, questions)


COLUMNS = ("question_id", "question", "answer", "image_source", "image")
FULL = HubForm(
    "lmms-lab/POPE",
    {category: HubTable(category, COLUMNS, config="Full") for category in FIRST_IDS},
    (QUESTION_FILE, *(f"{LABEL_FOLDER}/{LABEL_FILE.format(category=category)}" for category in FIRST_IDS)),
    convert_full,
)


# --------------------------------------------------------------------------------------------------------- downloads
LABEL_ADDRESS = f"https://raw.githubusercontent.com/AoiDragon/POPE/{LABEL_COMMIT}/output/coco"
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    *(
        Download(
            (Place(f"{LABEL_FOLDER}/{LABEL_FILE.format(category=category)}", number),),
            "https://github.com/AoiDragon/POPE",
            f"{LABEL_ADDRESS}/{LABEL_FILE.format(category=category)}",
        )
        for category, number in {"adversarial": 3_000, "popular": 3_000, "random": 2_910}.items()
    ),
    Download(
        (Place(f"{IMAGE_FOLDER}/", COCO_VAL2014_IMAGES),),
        COCO_PAGE,
        COCO_VAL2014,
        unpack_in="",
        size=COCO_VAL2014_BYTES,
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
class Pope(Benchmark):
    """POPE on COCO: the mean F1 of the adversarial, popular and random categories."""

    name = "pope"
    row = "POPE (Avg. F1)"
    folders = ("pope",)
    hub: ClassVar[Mapping[str, HubForm]] = {"coco": FULL}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"coco": Extent(8_910, 500)}
    headline_name = "mean F1 of the categories"

    def load(self, root: Path) -> list[Question]:
        """Read the questions; where the label files are there, check at once that they fit."""
        questions = load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)
        if (root / LABEL_FOLDER).is_dir() and not any(question.fault for question in questions):
            pair_labels(questions, root / LABEL_FOLDER)
        return questions

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        return score_pope(self.load(root), answers, root / LABEL_FOLDER)

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        """Return true and false yes and no, under the names `<category> <field of YesNoCounts>`."""
        counts = count_yes_no([(str(verdict.parsed), str(verdict.reference))])
        return {f"{verdict.category} {name}": number for name, number in asdict(counts).items()}

    def combine(self, sums: Mapping[str, float]) -> float:
        categories = collect(name.rpartition(" ")[::2] for name in sums)
        counts = (
            YesNoCounts(**{name: sums[f"{category} {name}"] for name in names})
            for category, names in categories.items()
        )
        return mean_percent(each.f1 for each in counts)


def score_pope(questions: Sequence[Question], answers: Mapping[str, Row], label_folder: Path) -> Scores:
    """Score answers (by question key) to all questions of the question file, with the label files of a folder."""
    labels = {Pope.key(question): label for question, label in pair_labels(questions, label_folder)}
    verdicts = []
    for key, question, row in Pope.pair(questions, answers):
        said = parse_yes_no(row["text"])
        points = float(said == labels[key])
        verdicts.append(Verdict(key, row["text"], labels[key], points, parsed=said, category=question.category))
    counts = count_by_category(verdicts)
    f1, accuracy = Pope().headline(verdicts), mean_percent(each.accuracy for each in counts.values())
    categories = {category: each.numbers() for category, each in counts.items()}
    scores = {"categories": categories, "average_f1": f1, "average_accuracy": accuracy}
    return Pope().sum_up(verdicts, scores, {"F1": f1, "Accuracy": accuracy})


def count_by_category(verdicts: Sequence[Verdict]) -> dict[str, YesNoCounts]:
    """Count true and false yes and no of each category, in the order in which the categories appear."""
    pairs = collect((str(each.category), (str(each.parsed), str(each.reference))) for each in verdicts)
    return {category: count_yes_no(compared) for category, compared in pairs.items()}


# ------------------------------------------------------------------------------------------------------------ labels
def pair_labels(questions: Sequence[Question], folder: Path) -> list[tuple[Question, str]]:
    """Give each question its label, "yes" or "no", after making sure that questions and label files fit."""
    for question in questions:
        if question.category is None:
            raise InputError(f"{QUESTION_FILE}: question {question.id} names no category, so its label is unknown")
    pairs = []
    for category, members in collect((question.category, question) for question in questions).items():
        path = folder / LABEL_FILE.format(category=category)
        labels = read_records(path)
        if len(labels) != len(members):
            raise InputError(
                f"{path} has {len(labels)} lines, {QUESTION_FILE} has {len(members)} {category} questions; "
                f"{SAME_VERSION}"
            )
        for line, (question, label) in enumerate(zip(members, labels, strict=True), start=1):
            check_label(question, label, f"{path} line {line}")
            pairs.append((question, label["label"].lower()))
    return pairs


def check_label(question: Question, label: Mapping[str, Any], where: str) -> None:
    """Make sure that a label is one, and belongs to a question: same image, same first line of text."""
    text, image, word = (take(label, name, str, where) for name in ("text", "image", "label"))
    if word.lower() not in LABELS:
        raise InputError(f'{where}: "label" must be yes or no, not {word!r}')
    if question.fault:
        return
    asked = question.prompt.split("\n")[0].replace(*TYPO)
    if asked != text.replace(*TYPO) or question.images[0].name != Path(image).name:
        raise InputError(
            f'{where} is about "{text}" on {image}, question {question.id} asks "{asked}" on '
            f"{question.images[0].name}; {SAME_VERSION}"
        )
