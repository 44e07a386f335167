"""SEED-Bench: multiple choice on pictures and on the middle frames of videos; the headline is about the pictures.

Files: `llava-seed-bench.jsonl` (questions), `SEED-Bench.json` (right options, types), `SEED-Bench-image/`, and
`SEED-Bench-video-image/` (frames that everybody extracts for themselves). Source of the rules: LLaVA's
`convert_seed_for_submission.py` and the first `eval.py` of SEED-Bench.

Where the pictures are there and the folder of frames is not, the video questions are left out, with a word about it:
the headline does not need them. `--split all`, `image` or `video` says what to ask whatever is there.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import load_question_file, read_document, take
from llava.eval.benchmarks._hub_seed import SeedBench
from llava.eval.hub import HubForm
from llava.files import write_text

QUESTION_FILE = "llava-seed-bench.jsonl"
ANNOTATION_FILE = "SEED-Bench.json"
IMAGE_FOLDER = "SEED-Bench-image"
FRAME_FOLDER = "SEED-Bench-video-image"
UPLOAD_FILE = "seed_bench.jsonl"

IMAGE, VIDEO, ALL = "image", "video", "all"

logger = logging.getLogger(__name__)


class Seed(Benchmark):
    """SEED-Bench: accuracy on the questions about pictures."""

    name = "seed"
    row = "SEEDBench (Image)"
    folders = ("seed_bench",)
    hub: ClassVar[Mapping[str, HubForm]] = {"all": SeedBench()}
    server = "https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"

    def __init__(self, split: str | None = None):
        """Choose the questions: "image", "video", "all", or None for all whose pictures can be there."""
        self.split = split
        if split == VIDEO:
            self.row = "SEEDBench (Video)"

    def with_split(self, split: str) -> "Seed":
        """Return the benchmark with the questions about pictures, about videos, or all."""
        if split not in (IMAGE, VIDEO, ALL):
            raise InputError(f"seed has no split {split!r}; known: {IMAGE}, {VIDEO}, {ALL}")
        return Seed(split)

    def load(self, root: Path) -> list[Question]:
        """Read the questions of the split."""
        questions, num_left_out = self._choose_questions(root)
        if self.split is None and num_left_out:
            logger.warning(
                "SEED-Bench: no folder %s, so %d video questions are left out and %d about pictures stay; the headline "
                "is about these (--split all asks for every question)",
                root / FRAME_FOLDER,
                num_left_out,
                len(questions),
            )
        return questions

    def _choose_questions(self, root: Path) -> tuple[list[Question], int]:
        """Return the questions of the split, and how many others there are."""
        questions = load_question_file(root / QUESTION_FILE, root, needs_image=True)
        chosen = choose_questions(questions, self.split or choose_split(root))
        return chosen, len(questions) - len(chosen)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score by literal equality with the right letter; a question without an answer is wrong."""
        questions = [question for question in self._choose_questions(root)[0] if not question.fault]
        annotations, type_names = read_annotations(root / ANNOTATION_FILE)
        texts = {str(row["question_id"]): row["text"] for row in answers.values()}
        hits = mark_answers(annotations, [str(question.id) for question in questions], texts)
        scores = summarize_hits(hits, annotations, type_names)
        headline = f"{VIDEO if self.split == VIDEO else IMAGE}_accuracy"
        if headline not in scores:
            raise InputError(f"{root / QUESTION_FILE} has no question for the headline, {headline}")
        titles = {"image_accuracy": "Image", "video_accuracy": "Video", "total_accuracy": "All"}
        return Scores(
            headline=scores[headline],
            scores=scores,
            count=len(questions),
            columns={title: scores[name] for name, title in titles.items() if name in scores},
        )

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the leaderboard's file: all questions in its order, an empty prediction where there is no answer."""
        texts = {str(row["question_id"]): row["text"] for row in answers.values()}
        annotations, _ = read_annotations(root / ANNOTATION_FILE)
        return [write_seed_upload(destination / UPLOAD_FILE, list(annotations), texts)]


def choose_split(root: Path) -> str:
    """Leave the videos out where only the pictures are there."""
    return IMAGE if (root / IMAGE_FOLDER).is_dir() and not (root / FRAME_FOLDER).is_dir() else ALL


def choose_questions(questions: Sequence[Question], split: str) -> list[Question]:
    """Keep the questions of a split; broken records stay in every one."""
    if split == ALL:
        return list(questions)
    return [question for question in questions if question.fault or is_video(question) == (split == VIDEO)]


def is_video(question: Question) -> bool:
    """Tell a question about a video, by the folder of its picture."""
    return any(FRAME_FOLDER in Path(str(picture)).parts for picture in question.images)


def read_annotations(path: Path) -> tuple[dict[str, dict[str, Any]], dict[int, str]]:
    """Read the right options.

    Returns:
        The annotation of each question by its id, which is a string here, and the names of the types by number.

    Raises:
        InputError: the file is missing or something else.
    """
    document = read_document(path)
    type_names = {number: name for name, number in take(document, "question_type", dict, str(path)).items()}
    annotations = {}
    for number, annotation in enumerate(take(document, "questions", list, str(path)), start=1):
        where = f"{path} question {number}"
        for name, kind in (("answer", str), ("question_id", str), ("question_type_id", int)):
            take(annotation, name, kind, where)
        if take(annotation, "data_type", str, where) not in (IMAGE, VIDEO):
            raise InputError(f'{where}: "data_type" must be {IMAGE} or {VIDEO}')
        annotations[annotation["question_id"]] = annotation
    return annotations, type_names


def mark_answers(
    annotations: Mapping[str, Mapping[str, Any]], identities: Sequence[str], texts: Mapping[str, str]
) -> dict[str, bool]:
    """Tell for each question whether its answer is the right letter and nothing else.

    Args:
        annotations: by question.
        identities: the questions.
        texts: answers by question; a question without one is wrong.

    Raises:
        InputError: a question has no annotation.
    """
    unknown = [identity for identity in identities if identity not in annotations]
    if unknown:
        raise InputError(f"{ANNOTATION_FILE} lacks question {unknown[0]}; take it and {QUESTION_FILE} from one version")
    return {identity: texts.get(identity) == annotations[identity]["answer"] for identity in identities}


def summarize_hits(
    hits: Mapping[str, bool], annotations: Mapping[str, Mapping[str, Any]], type_names: Mapping[int, str]
) -> dict[str, Any]:
    """Average over pictures, videos, all, and each type of question.

    Args:
        hits: whether each question's answer is right.
        annotations: by question.
        type_names: by number.

    Returns:
        Percent and counts; no accuracy where there are no questions.
    """
    by_kind: dict[str, list[bool]] = {IMAGE: [], VIDEO: []}
    by_type: dict[int, list[bool]] = {}
    for identity, hit in hits.items():
        by_kind[annotations[identity]["data_type"]].append(hit)
        by_type.setdefault(annotations[identity]["question_type_id"], []).append(hit)
    return {
        **{f"{kind}_accuracy": average(members) for kind, members in by_kind.items() if members},
        "total_accuracy": average(list(hits.values())),
        **{f"n_{kind}": len(members) for kind, members in by_kind.items()},
        "per_type": {
            type_names.get(number, str(number)): {"accuracy": average(members), "n": len(members)}
            for number, members in sorted(by_type.items())
        },
    }


def average(hits: Sequence[bool]) -> float:
    """Return the percentage of hits; 0 of none."""
    return 100 * sum(hits) / len(hits) if hits else 0.0


def write_seed_upload(path: Path, identities: Sequence[str], texts: Mapping[str, str]) -> Path:
    """Write a file for the leaderboard.

    Args:
        path: the file.
        identities: all questions, in the order of the annotations.
        texts: answers by question.
    """
    lines = [json.dumps({"question_id": identity, "prediction": texts.get(identity, "")}) for identity in identities]
    return write_text(path, "".join(f"{line}\n" for line in lines))
