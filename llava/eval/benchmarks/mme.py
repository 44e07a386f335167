"""MME: two yes/no questions on each image, in ten perception and four cognition subtasks; points, not percent.

Files: `llava_mme.jsonl` (questions), `MME_Benchmark_release_version/<subtask>/` (images, and beside each a text file of
its questions with their answers, or both in folders `images` and `questions_answers_YN`). Source of the rules:
`eval_tool/calculation.py` of the MME team. The two questions on an image share their id, which is the image's path.

On the hub: the two questions on an image may be anywhere in the dataset; they are brought together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import load_question_file
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables, safe_name
from llava.files import read_lines, write_text

QUESTION_FILE = "llava_mme.jsonl"
DATA_FOLDER = "MME_Benchmark_release_version"
IMAGE_SUBFOLDER, LABEL_SUBFOLDER = "images", "questions_answers_YN"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

LABEL_ENDING = "Please answer yes or no."
LABEL_SUFFIXES = (f" {LABEL_ENDING}", f"  {LABEL_ENDING}")
"""How the questions of the label files end; seven real ones have two spaces."""

YES, NO, OTHER = "yes", "no", "other"
READ_CHARACTERS = 4
"""An answer is read no further than this."""
IMAGE_QUESTIONS = 2


# --------------------------------------------------------------------------------------------------------------- hub
class MmeForm(HubForm):
    """All fourteen subtasks."""

    dataset = "lmms-lab/MME"
    tables: ClassVar[Tables] = {
        "questions": HubTable("test", ("question_id", "image", "question", "answer", "category"))
    }
    files = (QUESTION_FILE,)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        # 1. Put the questions on an image together. The image goes to the disk; only text stays in memory.
        pairs: dict[str, list[HubRow]] = {}
        for row in rows["questions"]:
            image = safe_name(row["question_id"], self.dataset)
            if not image.startswith(f"{row['category']}/"):
                raise InputError(f"{self.dataset}: question_id {image!r} is not {row['category']}/<image>")
            layout.save_image(f"{DATA_FOLDER}/{image}", row["image"])
            pairs.setdefault(image, []).append({name: row[name] for name in ("question", "answer", "category")})
        # 2. Label files are beside the image, or in a folder beside `images`.
        questions = []
        for image, pair in pairs.items():
            path = PurePosixPath(DATA_FOLDER, image).with_suffix(".txt")
            if path.parent.name == IMAGE_SUBFOLDER:
                path = path.parent.with_name(LABEL_SUBFOLDER) / path.name
            layout.write_text(str(path), "".join(f"{row['question']}\t{row['answer']}\n" for row in pair))
            for row in pair:
                text = row["question"].removesuffix(LABEL_ENDING).rstrip() + SHORT_ANSWER_LINE
                questions.append({"question_id": image, "image": image, "text": text, "category": row["category"]})
        layout.write_lines(QUESTION_FILE, questions)


# --------------------------------------------------------------------------------------------------------- benchmark
class Mme(Benchmark):
    """MME: perception points, 2000 at most."""

    name = "mme"
    row = "MME (Perception)"
    folders = ("MME",)
    answers_file = "answers/{run}.jsonl"
    upload_folder = "eval_tool/answers/{run}"
    hub: ClassVar[Mapping[str, HubForm]] = {"all": MmeForm()}
    key_fields = ("question_id", "prompt")

    def load(self, root: Path) -> list[Question]:
        return load_question_file(root / QUESTION_FILE, root / DATA_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score each subtask; images of which an answer is missing take no part."""
        verdicts = [
            verdict
            for subtask, pairs in collect_pairs(self.load(root), answers, root / DATA_FOLDER).items()
            for image, pair in pairs.items()
            if len(pair) == IMAGE_QUESTIONS
            for verdict in judge_pair(subtask, image, pair)
        ]
        subtasks = score_subtasks(verdicts)
        if not any(name in subtasks for name in PERCEPTION):
            raise InputError("MME: no image of the perception subtasks has answers to both of its questions")
        perception, cognition = sum_points(subtasks, PERCEPTION), sum_points(subtasks, COGNITION)
        return Scores(
            headline=perception,
            scores={"perception": perception, "cognition": cognition, "subtasks": subtasks},
            count=sum(numbers["n_questions"] for numbers in subtasks.values()),
            columns={"Perception": perception, "Cognition": cognition},
            verdicts=verdicts,
        )

    def headline(self, verdicts: Sequence[Verdict]) -> float:
        """Sum over the perception subtasks: 100 points each for all questions and for all images right."""
        return sum_points(score_subtasks(verdicts), PERCEPTION)

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write `<subtask>.txt` files as `eval_tool/calculation.py --results_dir` reads them."""
        return [
            write_text(
                destination / f"{subtask}.txt",
                "".join(f"{format_answer(image, answer)}\n" for image, pair in pairs.items() for answer in pair),
            )
            for subtask, pairs in collect_pairs(self.load(root), answers, root / DATA_FOLDER).items()
        ]


# ----------------------------------------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with its label.

    Attributes:
        key: of the question (`row_key`).
        question: as the label file has it.
        label: as the label file has it, `Yes` or `No`.
        text: the answer.
    """

    key: str
    question: str
    label: str
    text: str


def collect_pairs(
    questions: Sequence[Question], answers: Mapping[str, Row], folder: Path
) -> dict[str, dict[str, list[LabelledAnswer]]]:
    """Give each answer its label, and put the answers on an image together.

    Args:
        questions: all of the question file; those on one image share their id.
        answers: rows by question key.
        folder: with a folder of label files for each subtask.

    Returns:
        By subtask and image, the answers that there are.

    Raises:
        InputError: an image without two questions, an unknown subtask, or a question without a label.
    """
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(str(question.id), []).append(question)
    collected: dict[str, dict[str, list[LabelledAnswer]]] = {}
    for image, members in by_image.items():
        if any(question.fault for question in members):
            continue
        if len(members) != IMAGE_QUESTIONS:
            raise InputError(f"{QUESTION_FILE}: {image} has {len(members)} questions, each image needs two")
        subtask, labels = PurePosixPath(image).parts[0], read_labels(folder, image)
        pair = collected.setdefault(subtask, {}).setdefault(image, [])
        for question in members:
            text, label = find_label(labels, question)
            key = row_key(question.head(), Mme.key_fields)
            if key in answers:
                pair.append(LabelledAnswer(key, text, label, answers[key]["text"]))
    return collected


def read_labels(folder: Path, image: str) -> dict[str, str]:
    """Read the labels of an image, such as `artwork/images/1.jpg` or `count/1.jpg`, by question."""
    subtask, name = PurePosixPath(image).parts[0], f"{PurePosixPath(image).stem}.txt"
    if subtask not in PERCEPTION + COGNITION:
        raise InputError(f"{QUESTION_FILE}: {image} belongs to no subtask; known: {', '.join(PERCEPTION + COGNITION)}")
    apart = folder / subtask / LABEL_SUBFOLDER / name
    path = apart if apart.is_file() else folder / subtask / name
    labels = {}
    for number, line in read_lines(path):
        question, tab, label = line.strip().partition("\t")
        if not tab or label.strip().lower() not in (YES, NO):
            raise InputError(f"{path} line {number}: a question, a tab and Yes or No are needed")
        labels[question] = label.strip()
    return labels


def find_label(labels: Mapping[str, str], question: Question) -> tuple[str, str]:
    """Return a question as its label file has it, and its label.

    Raises:
        InputError: the label file does not have it.
    """
    asked = question.prompt.replace(SHORT_ANSWER_LINE.strip(), "").strip()
    for suffix in LABEL_SUFFIXES:
        if asked + suffix in labels:
            return asked + suffix, labels[asked + suffix]
    raise InputError(
        f'{QUESTION_FILE}: {question.id} asks "{asked}", which its label file does not have; take {QUESTION_FILE} and '
        f"{DATA_FOLDER} from the same version"
    )


def format_answer(image: str, answer: LabelledAnswer) -> str:
    """Write an answer as a line of the tool's files; what would end its cell, newlines and tabs, become spaces."""
    text = answer.text.translate(str.maketrans("\n\r\t", "   "))
    return f"{PurePosixPath(image).stem}.txt\t{answer.question}\t{answer.label}\t{text}"


# ----------------------------------------------------------------------------------------------------------- scoring
def parse_answer(text: str) -> str:
    """Read an answer as "yes", "no" or "other".

    The first four characters count, spaces included; so `Not sure` and `Know it` are "no", `It is yes` is "other".
    """
    # In the tool's own files the answer ends with its line, whose end is one of the four.
    head = f"{text}\n".lower()[:READ_CHARACTERS]
    if YES in head:
        return YES
    return NO if NO in head else OTHER


def judge_pair(subtask: str, image: str, pair: Sequence[LabelledAnswer]) -> list[Verdict]:
    """Return a verdict for each of the two questions on an image, and one for both together."""
    read, labels = [parse_answer(answer.text) for answer in pair], [answer.label.lower() for answer in pair]
    verdicts = [
        Verdict(answer.key, answer.text, label, float(said == label), parsed=said, category=subtask)
        for answer, said, label in zip(pair, read, labels, strict=True)
    ]
    together = Verdict(
        key=image,
        prediction=" | ".join(answer.text for answer in pair),
        reference=" | ".join(labels),
        points=float(read == labels),
        parsed=" | ".join(read),
        category=subtask,
        unit="pair",
        details={"question_keys": [answer.key for answer in pair]},
    )
    return [*verdicts, together]


def score_subtasks(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Score each subtask, by name.

    Returns:
        `acc` of the questions and `acc_plus` of the images (both right) as fractions, `score` in points of 200, the
        number of answers that are neither yes nor no, and how many questions and images there are.
    """
    members: dict[str, dict[str, list[Verdict]]] = {}
    for verdict in verdicts:
        units = members.setdefault(str(verdict.category), {"question": [], "pair": []})
        units[verdict.unit].append(verdict)
    subtasks = {}
    for subtask, units in members.items():
        acc, acc_plus = (sum(each.points for each in unit) / len(unit) for unit in units.values())
        subtasks[subtask] = {
            "acc": acc,
            "acc_plus": acc_plus,
            "score": 100 * (acc + acc_plus),
            "other_num": sum(verdict.parsed == OTHER for verdict in units["question"]),
            "n_questions": len(units["question"]),
            "n_images": len(units["pair"]),
        }
    return subtasks


def sum_points(subtasks: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float:
    """Sum the points of those of the named subtasks that were scored."""
    return sum(subtasks[name]["score"] for name in names if name in subtasks)
