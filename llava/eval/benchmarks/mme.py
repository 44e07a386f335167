"""MME: two yes/no questions on each image, in ten perception and four cognition subtasks; points, not percent.

Files: `llava_mme.jsonl` (questions), `MME_Benchmark_release_version/<subtask>/` (images, and beside each a text file of
its questions with their answers, or both in folders `images` and `questions_answers_YN`). Source of the rules:
`eval_tool/calculation.py` of the MME team. The two questions on an image share their id, which is the image's path.

On the hub: the two questions on an image may be anywhere in the dataset; they are brought together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict
from llava.eval.benchmarks._files import DOWNLOAD_HINT, from_eval_zip, load_question_file
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubTable, Layout, ReadTable, question_line, safe_name
from llava.eval.metrics.means import COUNT, POINTS, collect
from llava.files import read_lines, write_text

QUESTION_FILE = "llava_mme.jsonl"
DATA_FOLDER = "MME_Benchmark_release_version"
IMAGE_SUBFOLDER, LABEL_SUBFOLDER = "images", "questions_answers_YN"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

PARTS = tuple(
    tuple(f"{subtask} {unit} {name}" for unit in ("question", "pair") for name in (POINTS, COUNT))
    for subtask in PERCEPTION
)
"""Of each perception subtask the sums that the headline comes from."""

LABEL_ENDING = "Please answer yes or no."
LABEL_SUFFIXES = (f" {LABEL_ENDING}", f"  {LABEL_ENDING}")
"""How the questions of the label files end; seven real ones have two spaces."""

YES, NO, OTHER = "yes", "no", "other"
READ_CHARACTERS = 4
"""An answer is read no further than this."""
IMAGE_QUESTIONS = 2


# --------------------------------------------------------------------------------------------------------------- hub
DATASET = "lmms-lab/MME"


def convert_test(read_table: ReadTable, layout: Layout) -> None:
    """Write all fourteen subtasks."""
    # 1. Put the questions on an image together. The image goes to the disk; only text stays in memory.
    pairs: dict[str, list[HubRow]] = {}
    for row in read_table("questions"):
        image = safe_name(row["question_id"], DATASET)
        if not image.startswith(f"{row['category']}/"):
            raise InputError(f"{DATASET}: question_id {image!r} is not {row['category']}/<image>")
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
            questions.append(question_line(image, image, text, row["category"]))
    layout.write_lines(QUESTION_FILE, questions)


TEST_FORM = HubForm(
    DATASET,
    {"questions": HubTable("test", ("question_id", "image", "question", "answer", "category"))},
    (QUESTION_FILE,),
    convert_test,
)


# --------------------------------------------------------------------------------------------------------- downloads
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    Download(
        (Place(f"{DATA_FOLDER}/", 2_374),),
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        by_hand="its authors' consent (or take `--source hub`)",
        archive=f"{DATA_FOLDER}.zip",
        unpack_in="",
    ),
)
"""An image and a text file for each of 1,187 images."""


# --------------------------------------------------------------------------------------------------------- benchmark
class Mme(Benchmark):
    """MME: perception points, 2000 at most."""

    name = "mme"
    row = "MME (Perception)"
    folders = ("MME",)
    answers_file = "answers/{run}.jsonl"
    upload_folder = "eval_tool/answers/{run}"
    hub: ClassVar[Mapping[str, HubForm]] = {"all": TEST_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"all": Extent(2_374, 1_187)}
    key_fields = ("question_id", "prompt")
    full_marks = 2000.0
    headline_name = "perception"

    def load(self, root: Path) -> list[Question]:
        return load_question_file(root / QUESTION_FILE, root / DATA_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score each subtask; images of which an answer is missing take no part."""
        verdicts = []
        for image, judged in judge_images(self.load(root), answers, root / DATA_FOLDER).items():
            pair = [verdict for _, _, verdict in judged]
            if len(pair) == IMAGE_QUESTIONS:
                verdicts += [*pair, join_pair(image, pair)]
        subtasks = score_subtasks(verdicts)
        if not any(name in subtasks for name in PERCEPTION):
            raise InputError("MME: no image of the perception subtasks has answers to both of its questions")
        perception, cognition = sum_points(subtasks, PERCEPTION), sum_points(subtasks, COGNITION)
        scores = {"perception": perception, "cognition": cognition, "subtasks": subtasks}
        return self.sum_up(verdicts, scores, {"Perception": perception, "Cognition": cognition})

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        """The headline is about the perception subtasks; of each, right and all questions, right and all images."""
        if verdict.category not in PERCEPTION:
            return {}
        return {f"{verdict.category} {verdict.unit} {name}": amount for name, amount in super().tally(verdict).items()}

    def combine(self, sums: Mapping[str, float]) -> float:
        """Sum over the perception subtasks: 100 points each for all questions and for all images right."""
        return sum(
            100 * (sums[right] / sums[count] + sums[both_right] / sums[pair_count])
            for right, count, both_right, pair_count in PARTS
            if count in sums
        )

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write `<subtask>.txt` files as `eval_tool/calculation.py --results_dir` reads them."""
        lines: dict[str, list[str]] = {}
        for image, judged in judge_images(self.load(root), answers, root / DATA_FOLDER).items():
            rows = lines.setdefault(name_subtask(image), [])
            for question, label, verdict in judged:
                # What would end the cell, newlines and tabs, becomes spaces.
                text = verdict.prediction.translate(str.maketrans("\n\r\t", "   "))
                rows.append(f"{PurePosixPath(image).stem}.txt\t{question}\t{label}\t{text}\n")
        return [write_text(destination / f"{subtask}.txt", "".join(rows)) for subtask, rows in lines.items()]


# ------------------------------------------------------------------------------------------------------------ labels
Judged = tuple[str, str, Verdict]
"""A question and its label as the label file has them, and the verdict on its answer."""


def judge_images(questions: Sequence[Question], answers: Mapping[str, Row], folder: Path) -> dict[str, list[Judged]]:
    """Judge the answers on each image; label files are in `folder`, in a folder for each subtask.

    Returns:
        By image, its answered questions.
    """
    judged: dict[str, list[Judged]] = {}
    for image, members in collect((str(question.id), question) for question in questions).items():
        broken = [question for question in members if question.fault]
        if any(Mme.key(question) in answers for question in broken):
            raise InputError(f"{QUESTION_FILE}: a question about {image} has an answer, but is broken")
        if broken:
            continue
        if len(members) != IMAGE_QUESTIONS:
            raise InputError(f"{QUESTION_FILE}: {image} has {len(members)} questions, each image needs two")
        subtask, labels = name_subtask(image), read_labels(folder, image)
        pair = judged.setdefault(image, [])
        for question in members:
            text, label = find_label(labels, question)
            key, right = Mme.key(question), label.lower()
            if key in answers:
                said = parse_answer(answers[key]["text"])
                points = float(said == right)
                verdict = Verdict(key, answers[key]["text"], right, points, parsed=said, category=subtask)
                pair.append((text, label, verdict))
    return judged


def name_subtask(image: str) -> str:
    """Return the subtask of an image such as `artwork/images/1.jpg` or `count/1.jpg`."""
    subtask = image.split("/")[0]
    if subtask not in PERCEPTION + COGNITION:
        raise InputError(f"{QUESTION_FILE}: {image} belongs to no subtask; known: {', '.join(PERCEPTION + COGNITION)}")
    return subtask


def read_labels(folder: Path, image: str) -> dict[str, str]:
    subtask, name = name_subtask(image), f"{PurePosixPath(image).stem}.txt"
    apart = folder / subtask / LABEL_SUBFOLDER / name
    path = apart if apart.is_file() else folder / subtask / name
    labels = {}
    for number, line in read_lines(path, DOWNLOAD_HINT):
        question, tab, label = line.strip().partition("\t")
        if not tab or label.strip().lower() not in (YES, NO):
            raise InputError(f"{path} line {number}: a question, a tab and Yes or No are needed")
        labels[question] = label.strip()
    return labels


def find_label(labels: Mapping[str, str], question: Question) -> tuple[str, str]:
    """Return a question as its label file has it, and its label."""
    asked = question.prompt.replace(SHORT_ANSWER_LINE.strip(), "").strip()
    for suffix in LABEL_SUFFIXES:
        if asked + suffix in labels:
            return asked + suffix, labels[asked + suffix]
    raise InputError(
        f'{QUESTION_FILE}: {question.id} asks "{asked}", which its label file does not have; take {QUESTION_FILE} and '
        f"{DATA_FOLDER} from the same version"
    )


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


def join_pair(image: str, pair: Sequence[Verdict]) -> Verdict:
    return Verdict(
        key=image,
        prediction=" | ".join(each.prediction for each in pair),
        reference=" | ".join(str(each.reference) for each in pair),
        points=float(all(each.correct for each in pair)),
        parsed=" | ".join(str(each.parsed) for each in pair),
        category=pair[0].category,
        unit="pair",
        details={"question_keys": [each.key for each in pair]},
    )


def score_subtasks(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Score each subtask, by name.

    Returns:
        `acc` of the questions and `acc_plus` of the images (both right) as fractions, `score` in points of 200, the
        number of answers that are neither yes nor no, and how many questions and images there are.
    """
    subtasks = {}
    for subtask, members in collect((str(verdict.category), verdict) for verdict in verdicts).items():
        units = collect((verdict.unit, verdict) for verdict in members)
        acc, acc_plus = (fmean(each.points for each in units[unit]) for unit in ("question", "pair"))
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
    return sum(subtasks[name]["score"] for name in names if name in subtasks)
