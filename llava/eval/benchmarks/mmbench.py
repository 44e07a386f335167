"""MMBench: multiple choice, each question asked with its options in several orders; right only if right in all.

File: one table, tab separated, with the pictures inside as base64: `mmbench_dev_20230712.tsv` (LLaVA; taken first where
both are there), `mmbench_dev_en_20231003.tsv` (TRIM), or another of the same columns with `--split NAME`. It holds the
rotations of each question as rows of their own; for one that does not, `--split all-rounds` makes them. Sources of the
rules: LLaVA's `convert_mmbench_for_submission.py`, VLMEvalKit, open-compass/opencompass `tools/eval_mmbench.py`.

The headline is CircularEval with exact matching (VLMEvalKit's rule, no judge). With a judge, its numbers stand beside
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Judge, Question, Row, Scores, row_key
from llava.eval.benchmarks._files import DOWNLOAD_HINT, find_file
from llava.eval.benchmarks._hub_mmbench import MMBenchEnglish, MMBenchEnglish2023October
from llava.eval.hub import HubForm
from llava.eval.metrics.choice import LETTER_LINE, NO_MATCH, InferLetter, infer_letter, infer_letter_opencompass
from llava.eval.metrics.circular import ChoiceRow, GroupVerdict, average, average_by_category, group_rows, judge_group
from llava.eval.metrics.overlap import choose_option
from llava.eval.mmbench_table import (
    LETTERS,
    MISSING_CELLS,
    TableRow,
    load_table_questions,
    read_cells,
    read_table,
    rotate,
)
from llava.eval.upload import Cell, write_workbook

CATEGORY_COLUMNS = {"l2-category": ("l2-category", "L2-category"), "category": ("category",)}
UNSENT_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category", "L2-category")
"""Columns of the table that the upload leaves out."""
PREDICTION_COLUMN = 6
"""Place of the predictions in the upload, counted from 0."""

EMPTY_PREDICTION = "nan"
"""What an empty cell of the upload is to the scripts that score it."""
ALL_ROUNDS = "all-rounds"

JUDGE_TRIES = 3
JUDGE_MAX_TOKENS = 128


class MmBench(Benchmark):
    """MMBench, English dev: the share of questions that are right in every order of their options."""

    name = "mmbench"
    row = "MMBench (Circular)"
    folders = ("mmbench",)
    hub: ClassVar[Mapping[str, HubForm]] = {
        "mmbench_dev_20230712": MMBenchEnglish(),
        "mmbench_dev_en_20231003": MMBenchEnglish2023October(),
    }
    max_new_tokens = 1024
    key_fields = ("question_id", "round_id")
    uses_judge = "optional"
    judge_model = "gpt-3.5-turbo-0613"
    server = "https://mmbench.opencompass.org.cn/mmbench-submission"
    tables: ClassVar[tuple[str, ...]] = ("mmbench_dev_20230712", "mmbench_dev_en_20231003")
    letter_line: ClassVar[str] = LETTER_LINE

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
        return choose_option(case.prediction, case.options or {}) or "Z"

    def with_split(self, split: str) -> "MmBench":
        """Return the benchmark on another table, on `all-rounds` of its own table, or on `TABLE:all-rounds`."""
        table, _, rounds = split.rpartition(":")
        if rounds != ALL_ROUNDS:
            return type(self)(split.removesuffix(".tsv"))
        return type(self)(table.removesuffix(".tsv") or None, all_rounds=True)

    def find_table(self, root: Path) -> Path:
        """Return the file of the questions.

        Raises:
            InputError: it is not there.
        """
        if self.table is not None:
            return find_file(root / f"{self.table}.tsv")
        for name in self.tables:
            if (root / f"{name}.tsv").is_file():
                return root / f"{name}.tsv"
        names = " or ".join(f"{name}.tsv" for name in self.tables)
        raise InputError(f"no {names} in {root}; {DOWNLOAD_HINT}")

    def load(self, root: Path) -> list[Question]:
        """Read the table; row by row, and within a row round by round."""
        return load_table_questions(self.find_table(root), self.letter_line, self.all_rounds)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        """Score by groups; those of which a row has no answer take no part."""
        table = read_table(self.find_table(root))
        if not any(row.answer for row in table):
            return None
        rows = collect_rows(table, answers, self.all_rounds)
        if not rows:
            raise InputError(f"{self.name}: no question has answers to all of its rows, so none can be scored")
        scores = {
            **score_circular(rows, VLMEVALKIT),
            "variants": score_variants(rows),
            "per_row_inferred": infer_rows(rows),
        }
        columns = {"Circular": scores["overall"]}
        if judge:
            scores["with_judge"] = score_circular(rows, VLMEVALKIT, self.name, judge)
            scores["opencompass_with_judge"] = score_circular(rows, OPENCOMPASS, self.name, judge)
            columns["With judge"] = scores["with_judge"]["overall"]
        return Scores(headline=scores["overall"], scores=scores, count=len(scores["hits"]), columns=columns)

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the workbook for the server, named like the table."""
        path = self.find_table(root)
        return [write_upload(path, answers.values(), destination / f"{path.stem}.xlsx")]


def collect_rows(table: Sequence[TableRow], answers: Mapping[str, Row], all_rounds: bool = False) -> list[ChoiceRow]:
    """Put the answers to the rows, and to the rounds of each row.

    Args:
        table: all rows.
        answers: rows of the answers file by question key.
        all_rounds: each row was asked once per option.

    Returns:
        The rows of all groups that have a base row and were answered completely.

    Raises:
        InputError: a row has no right option, or an answer is about other options than the table's.
    """
    rows: list[ChoiceRow] = []
    # The base row says which category a question is in; without it there are only rotations of something unknown.
    incomplete = {row.group for row in table} - {row.index for row in table if row.index == row.group}
    for row in table:
        if row.index is None or not row.options:
            incomplete.add(row.group)
            continue
        for round_id in range(len(row.options) if all_rounds else 1):
            key = row_key({"question_id": row.index, "round_id": round_id}, MmBench.key_fields)
            if key in answers:
                rows.append(make_choice_row(row, round_id, answers[key]))
            else:
                incomplete.add(row.group)
    return [row for row in rows if row.group not in incomplete]


def make_choice_row(row: TableRow, round_id: int, answer: Row) -> ChoiceRow:
    """Make a row of CircularEval; options that were rotated in a round take the right letter with them."""
    if row.answer not in LETTERS[: len(row.options)]:
        raise InputError(f"row {row.index}: the right option is {row.answer!r}, which is not among its options")
    shown = rotate(row.options, round_id)
    if answer.get("options", shown) != shown:
        raise InputError(
            f"the answer to row {row.index}, round {round_id}, is about the options {answer['options']}, the table has "
            f"{shown}; take the table that was asked, with --split"
        )
    if round_id == 0:
        # What follows an empty cell is not shown, but the scorers know it.
        options = {letter: row.cells[letter] for letter in LETTERS if letter in row.cells}
    else:
        options = dict(zip(LETTERS, shown, strict=False))
    letters = rotate(LETTERS[: len(row.options)], round_id)
    return ChoiceRow(
        name=str(row.index) if round_id == 0 else f"{row.index} round {round_id}",
        group=row.group,
        question=row.text,
        options=options,
        answer=LETTERS[letters.index(row.answer)],
        prediction=EMPTY_PREDICTION if answer["text"] in MISSING_CELLS else answer["text"],
        is_base=row.index == row.group and round_id == 0,
        categories={
            name: next((row.cells[column] for column in columns if column in row.cells), "")
            for name, columns in CATEGORY_COLUMNS.items()
        },
    )


@dataclass(frozen=True)
class LetterRule:
    """How answers are read, and what the judge is to say for "none of them"."""

    name: str
    infer: InferLetter
    no_match: str


VLMEVALKIT = LetterRule("vlmevalkit", infer_letter, NO_MATCH)
OPENCOMPASS = LetterRule("opencompass", infer_letter_opencompass, "E")


def score_circular(
    rows: Sequence[ChoiceRow], rule: LetterRule, task_name: str = "", judge: Judge | None = None
) -> dict[str, Any]:
    """Score by CircularEval.

    Args:
        rows: complete groups.
        rule: reads the answers.
        task_name: word of the benchmark, for the judge.
        judge: settles what the rule can't read; without one such a row is wrong.

    Returns:
        Percent `overall` and by category, and `hits` by question, 1 or 0; with a judge the rows that it was asked for.
    """
    groups = group_rows(rows)

    def settle(row: ChoiceRow) -> str | None:
        return ask_for_letter(row, rule, task_name, judge) if judge else None

    def judge_rows(members: Sequence[ChoiceRow]) -> GroupVerdict:
        return judge_group(members, rule.infer, settle if judge else None)

    verdicts = judge.map(judge_rows, list(groups.values())) if judge else list(map(judge_rows, groups.values()))
    hits = {group: verdict.is_right for group, verdict in zip(groups, verdicts, strict=True)}
    judged = [name for verdict in verdicts for name in verdict.judged]
    return {
        "overall": average(list(hits.values())),
        **{name: average_by_category(groups, hits, name) for name in CATEGORY_COLUMNS},
        "hits": {str(group): int(hit) for group, hit in sorted(hits.items())},
        **({"rows_sent_to_judge": judged} if judge else {}),
    }


def ask_for_letter(row: ChoiceRow, rule: LetterRule, task_name: str, judge: Judge) -> str | None:
    """Let a judge say which option an answer means.

    Returns:
        A letter, or None if no reply could be read. The published scripts draw a letter at random then; here the row
        counts as wrong, so that a score does not change from run to run.
    """
    case = Case(task_name, f"{rule.name} {row.name}", row.question, (row.answer,), row.prediction, row.options)
    message = write_judge_message(row, rule.no_match)
    for attempt in range(JUDGE_TRIES):
        reply = judge.ask(case, [{"role": "user", "content": message}], attempt=attempt, max_tokens=JUDGE_MAX_TOKENS)
        letter = rule.infer(reply, row.options)
        if letter is not None:
            return letter
    return None


def write_judge_message(row: ChoiceRow, no_match: str) -> str:
    """Write what the judge reads."""
    options = "\n".join(f"{letter}. {text}" for letter, text in row.options.items())
    return (
        "Below are a multiple-choice question, its options and somebody's answer. Say which option the answer means. "
        "Do not solve the question: compare the meaning of the answer with the options, even if the answer is wrong. "
        f"Reply with a single capital letter: the option's, or {no_match} if the answer means none of the options.\n\n"
        f"Question: {row.question}\nOptions:\n{options}\n{no_match}. none of the options\n\n"
        f"Answer: {row.prediction}\n\nLetter:"
    )


def score_variants(rows: Sequence[ChoiceRow]) -> dict[str, float]:
    """Return what other readings of the metric give, in percent.

    `literal_letter` takes nothing but the bare letter; `vanilla` counts rows instead of questions.
    """
    literal = [replace(row, prediction=row.answer if row.prediction == row.answer else "") for row in rows]
    groups = group_rows(literal)
    base = [row for row in rows if row.is_base]
    return {
        "literal_letter_circular": average([all(row.prediction for row in members) for members in groups.values()]),
        "literal_letter_base_rows_only": average([row.prediction == row.answer for row in base]),
        "vanilla_base_rows_exact_matching": average(match_rows(base)),
        "vanilla_all_rows_exact_matching": average(match_rows(rows)),
    }


def match_rows(rows: Sequence[ChoiceRow]) -> list[bool]:
    """Tell for each row by itself whether it is right, by VLMEvalKit's rule."""
    return [infer_letter(row.prediction, row.options) == row.answer for row in rows]


def infer_rows(rows: Sequence[ChoiceRow]) -> dict[str, dict[str, str | None]]:
    """Return the letter that each rule reads in each row."""
    return {
        row.name: {rule.name: rule.infer(row.prediction, row.options) for rule in (VLMEVALKIT, OPENCOMPASS)}
        for row in rows
    }


def write_upload(table_file: Path, answers: Sequence[Row], path: Path) -> Path:
    """Write the workbook that MMBench's server takes: the table's questions with the predictions.

    Args:
        table_file: the table that was asked.
        answers: rows of the answers file. Of several rounds the first counts, which has the table's order of options.
        path: the file.
    """
    columns = [name for name in next(read_cells(table_file)) if name not in UNSENT_COLUMNS]
    texts = {row["question_id"]: row["text"] for row in answers if not row.get("round_id")}
    lines: list[list[Cell]] = [insert_prediction(list(columns), "prediction")]
    for row in read_table(table_file):
        cells: list[Cell] = [row.index if name == "index" else row.cells.get(name) for name in columns]
        lines.append(insert_prediction(cells, texts.get(row.index) or None))
    return write_workbook(path, lines)


def insert_prediction(cells: list[Cell], prediction: Cell) -> list[Cell]:
    """Put the prediction in its place."""
    return [*cells[:PREDICTION_COLUMN], prediction, *cells[PREDICTION_COLUMN:]]
