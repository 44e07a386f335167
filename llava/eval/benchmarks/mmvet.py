"""MM-Vet: free answers, graded 0 to 1 by a language model; six capabilities and their combinations.

Files: `llava-mm-vet.jsonl` (questions), `mm-vet.json` (questions, answers, capabilities), `images/`, also under a
folder `mm-vet` as the archive has them; optionally `judge_prompt.txt`, the official prompt to the judge. Source of the
rules: yuweihao/MM-Vet `mm-vet_evaluator.py`.

On the hub: lmms-lab/MMVet, all 218 questions. The dataset does not name the images that questions share: each question
has its own, under the question's name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Extent, Judge, Question, Row, Scores, Verdict
from llava.eval.benchmarks._files import from_eval_zip, load_question_file, read_document, take, take_strings
from llava.eval.hub import HubForm, HubTable, Layout, ReadTable, guess_suffix, question_line, safe_name
from llava.eval.metrics.means import collect
from llava.eval.metrics.overlap import find_elements
from llava.files import read_text, write_text

QUESTION_FILE = "llava-mm-vet.jsonl"
ANNOTATION_FILE = "mm-vet.json"
IMAGE_FOLDER = "images"
ARCHIVE_FOLDER = "mm-vet"
PROMPT_FILE = "judge_prompt.txt"
KEY_PREFIX = "v1_"

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

RETRY_SUFFIX = "\nPredict the correctness of the answer (digit): "
RETRY_TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Of the repeated questions, after a first one at 0. The last reply is not even read: it counts 0."""
MAX_CALLS = 1 + len(RETRY_TEMPERATURES)
MAX_TOKENS = 3
NUM_DIGITS = 1
"""Of the percentages but `total_unrounded`."""

OWN_PROMPT = """\
Grade how far the prediction agrees with the ground truth. Where the ground truth joins elements by <AND>, a right \
prediction has all of them; where it joins them by <OR>, one of them is enough. The grade is one of 0.0, 0.1, 0.2, \
0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 1.0, from wrong to fully right. Write nothing but the missing last field of the \
table.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers solve the equation on the board? | -2 <AND> 7 | x = 4 | 0.0
Which numbers solve the equation on the board? | -2 <AND> 7 | x = 7 | 0.5
Which numbers solve the equation on the board? | -2 <AND> 7 | x = 7 or x = 2 | 0.5
Which numbers solve the equation on the board? | -2 <AND> 7 | They are 7 and -2. | 1.0
Which numbers solve the equation on the board? | -2 <AND> 7 | 0 = (x + 2)(x - 7) | 0.5
Why is this picture funny? | Under a sign "fresh fish daily" sits a cat with fork and napkin, like a guest who has \
ordered. | A cat is sitting next to a sign in the street, which one does not see every day. | 0.3
Why is this picture funny? | Under a sign "fresh fish daily" sits a cat with fork and napkin, like a guest who has \
ordered. | The joke is that the cat waits for its fish with cutlery, as if the sign were a restaurant's. | 1.0"""
"""Built like the official prompt: an instruction, the head of a table, five rows about roots and two about a joke. The
text is ours (docs/parity.md)."""


# --------------------------------------------------------------------------------------------------------------- hub
def convert_test(read_table: ReadTable, layout: Layout) -> None:
    """Write all 218 questions."""
    questions, annotations = [], {}
    for row in read_table("questions"):
        key, text = safe_name(row["question_id"], "questions"), row["question"]
        number = key.removeprefix(KEY_PREFIX)
        if not number.isdecimal():
            raise InputError(f"MM-Vet: question_id {key!r} is not {KEY_PREFIX}<number>")
        image = f"{key}{guess_suffix(row['image'])}"
        layout.save_image(f"{IMAGE_FOLDER}/{image}", row["image"])
        annotations[key] = {
            "imagename": image,
            "question": text,
            "answer": row["answer"],
            "imagesource": row["image_source"],
            "capability": [name.strip() for name in row["capability"].split(",")],
        }
        questions.append(question_line(int(number), image, text, "conv"))
    layout.write_json(ANNOTATION_FILE, annotations)
    layout.write_lines(QUESTION_FILE, questions)


TEST_FORM = HubForm(
    "lmms-lab/MMVet",
    {"questions": HubTable("test", ("question_id", "image", "question", "answer", "image_source", "capability"))},
    (QUESTION_FILE, ANNOTATION_FILE),
    convert_test,
)


# --------------------------------------------------------------------------------------------------------- downloads
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    Download(
        (
            Place(ANNOTATION_FILE, 218, also=(f"{ARCHIVE_FOLDER}/{ANNOTATION_FILE}",)),
            Place(f"{IMAGE_FOLDER}/", 200, also=(f"{ARCHIVE_FOLDER}/{IMAGE_FOLDER}",)),
        ),
        "https://github.com/yuweihao/MM-Vet",
        "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
        unpack_in="",
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
class MmVet(Benchmark):
    """MM-Vet: the mean grade."""

    name = "mmvet"
    row = "MM-Vet"
    folders = ("mm-vet", "mmvet")
    answers_file = "answers/{run}.jsonl"
    upload_folder = "results/{run}"
    hub: ClassVar[Mapping[str, HubForm]] = {"all": TEST_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"all": Extent(218, 200)}
    max_new_tokens = 1024
    uses_judge = "always"
    headline_name = "mean grade"

    def offline_reply(self, case: Case) -> str:
        """Grade by the share of the `<AND>` elements that occur in the answer, of `<OR>` any, in tenths."""
        return f"{max(find_elements(case.prediction, reference) for reference in case.references):.1f}"

    def load(self, root: Path) -> list[Question]:
        return load_question_file(locate(root, QUESTION_FILE), locate(root, IMAGE_FOLDER), needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Let the judge grade every answer, as often as it is told to; numbers of the first run and of all runs."""
        if judge is None:
            raise InputError(f"{self.name} is scored by a judge, and none is given")
        subjects = pair_subjects(self.load(root), answers, locate(root, ANNOTATION_FILE))
        prompt = read_prompt(locate(root, PROMPT_FILE))
        grades = judge.map(
            lambda subject: [ask_grade(judge, subject, prompt, run) for run in range(judge.num_runs)], subjects
        )
        numbers = {
            f"num_run_{num_runs}": summarize(subjects, [each[:num_runs] for each in grades])
            for num_runs in sorted({1, judge.num_runs})
        }
        final = numbers[f"num_run_{judge.num_runs}"]
        verdicts = [
            Verdict(
                key=subject.question_key,
                prediction=subject.case.prediction,
                reference=subject.case.references[0],
                points=fmean(grade.score for grade in each),
                category=subject.integration,
            )
            for subject, each in zip(subjects, grades, strict=True)
        ]
        return self.sum_up(verdicts, numbers, {"Total": final["total"], **final["capability"]})

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write `<model>.json`, the file that the official evaluator (and its server) reads."""
        model_id = next((str(row.get("model_id") or "") for row in answers.values()), "")
        return [write_predictions(list(answers.values()), destination / f"{Path(model_id).name or self.name}.json")]


def locate(root: Path, name: str) -> Path:
    """Return a file or folder of the benchmark: in its folder, or where unpacking the archive there puts it."""
    unpacked = root / ARCHIVE_FOLDER / name
    return unpacked if unpacked.exists() and not (root / name).exists() else root / name


def write_predictions(rows: Sequence[Row], path: Path) -> Path:
    """Write answers as the official evaluator reads them: `{"v1_<id>": answer}`, byte for byte as LLaVA writes them."""
    predictions: dict[str, str] = {}
    for row in rows:
        key = f"{KEY_PREFIX}{row['question_id']}"
        if predictions.setdefault(key, row["text"]) != row["text"]:
            raise InputError(f"two different answers to question {row['question_id']}")
    return write_text(path, json.dumps(predictions, indent=2))


# ------------------------------------------------------------------------------------------------ what the judge sees
@dataclass(frozen=True)
class Subject:
    """A question with its annotation and answer.

    Attributes:
        question_key: `row_key` of the question.
        case: question, reference answer (elements joined by `<AND>` and `<OR>`) and prediction; its key is `v1_<id>`,
            as in the annotation and result files.
        capabilities: what it takes.
    """

    question_key: str
    case: Case
    capabilities: tuple[str, ...]

    @property
    def integration(self) -> str:
        """Name of the set of capabilities, whatever order the annotation gives them in."""
        return "_".join(sorted(self.capabilities))

    def table_row(self) -> str:
        """Return the table row that the judge is to complete."""
        truth = self.case.references[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return f"{self.case.question} | {truth} | {self.case.prediction} | "


def pair_subjects(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> list[Subject]:
    """Give each answered question its annotation, by id."""
    annotations = read_document(annotation_file)
    if not isinstance(annotations, dict):
        form = f'{{"{KEY_PREFIX}0": {{"question", ...}}, ...}}'
        raise InputError(f"{annotation_file} is no annotation file: {form} is needed")
    subjects = []
    for question_key, question, row in MmVet.pair(questions, answers):
        key = f"{KEY_PREFIX}{question.id}"
        if key not in annotations:
            raise InputError(f"{annotation_file} has no {key}; it and {QUESTION_FILE} must come from the same version")
        annotation, where = annotations[key], f"{annotation_file}, {key}"
        asked, truth = take(annotation, "question", str, where), take(annotation, "answer", str, where)
        case = Case(MmVet.name, key, asked, (truth,), row["text"])
        subjects.append(Subject(question_key, case, tuple(take_strings(annotation, "capability", where))))
    return subjects


def read_prompt(path: Path) -> str:
    """Return the user's prompt to the judge, if there is one, or ours."""
    if not path.is_file():
        return OWN_PROMPT
    prompt = read_text(path).rstrip("\n")
    if not prompt.strip():
        raise InputError(f"{path} is empty: it must hold the prompt to the judge, or not be there")
    return prompt


# ------------------------------------------------------------------------------------------------------------ grades
@dataclass(frozen=True)
class Grade:
    """What one run of the judge says about a question: its last reply up to the first space, read as 0 to 1."""

    content: str
    score: float
    num_calls: int


def ask_grade(judge: Judge, subject: Subject, prompt: str, run: int) -> Grade:
    """Grade an answer, with the official retries: reworded, hotter each time, and 0 after the last."""
    content = f"{prompt}\n{subject.table_row()}"
    for number, temperature in enumerate((0.0, *RETRY_TEMPERATURES)):
        text = content if number == 0 else content + RETRY_SUFFIX
        reply = judge.ask(
            subject.case,
            [{"role": "user", "content": text}],
            attempt=run * MAX_CALLS + number,
            temperature=temperature,
            max_tokens=MAX_TOKENS,
        )
        first = reply.split(" ")[0].strip()
        score = parse_score(first)
        if score is not None and number < MAX_CALLS - 1:
            return Grade(first, score, number + 1)
    return Grade(first, 0.0, MAX_CALLS)


def parse_score(text: str) -> float | None:
    """Read a score from 0 to 1; None for anything else."""
    try:
        score = float(text)
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def summarize(subjects: Sequence[Subject], grades: Sequence[Sequence[Grade]]) -> dict[str, Any]:
    """Compute the official numbers of questions and of their grades, one per run.

    Returns:
        `total`, `capability` and `capability_integration`: percent, means over the runs, one digit; `runs`: each run's
        total; `std`: their population standard deviation; `total_unrounded`; `grade` and `n_calls` by question.
    """
    keys = [subject.case.key for subject in subjects]
    scores = [[grade.score for grade in each] for each in grades]
    scored = list(zip(subjects, scores, strict=True))
    totals = [100 * fmean(run) for run in zip(*scores, strict=True)]
    by_capability = collect((name, each) for subject, each in scored for name in dict.fromkeys(subject.capabilities))
    by_integration = collect((subject.integration, each) for subject, each in scored)
    names = [name for name in CAPABILITIES if name in by_capability]
    names += sorted(by_capability.keys() - set(CAPABILITIES))

    def average(members: Sequence[Sequence[float]]) -> float:
        return round(fmean(100 * fmean(run) for run in zip(*members, strict=True)), NUM_DIGITS)

    return {
        "total": round(fmean(totals), NUM_DIGITS),
        "total_unrounded": fmean(totals),
        "std": round(pstdev(totals), NUM_DIGITS),
        "runs": [round(total, NUM_DIGITS) for total in totals],
        "capability": {name: average(by_capability[name]) for name in names},
        "capability_integration": {name: average(members) for name, members in by_integration.items()},
        "grade": {
            key: {"content": [grade.content for grade in each], "score": [grade.score for grade in each]}
            for key, each in zip(keys, grades, strict=True)
        },
        "n_calls": {key: sum(grade.num_calls for grade in each) for key, each in zip(keys, grades, strict=True)},
    }
