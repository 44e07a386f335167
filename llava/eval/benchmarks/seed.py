"""SEED-Bench: multiple choice on images and on the middle frames of videos; the headline is about the images.

Files: `llava-seed-bench.jsonl` (questions), `SEED-Bench.json` (right options, types), `SEED-Bench-image/`, and
`SEED-Bench-video-image/` (frames, which each user extracts from the videos). Source of the rules: LLaVA's
`convert_seed_for_submission.py` and the first `eval.py` of SEED-Bench.

Where the images are there and the folder of frames is not, the video questions are left out, with a warning: the
headline does not need them. `--split all`, `image` or `video` asks the named questions, whatever is there.

On the hub: images, and a sample of each video's frames, of which the middle one is taken. LLaVA takes the middle frame
of the video itself, so that video questions may see another image.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import from_eval_zip, load_question_file, read_document, take
from llava.eval.hub import HubForm, HubTable, Layout, ReadTable, question_line, safe_name
from llava.eval.metrics.choice import LETTER_LINE, LETTERS
from llava.eval.metrics.means import collect, mean_percent
from llava.files import write_jsonl

QUESTION_FILE = "llava-seed-bench.jsonl"
ANNOTATION_FILE = "SEED-Bench.json"
IMAGE_FOLDER = "SEED-Bench-image"
FRAME_FOLDER = "SEED-Bench-video-image"
UPLOAD_FILE = "seed_bench.jsonl"

IMAGE, VIDEO, ALL = "image", "video", "all"

OPTION_COLUMNS = {letter: f"choice_{letter.lower()}" for letter in LETTERS[:4]}
FIELDS = ("answer", *OPTION_COLUMNS.values(), "data_id", "data_type", "question", "question_id", "question_type_id")
"""Of the hub's rows, as they are in `SEED-Bench.json`."""
TYPE_NAMES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
    "Action Recognition",
    "Action Prediction",
    "Procedure Understanding",
)
"""Of types 1 to 12."""

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------- hub
def convert_test(read_table: ReadTable, layout: Layout) -> None:
    """Write all questions."""
    questions, annotations = [], []
    for row in read_table("questions"):
        identity, is_video = str(row["question_id"]), row["data_type"] == VIDEO
        # 1. The image, under LLaVA's name; those of `SEED-Bench-image` have no suffix.
        image = f"{IMAGE_FOLDER}/{safe_name(row['data_id'], 'questions')}"
        if is_video:
            image = f"{FRAME_FOLDER}/{row['question_type_id']}_{safe_name(identity, 'questions')}.png"
        frames = row["image"]
        if isinstance(frames, list):
            frames = frames[len(frames) // 2] if frames else None
        layout.save_image(image, frames)
        # 2. The annotation as it is.
        segment = {"segment": row["segment"]} if row.get("segment") else {}
        annotations.append({**{name: row[name] for name in FIELDS}, "question_id": identity, **segment})
        # 3. The line of the question file, where ids of image questions are numbers.
        options = [f"{letter}. {row[column]}" for letter, column in OPTION_COLUMNS.items()]
        text = "\n".join([row["question"], *options, LETTER_LINE])
        category = TYPE_NAMES[int(row["question_type_id"]) - 1]
        is_number = identity.isdecimal() and not is_video
        questions.append(question_line(int(identity) if is_number else identity, image, text, category))
    types = {name: number for number, name in enumerate(TYPE_NAMES, start=1)}
    layout.write_json(ANNOTATION_FILE, {"questions": annotations, "question_type": types})
    layout.write_lines(QUESTION_FILE, questions)


TEST_FORM = HubForm(
    "lmms-lab/SEED-Bench",
    {"questions": HubTable("test", (*FIELDS, "image"))},
    (QUESTION_FILE, ANNOTATION_FILE),
    convert_test,
)


# --------------------------------------------------------------------------------------------------------- downloads
SEED_ADDRESS = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench/resolve/main"
SEED_PAGE = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    Download((Place(ANNOTATION_FILE),), SEED_PAGE, f"{SEED_ADDRESS}/{ANNOTATION_FILE}"),
    Download(
        (Place(f"{IMAGE_FOLDER}/"),), SEED_PAGE, f"{SEED_ADDRESS}/{IMAGE_FOLDER}.zip", unpack_in="", splits=(IMAGE, ALL)
    ),
    Download(
        (Place(f"{FRAME_FOLDER}/", 5_009),),
        SEED_PAGE,
        by_hand="the videos of three other datasets, and the middle frame of each",
        splits=(VIDEO, ALL),
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
class Seed(Benchmark):
    """SEED-Bench: accuracy on the questions about images."""

    name = "seed"
    row = "SEEDBench (Image)"
    folders = ("seed_bench",)
    upload_folder = "answers_upload/{run}"
    hub: ClassVar[Mapping[str, HubForm]] = {"all": TEST_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {ALL: Extent(19_242), IMAGE: Extent(14_233), VIDEO: Extent(5_009)}
    server = "https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"

    def __init__(self, split: str | None = None):
        """Choose the questions: "image", "video", "all", or None for all whose images can be there."""
        self.split = split
        if split == VIDEO:
            self.row = "SEEDBench (Video)"

    def with_split(self, split: str) -> "Seed":
        if split not in (IMAGE, VIDEO, ALL):
            raise InputError(f"seed has no split {split!r}; known: {IMAGE}, {VIDEO}, {ALL}")
        return Seed(split)

    def load(self, root: Path) -> list[Question]:
        questions, num_left_out = self._choose_questions(root)
        if self.split is None and num_left_out:
            logger.warning(
                "SEED-Bench: no folder %s, so %d video questions are left out and %d about images stay; the headline "
                "is about these (--split all asks for every question)",
                root / FRAME_FOLDER,
                num_left_out,
                len(questions),
            )
        return questions

    def split_in(self, root: Path) -> str:
        images_only = (root / IMAGE_FOLDER).is_dir() and not (root / FRAME_FOLDER).is_dir()
        return self.split or (IMAGE if images_only else ALL)

    def _choose_questions(self, root: Path) -> tuple[list[Question], int]:
        """Return the questions of the split, and how many others there are; broken records are in every split."""
        questions = load_question_file(root / QUESTION_FILE, root, needs_image=True)
        split = self.split_in(root)
        chosen = [each for each in questions if split == ALL or each.fault or is_video(each) == (split == VIDEO)]
        return chosen, len(questions) - len(chosen)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score by literal equality with the right letter; a question without an answer is wrong."""
        options = read_right_options(root / ANNOTATION_FILE)
        # A broken question may have lost its id; with one it counts.
        ids = [each.id for each in self._choose_questions(root)[0] if not each.fault or str(each.id) in options]
        verdicts = judge_answers(options, ids, list_texts(answers.values()))
        if not choose_kind(verdicts, self.headline_kind):
            raise InputError(
                f"{root / QUESTION_FILE} has no question for the headline, which is about {self.headline_kind}s"
            )
        scores = summarize(verdicts)
        titles = {"image_accuracy": "Image", "video_accuracy": "Video", "total_accuracy": "All"}
        return self.sum_up(verdicts, scores, {title: scores[name] for name, title in titles.items() if name in scores})

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        """The headline is about images; that of the split `video` is about videos."""
        return super().tally(verdict) if verdict.details["kind"] == self.headline_kind else {}

    @property
    def headline_kind(self) -> str:
        return VIDEO if self.split == VIDEO else IMAGE

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the leaderboard's file: all questions in its order, an empty prediction where there is no answer."""
        identities = list(read_right_options(root / ANNOTATION_FILE))
        return [write_seed_upload(destination / UPLOAD_FILE, identities, list_texts(answers.values()))]


def is_video(question: Question) -> bool:
    """Whether a question is about a video, by the folder of its image."""
    return any(FRAME_FOLDER in Path(str(image)).parts for image in question.images)


# ----------------------------------------------------------------------------------------------------------- scoring
@dataclass(frozen=True)
class RightOption:
    """The letter of a question's right option, what the question is about (image or video), and its type."""

    answer: str
    kind: str
    type_number: int
    type_name: str


def read_right_options(path: Path) -> dict[str, RightOption]:
    """Read the right options, by question; ids are strings here."""
    document = read_document(path)
    types = take(document, "question_type", dict, str(path))
    type_names = {take(types, name, int, f"{path} question_type"): name for name in types}
    options = {}
    for number, annotation in enumerate(take(document, "questions", list, str(path)), start=1):
        where = f"{path} question {number}"
        answer, kind, identity = (take(annotation, name, str, where) for name in ("answer", "data_type", "question_id"))
        if kind not in (IMAGE, VIDEO):
            raise InputError(f'{where}: "data_type" must be {IMAGE} or {VIDEO}')
        if answer not in OPTION_COLUMNS:
            raise InputError(f'{where}: "answer" must be one of {", ".join(OPTION_COLUMNS)}, not {answer!r}')
        type_number = take(annotation, "question_type_id", int, where)
        options[identity] = RightOption(answer, kind, type_number, type_names.get(type_number, str(type_number)))
    return options


def list_texts(rows: Iterable[Row]) -> dict[str, str]:
    return {str(row["question_id"]): row["text"] for row in rows}


def judge_answers(
    options: Mapping[str, RightOption], ids: Sequence[int | str], texts: Mapping[str, str]
) -> list[Verdict]:
    """Return a verdict for each question: its answer is the right letter and nothing else, or it is wrong.

    Args:
        options: by question; each of `ids` must be there.
        ids: of the questions, as in the question file.
        texts: answers by question; a question without one is wrong.
    """
    verdicts = []
    for identity in ids:
        option = options.get(str(identity))
        if option is None:
            raise InputError(
                f"{ANNOTATION_FILE} lacks question {identity}; take it and {QUESTION_FILE} from one version"
            )
        text = texts.get(str(identity))
        verdicts.append(
            Verdict(
                key=row_key({"question_id": identity}, Seed.key_fields),
                prediction=text or "",
                reference=option.answer,
                points=float(text == option.answer),
                category=option.type_name,
                details={"kind": option.kind, "type_number": option.type_number},
            )
        )
    return verdicts


def choose_kind(verdicts: Sequence[Verdict], kind: str) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.details["kind"] == kind]


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Average over images, videos, all, and each type of question: percent and counts.

    There is no accuracy of images (or videos) where there are no questions about them.
    """
    kinds = {kind: [each.points for each in choose_kind(verdicts, kind)] for kind in (IMAGE, VIDEO)}
    ordered = sorted(verdicts, key=lambda verdict: verdict.details["type_number"])
    types = collect((str(verdict.category), verdict.points) for verdict in ordered)
    return {
        **{f"{kind}_accuracy": mean_percent(points) for kind, points in kinds.items() if points},
        "total_accuracy": mean_percent(verdict.points for verdict in verdicts),
        **{f"n_{kind}": len(points) for kind, points in kinds.items()},
        "per_type": {name: {"accuracy": mean_percent(points), "n": len(points)} for name, points in types.items()},
    }


def write_seed_upload(path: Path, identities: Sequence[str], texts: Mapping[str, str]) -> Path:
    """Write a file for the leaderboard: all questions in the order of the annotations, answered or not."""
    return write_jsonl(path, [{"question_id": name, "prediction": texts.get(name, "")} for name in identities])
