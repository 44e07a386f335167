"""From answers to a result on disk: the score of one run, a verdict per question, and its line in the results file.

A result file is JSON, schema 2: the fields of `Result` at top level under their names, `verdicts` one per line, so that
`grep '"correct": false'` finds what is wrong. Files without "schema" (no verdicts) are read as well.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, ImageSource, Judge, Question, Row, Verdict, index_questions, row_key
from llava.eval.predictions import find_run_file, name_questions, pair_answers, read_answers
from llava.eval.protocol import ProtocolRecord, describe_protocol
from llava.files import (
    FileError,
    explain_errors,
    find_target,
    make_folder,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

SCHEMA = 2
OFFLINE_LABEL = " [judge: exact]"
"""Beside every number of the offline stand-in for a judge, so that it is never taken for the benchmark's."""
KINDS = {
    "task": (str, "a string"),
    "row": (str, "a string"),
    "headline": (int | float, "a number"),
    "columns": (dict, "an object"),
    "missing": (int, "a whole number"),
}
"""What a result file must have."""


class ServerOnlyError(InputError):
    """This split cannot be scored here: its annotations are not public."""


# ------------------------------------------------------------------------------------------------------------- result
@dataclass(frozen=True)
class TokenMeans:
    """Means per question with an image.

    Attributes:
        mean_tokens: tokens that the language model read.
        mean_patches: patches that the vision tower saw.
        interval: 95 % interval of `mean_tokens`, over images; None where nobody knows the images, or all questions read
            the same number.
    """

    mean_tokens: float
    mean_patches: float
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the means as JSON data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TokenMeans":
        """Make means of what `to_json` returned."""
        interval = data.get("interval")
        return cls(**{**data, "interval": None if interval is None else tuple(interval)})


@dataclass(frozen=True)
class Result:
    """The score of one run on one benchmark.

    Attributes:
        task: name of the benchmark.
        row: its label in the results file.
        headline: the number that papers print, unrounded.
        scores: every number of the official scorer.
        count: questions that were scored.
        columns: the few numbers that a table of several runs shows, by column title.
        missing: questions without an answer.
        judge: name of the judge, if one took part.
        offline_judge: the judge is the stand-in that compares texts.
        headline_judged: the judge, if there is one, gave the headline (MMBench: only a column).
        model_id: name of the checkpoint.
        tokens: means of the visual tokens; None where the answers do not have them.
        answers: the answers file.
        verdicts: one per question (or group) that was scored.
        unscored: why there is no headline, in a few words for a cell of a table; None where there is one.
        protocol: how the headline came about; None in files of versions that did not say.
        budget: the target of the run's token reduction and what met it (`llava.budgets`); None where there was none.
    """

    task: str
    row: str
    headline: float | None
    scores: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    missing: int = 0
    judge: str | None = None
    offline_judge: bool = False
    headline_judged: bool = True
    model_id: str | None = None
    tokens: TokenMeans | None = None
    answers: str | None = None
    verdicts: Sequence[Verdict] = ()
    unscored: str | None = None
    protocol: ProtocolRecord | None = None
    budget: Mapping[str, Any] | None = None

    @property
    def judge_label(self) -> str:
        """What is written beside numbers that a judge had a part in; else nothing."""
        if self.offline_judge:
            return OFFLINE_LABEL
        return f" [judge: {self.judge}]" if self.judge else ""

    @property
    def label(self) -> str:
        """What the headline compares with: its benchmark and, where a judge gave it, the judge."""
        return self.row + (self.judge_label if self.judge and self.headline_judged else "")

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON data of the present schema."""
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data["scores"], data["columns"] = dict(self.scores), dict(self.columns)
        data["tokens"] = self.tokens.to_json() if self.tokens else None
        data["verdicts"] = [dump_verdict(verdict) for verdict in self.verdicts]
        data["protocol"] = self.protocol.to_json() if self.protocol else None
        for name in ("unscored", "protocol", "budget"):
            if data[name] is None:
                del data[name]
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Result":
        """Make a result of JSON data, of this schema or of files without one.

        Args:
            data: the document.
            where: names it in the message.

        Raises:
            InputError: it is something else.
        """
        if not isinstance(data, dict) or not KINDS.keys() <= data.keys():
            raise InputError(f"{where} is not a result of `python -m llava.eval score`")
        if data.get("schema", SCHEMA) != SCHEMA:
            raise InputError(
                f"{where} has schema {data['schema']}, this version reads {SCHEMA}: score the answers again"
            )
        unscored = data["headline"] is None and isinstance(data.get("unscored"), str)
        for name, (kind, kind_name) in KINDS.items():
            if name == "headline" and unscored:
                continue
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise InputError(f'{where}: "{name}" must be {kind_name}')
        protocol = ProtocolRecord.from_json(data["protocol"], where) if data.get("protocol") is not None else None
        try:
            known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
            known["tokens"] = TokenMeans.from_json(data["tokens"]) if data.get("tokens") else None
            known["protocol"] = protocol
            known["verdicts"] = tuple(map(parse_verdict, data.get("verdicts", ())))
            return cls(**known)
        except (TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{where}: tokens or verdicts are not those of a result ({error})") from None


def dump_verdict(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON data; what is None or empty is left out, and `correct` is added."""
    data = {name: value for name, value in vars(verdict).items() if value is not None and value != {}}
    return {**data, "correct": verdict.correct}


def parse_verdict(data: Mapping[str, Any]) -> Verdict:
    """Make a verdict of what `dump_verdict` returned."""
    own = {name: value for name, value in data.items() if name != "correct"}
    reference = own["reference"]
    return Verdict(**{**own, "reference": tuple(reference) if isinstance(reference, list) else reference})


def write_result(path: Path, result: Result) -> None:
    """Write a result file, with a line per verdict."""
    data = result.to_json()
    verdicts = ",\n".join(f"  {json.dumps(verdict)}" for verdict in data.pop("verdicts"))
    head = json.dumps(data, indent=1).removesuffix("\n}")
    write_text(path, f'{head},\n "verdicts": [\n{verdicts}\n ]\n}}\n')


def read_result(path: Path) -> Result:
    """Read a result that `score --json` wrote.

    Raises:
        InputError: the file is missing or something else.
    """
    return Result.from_json(read_json(path, f"`python -m llava.eval score ... --json {path}` makes it"), str(path))


def format_line(result: Result) -> str:
    """Write a result as its `name<TAB>value` line, two digits; it names the offline judge and missing answers."""
    offline = OFFLINE_LABEL if result.offline_judge and result.headline_judged else ""
    # Not "n of m": some official scorers count a missing answer as a wrong one.
    partial = f" [{result.missing} answers missing]" if result.missing else ""
    return f"{result.row}{offline}{partial}\t{result.headline:.2f}"


def write_line(path: Path, result: Result) -> str:
    """Write the line of a result into the results file and return it.

    A file has one line per run (answers file and judge) and label: a score that is written again takes the place of its
    line, as a complete one does of one with answers missing. Other lines stay byte for byte. Which line is which run's
    is kept beside the file, in `.FILE.runs.json`; a line of nobody is taken over by its label. Several processes may
    write at once, and a line that a full disk left torn is replaced if it is the beginning of this one, else ended.

    Args:
        path: the results file; made if it is not there.
        result: a score.

    Raises:
        InputError: the file cannot be read or written.
    """
    line = format_line(result)
    with explain_errors("write", path):
        target = find_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        owners_file = target.with_name(f".{target.name}.runs.json")
        with FileLock(target.with_name(f".{target.name}.lock")):
            owners = _read_owners(owners_file)
            run = _name_run(result, target)
            lines = read_bytes(target).split(b"\n") if target.exists() else []
            torn = lines.pop() if lines else b""  # what follows the last line end: nothing in a whole file
            if torn and not line.encode().startswith(torn):
                lines.append(torn)
            place = _find_line(lines, line, owners.get(run, []), owners)
            before = lines[place].decode("utf-8", "replace") if place < len(lines) else line
            # Both are claimed, the new one first: whenever this is killed, the next write finds the one that is there.
            write_json(owners_file, {**owners, run: [line, before]})
            lines[place : place + 1] = [line.encode()]
            write_bytes(target, b"".join(each + b"\n" for each in lines))
    return line


def _name_run(result: Result, results_file: Path) -> str:
    """Name whose line it is: its answers, as seen from the results file, benchmark and judge."""
    answers = os.path.relpath(os.path.realpath(result.answers or ""), os.path.realpath(results_file.parent))
    return json.dumps([answers, result.label])


def _read_owners(file: Path) -> dict[str, list[str]]:
    """Read which run each line belongs to; nothing where nobody noted it."""
    try:
        data = read_json(file) if file.exists() else {}
    except FileError:
        return {}
    items = data.items() if isinstance(data, dict) else ()
    return {run: lines for run, lines in items if isinstance(lines, list) and all(type(line) is str for line in lines)}


def _find_line(lines: Sequence[bytes], line: str, own: Sequence[str], owners: Mapping[str, Sequence[str]]) -> int:
    """Return where a line belongs: in place of its run's own, else of nobody's of its label, else at the end."""
    texts = [each.decode("utf-8", "replace") for each in lines]
    for text in own:
        if text in texts:
            return texts.index(text)
    claimed = Counter(owned[0] for owned in owners.values() if owned)
    for place, text in enumerate(texts):
        if claimed[text]:
            claimed[text] -= 1
        elif find_label(text) == find_label(line):
            return place
    return len(lines)


def find_label(line: str) -> str:
    """Return the label of a `name<TAB>value` line without the number of missing answers."""
    return re.sub(r" \[\d+ answers missing\]$", "", line.rpartition("\t")[0])


# ------------------------------------------------------------------------------------------------------------ scoring
def score_answers(
    task: Benchmark, answers_file: Path, root: Path, allow_partial: bool = False, judge: Judge | None = None
) -> Result:
    """Score an answers file.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        allow_partial: score what is there although answers are missing.
        judge: for benchmarks that use one.

    Raises:
        InputError: answers are missing, belong to other questions, or contradict one another; there is no judge
            where one is needed.
        ServerOnlyError: the annotations of this split are not public.
    """
    questions, answers = pair_with_questions(task, answers_file, root, allow_partial)
    if judge is None and task.uses_judge == "always":
        raise InputError(f"{task.name} is scored by a judge: name one with --judge (a language model, or exact)")
    scores = task.score(answers, root, judge)
    if scores is None:
        raise ServerOnlyError(
            f"{task.name}: only {task.server or 'a server'} can score this split; "
            "`python -m llava.eval export` writes what to send there"
        )
    return Result(
        task=task.name,
        row=task.row,
        headline=scores.headline,
        scores=scores.scores,
        count=scores.count,
        columns=scores.columns,
        missing=len(questions) - len(answers),
        judge=judge.name if judge else None,
        offline_judge=judge is not None and judge.offline,
        headline_judged=task.uses_judge == "always",
        model_id=next((row.get("model_id") for row in answers.values()), None),
        tokens=average_tokens(answers.values(), name_images(questions, answers, task.key_fields, root)),
        answers=str(answers_file),
        budget=read_budget(answers_file),
        verdicts=complete_verdicts(scores.verdicts, index_questions(questions, task.key_fields), answers, root),
        protocol=describe_protocol(task, questions, root, answers_file),
    )


def describe_unscored(task: Benchmark, answers_file: Path, root: Path, reason: str) -> Result:
    """Return what is known of a run that cannot be scored, so that it keeps its place in tables.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        reason: in a few words, for a cell of a table.

    Raises:
        InputError: the answers belong to other questions, or contradict one another.
    """
    questions, answers = pair_with_questions(task, answers_file, root, allow_partial=True)
    return Result(
        task=task.name,
        row=task.row,
        headline=None,
        missing=len(questions) - len(answers),
        model_id=next((row.get("model_id") for row in answers.values()), None),
        tokens=average_tokens(answers.values(), name_images(questions, answers, task.key_fields, root)),
        answers=str(answers_file),
        budget=read_budget(answers_file),
        unscored=reason,
        protocol=describe_protocol(task, questions, root, answers_file),
    )


def complete_verdicts(
    verdicts: Iterable[Verdict], questions: Mapping[str, Question], answers: Mapping[str, Row], root: Path
) -> tuple[Verdict, ...]:
    """Fill in what the scorer does not know: image, query and number of tokens.

    Args:
        verdicts: of the scorer.
        questions: all questions by key.
        answers: rows by key.
        root: the benchmark's folder, which image paths are relative to.
    """
    completed = []
    for verdict in verdicts:
        key = base_key(verdict)
        if key in questions:
            question = questions[key]
            images = ", ".join(name_image(image, root) for image in question.images) or None
            num_tokens = count_tokens(answers.get(key, {}))[0] if images else None
            verdict = replace(verdict, image=images, query=question.query or None, num_tokens=num_tokens)
        completed.append(verdict)
    return tuple(completed)


def base_key(verdict: Verdict) -> str | None:
    """Return the key of the question that a verdict is about; of a group the first, None where it names none."""
    return verdict.key if verdict.unit == "question" else next(iter(verdict.details.get("question_keys", ())), None)


def name_image(image: ImageSource, root: Path) -> str:
    """Name an image: its path relative to the benchmark's folder, or the name of one inside another file."""
    return image.relative_to(root).as_posix() if isinstance(image, Path) and root in image.parents else str(image)


def pair_with_questions(
    task: Benchmark, answers_file: Path, root: Path, allow_partial: bool = False
) -> tuple[list[Question], dict[str, Row]]:
    """Read a benchmark's questions and the answers to them.

    Returns:
        All questions, and the row of each answered one by its key.

    Raises:
        InputError: answers are missing (unless `allow_partial`), belong to other questions, or contradict one another.
    """
    questions = task.load(root)
    answers = pair_answers(questions, read_answers(answers_file), task.key_fields)
    if not allow_partial:
        require_complete(questions, answers, task.key_fields, answers_file)
    return questions, answers


def require_complete(
    questions: Sequence[Question], answers: Mapping[str, Row], key_fields: Sequence[str], answers_file: Path
) -> None:
    """Make sure that every question has an answer.

    Raises:
        InputError: some have none; the first are named.
    """
    missing = [question for question in questions if row_key(question.head(), key_fields) not in answers]
    if missing:
        raise InputError(
            f"{answers_file} lacks {len(missing)} of {len(questions)} answers (question {name_questions(missing)}); "
            "answer them, or score what is there with `python -m llava.eval score ... --allow-partial`"
        )


def count_tokens(row: Row) -> tuple[int | None, int | None]:
    """Return the visual tokens and patches of an answer; None where it does not have them (answers of other tools)."""
    metadata = row.get("metadata")
    counts = [metadata.get(name) if isinstance(metadata, dict) else None for name in ("num_tokens", "num_patches")]
    tokens, patches = (count if type(count) is int else None for count in counts)
    return tokens, patches


def average_tokens(rows: Iterable[Row], images: Sequence[str] | None = None) -> TokenMeans | None:
    """Average the visual tokens of questions with images; None where no answer has them.

    Args:
        rows: answers.
        images: names of what each is about, for the interval; None: there is none.
    """
    rows = list(rows)
    names = [""] * len(rows) if images is None else images
    counts = [
        (name, tokens, patches)
        for name, (tokens, patches) in zip(names, map(count_tokens, rows), strict=True)
        if tokens is not None and patches
    ]
    if not counts:
        return None
    tokens, patches = (sum(column) / len(counts) for column in list(zip(*counts, strict=True))[1:])
    is_constant = len({each for _, each, _ in counts}) == 1
    return TokenMeans(tokens, patches, None if images is None or is_constant else bound_tokens(counts))


def bound_tokens(counts: Sequence[tuple[str, int, int]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean tokens, over images, of (image, tokens, patches) of each question."""
    # The one number of a score by rules that needs torch.
    from llava.eval.metrics.evidence import Sample, headline_interval

    tallies: dict[str, dict[str, float]] = {}
    for name, tokens, _ in counts:
        sums = tallies.setdefault(name, {"tokens": 0.0, "count": 0.0})
        sums["tokens"] += tokens
        sums["count"] += 1
    most = float(max(max(tokens, patches) for _, tokens, patches in counts))
    interval = headline_interval(Sample.of(tallies, lambda sums: sums["tokens"] / sums["count"], full_marks=most))
    return interval.low, interval.high


def name_images(
    questions: Sequence[Question], answers: Mapping[str, Row], key_fields: Sequence[str], root: Path
) -> list[str]:
    """Name the images that each answer is about, in the order of the answers."""
    known = index_questions(questions, key_fields)
    return [", ".join(name_image(image, root) for image in known[key].images) for key in answers]


def describe_budget(result: Result) -> str | None:
    """Say what the target of a run's token reduction came to on this benchmark; None where there was none."""
    if result.budget is None or result.tokens is None:
        return None
    line = f"{result.budget.get('asked')} ran as {result.budget.get('spec')}: {result.tokens.mean_tokens:.2f} tokens"
    if result.tokens.interval is not None:
        low, high = result.tokens.interval
        line += f" on average, 95 % [{low:.2f}, {high:.2f}]"
    calibration = result.budget.get("calibration")
    if isinstance(calibration, dict):
        split = f", {calibration['split']}" if calibration.get("split") else ""
        line += f"; {calibration.get('mean_tokens'):.2f} on {calibration.get('task')}{split}, where it was calibrated"
    return line


def read_budget(answers_file: Path) -> Mapping[str, Any] | None:
    """Return what the run of an answers file says of its token reduction's target; None where there was none."""
    try:
        budget = read_json(find_run_file(answers_file)).get("budget")
    except (FileError, AttributeError):  # answers of another tool
        return None
    return budget if isinstance(budget, dict) else None


def export_answers(
    task: Benchmark, answers_file: Path, root: Path, destination: Path, allow_partial: bool = False
) -> list[Path]:
    """Write the files that the benchmark's server or official script reads; return them.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        destination: folder for the files; made if it is not there.
        allow_partial: export what is there although answers are missing.

    Raises:
        InputError: as for `pair_with_questions`, or the benchmark has no such files, or they cannot be written.
    """
    _, answers = pair_with_questions(task, answers_file, root, allow_partial)
    return task.export(answers, root, make_folder(destination))
