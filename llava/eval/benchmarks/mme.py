"""MME: two yes/no questions on each picture, in ten perception and four cognition subtasks; points, not percent.

Files: `llava_mme.jsonl` (questions), `MME_Benchmark_release_version/<subtask>/` (pictures, and beside each a text file
of its questions with their answers, or both in folders `images` and `questions_answers_YN`). Source of the rules:
`eval_tool/calculation.py` of the MME team. The two questions of a picture share their id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, row_key
from llava.eval.benchmarks._files import SHORT_ANSWER_SUFFIX, load_question_file
from llava.eval.benchmarks._hub_mme import Mme as MmeForm
from llava.eval.hub import HubForm
from llava.files import read_lines, write_text

QUESTION_FILE = "llava_mme.jsonl"
DATA_FOLDER = "MME_Benchmark_release_version"
LABEL_SUBFOLDER = "questions_answers_YN"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

LABEL_SUFFIXES = (" Please answer yes or no.", "  Please answer yes or no.")
"""How the label files' questions end; seven real ones have two blanks."""

YES, NO, OTHER = "yes", "no", "other"
READ_CHARACTERS = 4
"""Only so many characters of an answer count."""
IMAGE_QUESTIONS = 2


class Mme(Benchmark):
    """MME: perception points, 2000 at most."""

    name = "mme"
    row = "MME (Perception)"
    folders = ("MME",)
    hub: ClassVar[Mapping[str, HubForm]] = {"all": MmeForm()}
    key_fields = ("question_id", "prompt")

    def load(self, root: Path) -> list[Question]:
        """Read the questions."""
        return load_question_file(root / QUESTION_FILE, root / DATA_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score each subtask; pictures of which an answer is missing take no part."""
        subtasks = {
            name: score_subtask([pair for pair in pairs if len(pair) == IMAGE_QUESTIONS])
            for name, pairs in collect_pairs(self.load(root), answers, root / DATA_FOLDER).items()
        }
        subtasks = {name: numbers for name, numbers in subtasks.items() if numbers["n_images"]}
        if not any(name in subtasks for name in PERCEPTION):
            raise InputError("MME: no picture of the perception subtasks has answers to both of its questions")
        perception, cognition = (
            sum(subtasks[name]["score"] for name in names if name in subtasks) for names in (PERCEPTION, COGNITION)
        )
        return Scores(
            headline=perception,
            scores={"perception": perception, "cognition": cognition, "subtasks": subtasks},
            count=sum(numbers["n_questions"] for numbers in subtasks.values()),
            columns={"Perception": perception, "Cognition": cognition},
        )

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write `<subtask>.txt` files as `eval_tool/calculation.py --results_dir` reads them."""
        subtasks = collect_pairs(self.load(root), answers, root / DATA_FOLDER)
        return [
            write_text(
                destination / f"{name}.txt", "".join(f"{format_answer(answer)}\n" for pair in pairs for answer in pair)
            )
            for name, pairs in subtasks.items()
        ]


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with its label.

    Attributes:
        stem: name of the label file, without folder.
        question: as the label file has it.
        label: as the label file has it, `Yes` or `No`.
        text: the answer.
    """

    stem: str
    question: str
    label: str
    text: str

    @property
    def is_right(self) -> bool:
        """Whether the answer says what the label says."""
        return parse_answer(self.text) == self.label.lower()


def parse_answer(text: str) -> str:
    """Read an answer as "yes", "no" or "other".

    The first four characters count, blanks included; so `Not sure` and `Know it` are "no", `It is yes` is "other".
    """
    # In the tool's own files the answer ends with its line, which counts among the four.
    head = f"{text}\n".lower()[:READ_CHARACTERS]
    if YES in head:
        return YES
    return NO if NO in head else OTHER


def score_subtask(pairs: Sequence[Sequence[LabelledAnswer]]) -> dict[str, Any]:
    """Score one subtask.

    Args:
        pairs: both answers to each picture.

    Returns:
        `acc` of the questions and `acc_plus` of the pictures (both right) as fractions, `score` in points of 200, the
        number of answers that are neither yes nor no, and how many there are.
    """
    flat = [answer for pair in pairs for answer in pair]
    acc = sum(answer.is_right for answer in flat) / len(flat) if flat else 0.0
    acc_plus = sum(all(answer.is_right for answer in pair) for pair in pairs) / len(pairs) if pairs else 0.0
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * (acc + acc_plus),
        "other_num": sum(parse_answer(answer.text) == OTHER for answer in flat),
        "n_questions": len(flat),
        "n_images": len(pairs),
    }


def collect_pairs(
    questions: Sequence[Question], answers: Mapping[str, Row], folder: Path
) -> dict[str, list[list[LabelledAnswer]]]:
    """Give each answer its label, and put the answers to one picture together.

    Args:
        questions: all of the question file; a picture is told by the id that its questions share.
        answers: rows by question key.
        folder: with a folder of label files for each subtask.

    Returns:
        By subtask the answers of each picture, as many as there are.

    Raises:
        InputError: a picture without two questions, an unknown subtask, or a question without a label.
    """
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(str(question.id), []).append(question)
    collected: dict[str, list[list[LabelledAnswer]]] = {}
    for identity, members in by_image.items():
        if any(question.fault for question in members):
            continue
        if len(members) != IMAGE_QUESTIONS:
            raise InputError(f"{QUESTION_FILE}: {identity} has {len(members)} questions, each picture needs two")
        subtask, labels = read_labels(folder, identity)
        pair = []
        for question in members:
            text, label = find_label(labels, question)
            row = answers.get(row_key(question.head(), Mme.key_fields))
            if row is not None:
                pair.append(LabelledAnswer(f"{PurePosixPath(identity).stem}.txt", text, label, row["text"]))
        collected.setdefault(subtask, []).append(pair)
    return collected


def read_labels(folder: Path, identity: str) -> tuple[str, dict[str, str]]:
    """Read the questions of a picture with their labels.

    Args:
        folder: with a folder for each subtask.
        identity: of the picture, such as `artwork/images/1.jpg` or `count/1.jpg`.

    Returns:
        The subtask, and label by question.
    """
    subtask, stem = PurePosixPath(identity).parts[0], PurePosixPath(identity).stem
    if subtask not in PERCEPTION + COGNITION:
        raise InputError(
            f"{QUESTION_FILE}: {identity} belongs to no subtask; known: {', '.join(PERCEPTION + COGNITION)}"
        )
    apart = folder / subtask / LABEL_SUBFOLDER / f"{stem}.txt"
    path = apart if apart.is_file() else folder / subtask / f"{stem}.txt"
    labels = {}
    for number, line in read_lines(path):
        question, tab, label = line.strip().partition("\t")
        if not tab or label.strip().lower() not in (YES, NO):
            raise InputError(f"{path} line {number}: a question, a tab and Yes or No are needed")
        labels[question] = label.strip()
    return subtask, labels


def find_label(labels: Mapping[str, str], question: Question) -> tuple[str, str]:
    """Return a question as its label file has it, and its label.

    Raises:
        InputError: the label file does not have it.
    """
    asked = question.prompt.replace(SHORT_ANSWER_SUFFIX.strip(), "").strip()
    for suffix in LABEL_SUFFIXES:
        if asked + suffix in labels:
            return asked + suffix, labels[asked + suffix]
    raise InputError(
        f'{QUESTION_FILE}: {question.id} asks "{asked}", which its label file does not have; take {QUESTION_FILE} and '
        f"{DATA_FOLDER} from the same version"
    )


def format_answer(answer: LabelledAnswer) -> str:
    """Write an answer as a line of the tool's files; what would end its cell, newlines and tabs, become blanks."""
    text = answer.text.translate(str.maketrans("\n\r\t", "   "))
    return f"{answer.stem}\t{answer.question}\t{answer.label}\t{text}"
