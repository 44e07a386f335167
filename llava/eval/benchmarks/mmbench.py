"""MMBench: multiple choice, each question asked with its options in several orders; right only if right in all.

File: one tab-separated table with the images inside as base64: `mmbench_dev_20230712.tsv` (LLaVA's, taken first where
both are there), `mmbench_dev_en_20231003.tsv` (TRIM's), or another one of the same columns with `--split NAME`. Row
`index + k * 1000000` is row `index` with its options rotated; for a table without such rows `--split all-rounds` makes
them. Sources of the rules: LLaVA's `model_vqa_mmbench.py` (prompts) and `convert_mmbench_for_submission.py`,
VLMEvalKit, open-compass/opencompass `tools/eval_mmbench.py`.

The headline is CircularEval with exact matching (VLMEvalKit's rule, no judge). With a judge, its numbers are beside it.

On the hub: the rows of the official table, rotations included. A copy without rotations (indices below a million only)
is scored as it is: each question then counts by its one row, which is the easier "vanilla" score.
"""

import base64
import binascii
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Extent, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import DOWNLOAD_HINT
from llava.eval.hub import HubForm, HubRow, HubTable, Layout, ReadTable, image_bytes
from llava.eval.metrics.choice import (
    LETTER_LINE,
    LETTERS,
    NO_MATCH,
    ChoiceRow,
    InferLetter,
    infer_letter,
    infer_letter_opencompass,
    judge_group,
)
from llava.eval.metrics.means import collect, mean_percent
from llava.eval.metrics.overlap import choose_option
from llava.files import atomic_write, parse_natural, read_text
from llava.image import EmbeddedImage
from llava.prompt import query_of

NEEDED_COLUMNS = ("index", "question", "A", "B", "image")
OPTION_LETTERS = LETTERS[:4]
ROTATION_STEP = 1_000_000
"""Rotation k of a row has the row's index plus k times this."""
MAX_REFERENCE_LENGTH = 64
"""A short `image` cell is the index of the row that has the image (VLMEvalKit's tables)."""
OPTION_ENDS = ("nan", "none")
"""Cells that end the list of options, in upper or lower case."""
ALL_ROUNDS = "all-rounds"

CATEGORY_COLUMNS = {"l2-category": ("l2-category", "L2-category"), "category": ("category",)}
EMPTY_PREDICTION = "nan"
"""What an empty cell of the upload is to the scripts that score it."""
UNREAD = "?"
"""In a verdict: no letter could be read."""
JUDGE_TRIES = 3
JUDGE_MAX_TOKENS = 128

UNSENT_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category", "L2-category")
"""Columns of the table that the upload leaves out."""
PREDICTION_COLUMN = 6
"""Place of the predictions in the upload, counted from 0."""
NO_TIME = datetime.datetime(1980, 1, 1)
"""Instead of the time of writing: the earliest that a zip archive can hold."""

Cell = str | int | None


# --------------------------------------------------------------------------------------------------------------- hub
HUB_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
FURTHER_HUB_COLUMNS = ("source", "l2-category", "comment", "split")


def make_form(dataset: str, config: str | None, table: str) -> HubForm:
    """Make the form of a table: the rows of the dataset, under the official titles."""
    columns = (*HUB_COLUMNS, *FURTHER_HUB_COLUMNS)

    def convert(read_table: ReadTable, layout: Layout) -> None:
        cells = ([format_hub_cell(row, column) for column in columns] for row in read_table("rows"))
        layout.write_tsv(f"{table}.tsv", columns, cells)

    return HubForm(dataset, {"rows": HubTable("dev", HUB_COLUMNS, config)}, (f"{table}.tsv",), convert)


def format_hub_cell(row: HubRow, column: str) -> Any:
    """Return a cell of the table; absent options and hints are empty, as in the official table."""
    if column == "image":
        return base64.b64encode(image_bytes(row["image"]) or b"").decode()
    # The dataset writes the second level with a capital.
    value = row.get(column, row.get("L2-category") if column == "l2-category" else None)
    absent = value is None or (isinstance(value, float) and math.isnan(value)) or value == "nan"
    return "" if absent else value


# --------------------------------------------------------------------------------------------------------- downloads
MMBENCH_PAGE = "https://github.com/open-compass/MMBench"
MMBENCH_ADDRESS = "https://download.openmmlab.com/mmclassification/datasets/mmbench"


def list_tables(*tables: str) -> tuple[Download, ...]:
    """Describe the downloads of tables, each of which is a split."""
    return tuple(
        Download((Place(f"{table}.tsv"),), MMBENCH_PAGE, f"{MMBENCH_ADDRESS}/{table}.tsv", splits=(table,))
        for table in tables
    )


# --------------------------------------------------------------------------------------------------------- benchmark
class MmBench(Benchmark):
    """MMBench, English dev: the share of questions that are right in every order of their options."""

    name = "mmbench"
    row = "MMBench (Circular)"
    folders = ("mmbench",)
    hub: ClassVar[Mapping[str, HubForm]] = {
        "mmbench_dev_20230712": make_form("lmms-lab/MMBench_EN", None, "mmbench_dev_20230712"),
        "mmbench_dev_en_20231003": make_form("lmms-lab/MMBench", "en", "mmbench_dev_en_20231003"),
    }
    downloads = list_tables("mmbench_dev_20230712", "mmbench_dev_en_20231003")
    official: ClassVar[Mapping[str, Extent]] = {
        "mmbench_dev_20230712": Extent(4_377),
        "mmbench_dev_en_20231003": Extent(4_329),
    }
    max_new_tokens = 1024
    key_fields = ("question_id", "round_id")
    uses_judge = "optional"
    judge_model = "gpt-3.5-turbo-0613"
    server = "https://mmbench.opencompass.org.cn/mmbench-submission"
    tables: ClassVar[tuple[str, ...]] = ("mmbench_dev_20230712", "mmbench_dev_en_20231003")
    letter_line: ClassVar[str] = LETTER_LINE
    headline_name = "accuracy, right in every order"

    def __init__(self, table: str | None = None, all_rounds: bool = False):
        """Choose the questions.

        Args:
            table: name of the file, without `.tsv`; None for the first of `tables` that is there.
            all_rounds: ask every row once per option, rotated by one more each time, as TRIM's script does; for tables
                without rotated rows.
        """
        self.table = table
        self.all_rounds = all_rounds

    def offline_reply(self, case: Case) -> str:
        """Choose the option whose text is most like the answer; `Z` for none."""
        return choose_option(case.prediction, case.options or {}) or NO_MATCH

    def with_split(self, split: str) -> "MmBench":
        """Return the benchmark on another table, on `all-rounds` of its own table, or on `TABLE:all-rounds`."""
        table, _, rounds = split.rpartition(":")
        if rounds != ALL_ROUNDS:
            return type(self)(split.removesuffix(".tsv"))
        return type(self)(table.removesuffix(".tsv") or None, all_rounds=True)

    def find_table(self, root: Path) -> Path:
        if self.table is not None:
            return root / f"{self.table}.tsv"
        path = root / f"{self._name_folder(root)}.tsv"
        if path.is_file():
            return path
        raise InputError(f"no {' or '.join(f'{name}.tsv' for name in self.tables)} in {root}; {DOWNLOAD_HINT}")

    def split_in(self, root: Path) -> str:
        return self.find_table(root).stem + f":{ALL_ROUNDS}" * self.all_rounds

    def place_answers(self, root: Path, run: str) -> Path:
        return root / "answers" / self._name_folder(root) / run / "merge.jsonl"

    def place_upload(self, root: Path, run: str) -> Path:
        return root / "answers_upload" / self._name_folder(root) / run

    def _name_folder(self, root: Path) -> str:
        """Return the name of the first table that is there, or could be, whatever table is asked."""
        return next((name for name in self.tables if (root / f"{name}.tsv").is_file()), self.tables[0])

    def load(self, root: Path) -> list[Question]:
        return load_table_questions(self.find_table(root), self.letter_line, self.all_rounds)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        """Score by groups; a group takes no part where an answer to one of its rows is missing."""
        table = read_table(self.find_table(root))
        if not any(row.answer for row in table):
            return None
        # 1. The rows of each question, all of them answered.
        groups = collect_groups(table, answers, self.all_rounds)
        if not groups:
            raise InputError(f"{self.name}: no question has answers to all of its rows, so none can be scored")
        # 2. CircularEval by exact matching gives the verdicts and the headline.
        exact = score_circular(groups, VLMEVALKIT)
        hits = exact["hits"]
        verdicts = [make_verdict(group, members, hits[str(group)], answers) for group, members in groups.items()]
        rows = [row for members in groups.values() for row in members]
        letters = {
            row.name: {rule.name: rule.infer(row.prediction, row.options) for rule in (VLMEVALKIT, OPENCOMPASS)}
            for row in rows
        }
        scores = {**exact, "variants": score_variants(groups), "per_row_inferred": letters}
        columns = {"Circular": exact["overall"]}
        # 3. A judge's numbers are beside it, by the rules of both scripts.
        if judge:
            scores["with_judge"] = score_circular(groups, VLMEVALKIT, self.name, judge)
            scores["opencompass_with_judge"] = score_circular(groups, OPENCOMPASS, self.name, judge)
            columns["With judge"] = scores["with_judge"]["overall"]
        return self.sum_up(verdicts, scores, columns)

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        path = self.find_table(root)
        return [write_upload(path, list(answers.values()), destination / f"{path.stem}.xlsx")]


# ------------------------------------------------------------------------------------------------------------- table
@dataclass(frozen=True)
class TableRow:
    """A row of the table.

    Attributes:
        number: place in the table, from 1.
        index: as in the table; None if it is not a whole number.
        cells: text by column; None in an empty cell.
    """

    number: int
    index: int | None
    cells: Mapping[str, str | None] = field(repr=False)

    @property
    def group(self) -> int:
        """Index of the row of which this one is a rotation."""
        return (self.index or 0) % ROTATION_STEP

    @property
    def answer(self) -> str | None:
        """Letter of the right option; None in the tables of a test split."""
        return self.cells.get("answer")

    @property
    def text(self) -> str:
        """Hint, if any, and question."""
        hint, question = self.cells.get("hint"), self.cells["question"] or ""
        return f"{hint}\n{question}" if hint and hint.lower() not in OPTION_ENDS else question

    @property
    def options(self) -> list[str]:
        """The options that are shown: those before the first empty cell."""
        shown = []
        for letter in OPTION_LETTERS:
            text = self.cells.get(letter)
            if text is None or text.lower() in OPTION_ENDS:
                break
            shown.append(text)
        return shown


def read_table(path: Path) -> list[TableRow]:
    """Read a table of MMBench, with pandas, as all scripts that score it do: which cells are empty is pandas' rule."""
    import pandas  # takes half a second, and only MMBench needs it

    # 1. The header gets empty titles: for one row with too many cells pandas would refuse the table, or drop cells.
    header, newline, body = read_text(path, DOWNLOAD_HINT).lstrip("\r\n").partition("\n")
    num_columns = header.count("\t") + 1
    widened = BytesIO((header.rstrip("\r") + "\t" * num_columns + newline + body).encode())
    try:
        frame = pandas.read_csv(widened, sep="\t", dtype=str, index_col=False, usecols=lambda title: True)
    except ValueError as error:
        raise InputError(f"{path} is not a tab-separated table ({str(error).strip()})") from None
    columns, surplus = frame.columns[:num_columns], frame.columns[num_columns:]
    lacking = [name for name in NEEDED_COLUMNS if name not in columns]
    if lacking:
        raise InputError(f"{path} is not a table of MMBench: it lacks the column {', '.join(lacking)}")
    # 2. A row without a usable index stays, for its question to be reported.
    fits = frame[surplus].isna().all(axis=1)
    table = []
    for number, (record, fit) in enumerate(zip(frame[columns].to_dict("records"), fits, strict=True), start=1):
        cells = {str(name): cell if isinstance(cell, str) else None for name, cell in record.items()}
        table.append(TableRow(number, parse_natural(cells["index"] or "") if fit else None, cells))
    # 3. Answers are found by index.
    seen: dict[int, int] = {}
    for row in table:
        if row.index is not None and seen.setdefault(row.index, row.number) != row.number:
            raise InputError(f"{path}: rows {seen[row.index]} and {row.number} share the index {row.index}")
    if not seen:
        raise InputError(f"{path} has no row with an index")
    return table


class ImageCells:
    """The images of a table, decoded when asked for. Equal cells are one image, named after its first row."""

    def __init__(self, table_name: str, table: Sequence[TableRow]):
        self._table_name = table_name
        self._cells = {row.index: row.cells["image"] for row in table}
        self._images: dict[str, EmbeddedImage] = {}

    def find(self, index: int) -> EmbeddedImage:
        """Return the image of a row; one without is refused."""
        cell = self._cells[index]
        if cell is None:
            raise InputError("the row has no image")
        if len(cell) <= MAX_REFERENCE_LENGTH and cell.isdecimal():
            index = int(cell)
            cell = self._cells.get(index)
            if cell is None:
                raise InputError(f"its image is said to be in row {index}, which has none")
        if cell not in self._images:
            try:
                content = base64.b64decode(cell)
            except (binascii.Error, ValueError) as error:
                raise InputError(f"its image is not base64 ({error})") from None
            self._images[cell] = EmbeddedImage(f"{self._table_name} row {index}", content)
        return self._images[cell]


# --------------------------------------------------------------------------------------------------------- questions
def load_table_questions(path: Path, letter_line: str | None, all_rounds: bool = False) -> list[Question]:
    """Read the questions of a table.

    Args:
        path: the table.
        letter_line: the last line, which asks for a letter; None for none.
        all_rounds: ask each row once per option.
    """
    table = read_table(path)
    images = ImageCells(path.name, table)
    return [question for row in table for question in ask_row(row, images, path.name, letter_line, all_rounds)]


def ask_row(
    row: TableRow, images: ImageCells, table_name: str, letter_line: str | None, all_rounds: bool
) -> list[Question]:
    """Make the question of a row, or one per option, with the options one step further to the left each time."""
    where = f"{table_name} row {row.number}"
    if row.index is None:
        return [Question(id=where, fault="the index is not a whole number, or there are more cells than columns")]
    try:
        if not row.options:
            raise InputError("it has no options")
        image = images.find(row.index)
    except InputError as error:
        return [Question(id=row.index, fields={"round_id": 0}, fault=f"{where}: {error}")]
    questions = []
    for round_id in range(len(row.options) if all_rounds else 1):
        options, letters = rotate(row.options, round_id), rotate(OPTION_LETTERS[: len(row.options)], round_id)
        lines = [f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options, strict=False)]
        text = "\n".join([row.text, *lines])
        questions.append(
            Question(
                id=row.index,
                prompt=f"{text}\n{letter_line}" if letter_line else text,
                query=query_of(text),
                images=(image,),
                record=text,
                category=row.cells.get("category"),
                fields={"round_id": round_id, "options": options, "option_char": letters},
            )
        )
    return questions


def rotate(items: Sequence[str], steps: int) -> list[str]:
    return [*items[steps:], *items[:steps]]


# ----------------------------------------------------------------------------------------------------------- scoring
def collect_groups(
    table: Sequence[TableRow], answers: Mapping[str, Row], all_rounds: bool = False
) -> dict[int, list[ChoiceRow]]:
    """Put the answers to the rows, and to the rounds of each row (with `all_rounds`, one per option).

    Returns:
        The rows of each group that has a base row and was answered completely, by the base row's index.
    """
    predictions = read_predictions(answers)
    groups: dict[int, list[ChoiceRow]] = {}
    # The base row has the question's category; without it there are only rotations of something unknown.
    incomplete = {row.group for row in table} - {row.index for row in table if row.index == row.group}
    for row in table:
        if row.index is None:
            incomplete.add(row.group)
            continue
        for round_id in range(max(len(row.options), 1) if all_rounds else 1):
            key = row_key({"question_id": row.index, "round_id": round_id}, MmBench.key_fields)
            if key in answers:
                shown = answers[key].get("options")
                groups.setdefault(row.group, []).append(make_choice_row(row, round_id, key, predictions[key], shown))
            else:
                incomplete.add(row.group)
    return {group: rows for group, rows in groups.items() if group not in incomplete}


def read_predictions(answers: Mapping[str, Row]) -> dict[str, str]:
    """Return predictions as the scripts that score the upload read them: `nan` where pandas takes a cell for empty."""
    if not answers:
        return {}
    import pandas  # takes half a second, and only MMBench needs it

    texts = [row["text"] for row in answers.values()]
    quoted = ('"{}"\n'.format(text.replace('"', '""')) for text in texts)
    cells = pandas.read_csv(BytesIO("".join(quoted).encode(errors="replace")), header=None, dtype=str)[0]
    predictions = (EMPTY_PREDICTION if empty else text for text, empty in zip(texts, cells.isna(), strict=True))
    return dict(zip(answers, predictions, strict=True))


def make_choice_row(
    row: TableRow, round_id: int, key: str, prediction: str, answered_options: Sequence[str] | None
) -> ChoiceRow:
    """Make a row of CircularEval; options that were rotated in a round take the right letter with them."""
    if not row.options:
        raise InputError(f"row {row.index} has an answer, but no options")
    letters = rotate(OPTION_LETTERS[: len(row.options)], round_id)
    if row.answer not in letters:
        raise InputError(f"row {row.index}: the right option is {row.answer!r}, which is not among its options")
    shown = rotate(row.options, round_id)
    if answered_options is not None and answered_options != shown:
        raise InputError(
            f"the answer to row {row.index}, round {round_id}, is about the options {answered_options}, the table has "
            f"{shown}; take the table that was asked, with --split"
        )
    options = dict(zip(OPTION_LETTERS, shown, strict=False))
    if round_id == 0:
        # What follows an empty cell is not shown, but the scorers know it.
        options = {letter: text for letter in OPTION_LETTERS if (text := row.cells.get(letter)) is not None}
    return ChoiceRow(
        name=str(row.index) if round_id == 0 else f"{row.index} round {round_id}",
        question=row.text,
        options=options,
        answer=OPTION_LETTERS[letters.index(row.answer)],
        prediction=prediction,
        is_base=row.index == row.group and round_id == 0,
        key=key,
        categories={
            name: next((cell for column in columns if (cell := row.cells.get(column))), "")
            for name, columns in CATEGORY_COLUMNS.items()
        },
    )


@dataclass(frozen=True)
class LetterRule:
    """How answers are read, and the judge's letter for "none of them"."""

    name: str
    infer: InferLetter
    no_match: str


VLMEVALKIT = LetterRule("vlmevalkit", infer_letter, NO_MATCH)
OPENCOMPASS = LetterRule("opencompass", infer_letter_opencompass, "E")


def score_circular(
    groups: Mapping[int, Sequence[ChoiceRow]], rule: LetterRule, name: str = "", judge: Judge | None = None
) -> dict[str, Any]:
    """Score by CircularEval.

    Args:
        groups: the rows of each question, complete.
        rule: reads the answers.
        name: of the benchmark, for the judge.
        judge: settles what the rule cannot read; without one such a row is wrong.

    Returns:
        Percent `overall` and by category, and `hits` by question, 1 or 0; with a judge the rows that it was asked for.
    """

    # 1. Each question is right in all orders of its options, or wrong. A judge reads several questions at a time.
    def settle(row: ChoiceRow) -> str | None:
        return ask_for_letter(row, rule, name, judge) if judge else None

    def judge_rows(rows: Sequence[ChoiceRow]) -> tuple[bool, list[str]]:
        return judge_group(rows, rule.infer, settle if judge else None)

    outcomes = judge.map(judge_rows, list(groups.values())) if judge else list(map(judge_rows, groups.values()))
    hits = {group: int(is_right) for group, (is_right, _) in zip(groups, outcomes, strict=True)}
    # 2. A question is in the categories of its base row.
    base_rows = {group: next(row for row in rows if row.is_base) for group, rows in groups.items()}
    scores: dict[str, Any] = {"overall": mean_percent(hits.values())}
    for system in CATEGORY_COLUMNS:
        members = collect((row.categories[system], hits[group]) for group, row in base_rows.items())
        scores[system] = {category: mean_percent(members[category]) for category in sorted(members)}
    scores["hits"] = {str(group): hit for group, hit in sorted(hits.items())}
    if judge:
        scores["rows_sent_to_judge"] = [row for _, judged in outcomes for row in judged]
    return scores


def make_verdict(group: int, rows: Sequence[ChoiceRow], hit: int, answers: Mapping[str, Row]) -> Verdict:
    """Make the verdict of a question: its rows, the base row first, joined by " | "."""
    ordered = sorted(rows, key=lambda row: not row.is_base)
    return Verdict(
        key=str(group),
        prediction=" | ".join(answers[row.key]["text"] for row in ordered),
        reference=" | ".join(row.answer for row in ordered),
        points=float(hit),
        parsed=" | ".join(infer_letter(row.prediction, row.options) or UNREAD for row in ordered),
        category=ordered[0].categories["category"] or None,
        unit="group",
        details={"question_keys": [row.key for row in ordered]},
    )


def score_variants(groups: Mapping[int, Sequence[ChoiceRow]]) -> dict[str, float]:
    """Return what other readings of the metric give, in percent.

    `literal_letter` takes nothing but the bare letter; `vanilla` counts rows instead of questions.
    """
    literal = {row.name: row.prediction == row.answer for rows in groups.values() for row in rows}
    matched = {
        row.name: infer_letter(row.prediction, row.options) == row.answer for rows in groups.values() for row in rows
    }
    base = [row.name for rows in groups.values() for row in rows if row.is_base]
    return {
        "literal_letter_circular": mean_percent(all(literal[row.name] for row in rows) for rows in groups.values()),
        "literal_letter_base_rows_only": mean_percent(literal[name] for name in base),
        "vanilla_base_rows_exact_matching": mean_percent(matched[name] for name in base),
        "vanilla_all_rows_exact_matching": mean_percent(matched.values()),
    }


# ------------------------------------------------------------------------------------------------------------- judge
def ask_for_letter(row: ChoiceRow, rule: LetterRule, name: str, judge: Judge) -> str | None:
    """Ask a judge which option an answer means; None if no reply could be read.

    The official scripts then draw a letter at random; here the row counts as wrong, so that a score stays the same.
    """
    options = "\n".join(f"{letter}. {text}" for letter, text in row.options.items())
    message = (
        "Below are a multiple-choice question, its options and somebody's answer. Say which option the answer means. "
        "Do not solve the question: compare the meaning of the answer with the options, even if the answer is wrong. "
        f"Reply with a single capital letter: the option's, or {rule.no_match} if the answer means none of the "
        f"options.\n\nQuestion: {row.question}\nOptions:\n{options}\n{rule.no_match}. none of the options\n\n"
        f"Answer: {row.prediction}\n\nLetter:"
    )
    case = Case(name, f"{rule.name} {row.name}", row.question, (row.answer,), row.prediction, row.options)
    for attempt in range(JUDGE_TRIES):
        reply = judge.ask(case, [{"role": "user", "content": message}], attempt=attempt, max_tokens=JUDGE_MAX_TOKENS)
        letter = rule.infer(reply, row.options)
        if letter is not None:
            return letter
    return None


# ------------------------------------------------------------------------------------------------------------ upload
def write_upload(table_file: Path, answers: Sequence[Row], path: Path) -> Path:
    """Write the workbook that MMBench's server takes: the questions of a table with the predictions.

    Of the answers of several rounds the first counts, which has the table's order of options.
    """
    table = read_table(table_file)
    columns = [name for name in table[0].cells if name not in UNSENT_COLUMNS]
    texts = {str(row["question_id"]): row["text"] for row in answers if not row.get("round_id")}
    lines: list[list[Cell]] = [list(columns)]
    lines += [[row.index if name == "index" else row.cells[name] for name in columns] for row in table]
    predictions = ["prediction", *(texts.get(str(row.index)) or None for row in table)]
    for line, prediction in zip(lines, predictions, strict=True):
        line.insert(PREDICTION_COLUMN, prediction)
    return write_workbook(path, lines)


class UndatedZip(ZipFile):
    """A zip archive without times: openpyxl stamps each entry with the time of day, and has no setting for it."""

    def writestr(self, name: str, data: bytes | str, *_: object) -> None:
        super().writestr(ZipInfo(name, NO_TIME.timetuple()[:6]), data, ZIP_DEFLATED)

    def write(self, filename: str, name: str, *_: object) -> None:
        self.writestr(name, Path(filename).read_bytes())


def write_workbook(path: Path, rows: Sequence[Sequence[Cell]]) -> Path:
    """Write an Excel workbook (`.xlsx`) of one sheet and return its path; the same rows always give the same bytes.

    The first row are the titles; None leaves a cell empty. Texts stay texts, also those that look like a formula; what
    the format cannot hold is dropped (control characters) or becomes its escape (half of a surrogate pair).
    """
    from openpyxl import Workbook  # only this function needs the library
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.writer.excel import ExcelWriter

    workbook = Workbook()
    workbook.properties.created = workbook.properties.modified = NO_TIME
    sheet = workbook.active
    sheet.title = "Sheet1"
    for number, row in enumerate(rows, start=1):
        for column, value in enumerate(row, start=1):
            if isinstance(value, str):
                # A plain assignment would guess the type from the text.
                text = ILLEGAL_CHARACTERS_RE.sub("", value).encode(errors="backslashreplace").decode()
                cell = sheet.cell(number, column, text)
                cell.data_type = "s"
            elif value is not None:
                sheet.cell(number, column, value)
    with atomic_write(path) as partial, UndatedZip(partial, "w") as archive:
        ExcelWriter(workbook, archive).save()
    return path
