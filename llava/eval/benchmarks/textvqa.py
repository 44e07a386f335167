"""TextVQA: questions about text in images, each answered by ten people, on the validation split.

Files: `llava_textvqa_val_v051_ocr.jsonl` (questions, with the tokens that an OCR system read in the image),
`TextVQA_0.5.1_val.json` (answers), `train_images/`. A question's id is that of its image and repeats; the annotation of
an answer is found by this id and the question within its prompt. Source of the rules: LLaVA `eval_textvqa.py` over
facebookresearch/mmf `m4c_evaluators.py`.

On the hub: the `ocr_tokens` of lmms-lab/textvqa make the reference line of LLaVA's prompts. LLaVA's file was made with
tokens of the same OCR system; a few of its lines are in another order, which the dataset does not record.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import from_eval_zip, load_question_file, read_document, take, take_strings
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubTable, Layout, ReadTable, question_line, safe_name
from llava.eval.metrics.means import COUNT, POINTS
from llava.eval.metrics.vqa_accuracy import grade_textvqa, rank_references, round_half_even
from llava.eval.metrics.vqa_text import normalize_m4c

QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
IMAGE_FOLDER = "train_images"
NUM_REFERENCES = 10

OCR_LINE_START = "Reference OCR token:"
OLD_PROMPT_START = "OCR tokens: "
OLD_QUESTION = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


# --------------------------------------------------------------------------------------------------------------- hub
ANNOTATION_COLUMNS = ("question", "image_id", "answers", "question_id")


def convert_val(read_table: ReadTable, layout: Layout) -> None:
    """Write the validation split."""
    questions, annotations = [], []
    for row in read_table("questions"):
        image = f"{safe_name(row['image_id'], 'questions')}.jpg"
        layout.save_image(f"{IMAGE_FOLDER}/{image}", row["image"])
        annotations.append({name: cell for name, cell in row.items() if name not in ("image", "ocr_tokens")})
        tokens = ", ".join(row["ocr_tokens"] or [])
        text = f"{row['question'].capitalize()}\n{OCR_LINE_START} {tokens}{SHORT_ANSWER_LINE}"
        questions.append(question_line(row["image_id"], image, text))
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    layout.write_json(ANNOTATION_FILE, {**head, "data": annotations})
    layout.write_lines(QUESTION_FILE, questions)


VAL_FORM = HubForm(
    "lmms-lab/textvqa",
    {"questions": HubTable("validation", (*ANNOTATION_COLUMNS, "image", "ocr_tokens"))},
    (QUESTION_FILE, ANNOTATION_FILE),
    convert_val,
)


# --------------------------------------------------------------------------------------------------------- downloads
TEXTVQA_PAGE = "https://textvqa.org/dataset/"
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    Download(
        (Place(ANNOTATION_FILE, 5_000),),
        TEXTVQA_PAGE,
        f"https://dl.fbaipublicfiles.com/textvqa/data/{ANNOTATION_FILE}",
        size=3_116_162,
    ),
    Download(
        (Place(f"{IMAGE_FOLDER}/", 25_119),),
        TEXTVQA_PAGE,
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        unpack_in="",
        size=7_072_297_970,
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
class TextVqa(Benchmark):
    """TextVQA: accuracy on val."""

    name = "textvqa"
    row = "TextVQA (Acc)"
    folders = ("textvqa",)
    hub: ClassVar[Mapping[str, HubForm]] = {"val": VAL_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"val": Extent(5_000, 3_166)}
    key_fields = ("question_id", "prompt")

    def has_ocr_hint(self, questions: Sequence[Question]) -> bool:
        return any(OCR_LINE_START in each.prompt or each.prompt.startswith(OLD_PROMPT_START) for each in questions)

    def load(self, root: Path) -> list[Question]:
        return load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        return score_textvqa(answers.values(), root / ANNOTATION_FILE)

    def combine(self, sums: Mapping[str, float]) -> float:
        """Average the points, in percent, in the order of operations of the official script."""
        return 100 * (sums[POINTS] / sums[COUNT])


def score_textvqa(rows: Iterable[Row], annotation_file: Path) -> Scores:
    """Score rows of an answers file by the official rules; each must be to an annotated question."""
    annotations = read_textvqa_answers(annotation_file)
    verdicts, lines = [], []
    for row in rows:
        question = extract_question(row.get("prompt"), row["question_id"])
        annotation = annotations.get((str(row["question_id"]), question))
        if annotation is None:
            raise InputError(f'{annotation_file} has no question "{question}" about image {row["question_id"]}')
        references, text = annotation["answers"], row["text"]
        verdict = Verdict(
            key=row_key(row, TextVqa.key_fields),
            prediction=text,
            reference=rank_references(references),
            points=grade_textvqa(text, references),
            parsed=normalize_m4c(text),
        )
        ids = {name: annotation[name] for name in ("question_id", "image_id")}
        lines.append({**ids, "score": verdict.points, "processed": verdict.parsed})
        verdicts.append(verdict)
    if not verdicts:
        raise InputError("textvqa: none of the questions has an answer")
    accuracy = TextVqa().headline(verdicts)
    scores = {
        "accuracy": round_half_even(accuracy),
        "accuracy_unrounded": accuracy,
        "per_answer_line": lines,
    }
    return TextVqa().sum_up(verdicts, scores, {"Accuracy": accuracy})


def extract_question(prompt: object, identity: int | str) -> str:
    """Return the question within a prompt, in lower case.

    Args:
        prompt: the `prompt` column of an answer: two lines (question, how to answer), or three with a line of OCR
            tokens before or after the question, or the single line of older LLaVA versions.
        identity: the answer's `question_id`, for the message.
    """
    text = prompt if isinstance(prompt, str) else ""
    lines = text.split("\n")
    if text.startswith(OLD_PROMPT_START):
        match = OLD_QUESTION.search(text)
        question = match.group(1) if match else None
    elif f"{OCR_LINE_START} " in text and len(lines) == 3:
        question = lines[1] if text.startswith(OCR_LINE_START) else lines[0]
    else:
        question = lines[0] if len(lines) == 2 else None
    if question is None:
        raise InputError(f"textvqa: the prompt of answer {identity} is none of TextVQA's: {prompt!r}")
    return question.lower()


def read_textvqa_answers(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Read the official annotations by image id and question in lower case; each has ten answers."""
    annotations = {}
    for number, record in enumerate(take(read_document(path), "data", list, str(path))):
        where = f"{path} question {number}"
        if len(take_strings(record, "answers", where)) != NUM_REFERENCES:
            raise InputError(f'{where}: "answers" must be a list of {NUM_REFERENCES} strings')
        take(record, "question_id", int, where)
        annotations[take(record, "image_id", str, where), take(record, "question", str, where).lower()] = record
    return annotations
