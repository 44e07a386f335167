"""The answers file and the run that writes it: answers go to disk as they come, workers share them, a kill loses none.

The file `FILE` has one JSON object per line, in question order, with LLaVA's columns: question_id, prompt, text,
answer_id, model_id, metadata, and what a benchmark adds. Rows are matched with questions by key, never by position.
`FILE` appears when the run is over and never half. Until then, beside it,

* `FILE.run.json` describes the run that the answers belong to, with the images that they are about; answers of another
  run, or about other images, are never mixed in, they are moved to `FILE.old-1` and so on;
* `FILE.parts/<worker>.jsonl` takes the answers of one worker, appended and synced batch by batch;
* `FILE.parts/claims` is a file of locks, one byte per unit of work: a worker that holds byte i answers unit i.

The kernel drops the locks of a process however it ends, so a killed worker's units are free for the next comer and
nothing has to be cleaned up. Workers may come and go; the last one to finish writes `FILE`. The locks are POSIX locks
of byte ranges (`fcntl`; a library that locks whole files cannot take the place of the claims): they work between
processes of one machine, and on network file systems that support locking. On a system without them (Windows) one
worker at a time holds the whole run.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from llava.errors import InputError
from llava.eval.benchmark import Question, Row, index_questions, row_key
from llava.files import (
    FileError,
    explain_errors,
    find_target,
    parse_json,
    read_bytes,
    read_json,
    write_json,
    write_jsonl,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ANSWER_ID_LENGTH = 22
# The alphabet of the `shortuuid` package, whose ids LLaVA's answers files have: no 0, 1, I, O, l.
ANSWER_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
MAX_NAMED_IDS = 5
PLACES = ("path", "base")
"""What `FILE.run.json` holds only to find the model again; the contents of the files count, wherever they are."""
KEPT_NAME = "model_id"
"""What a checkpoint is called does not count either; a run goes on under the name that its first answers have."""
IMAGES = "images"


# ----------------------------------------------------------------------------------------------------- the answers file
def find_run_file(answers_file: Path) -> Path:
    """Return the file beside an answers file that describes its run."""
    return answers_file.with_name(f"{answers_file.name}.run.json")


def make_row(question: Question, text: str, model_id: str, metadata: Mapping[str, object]) -> Row:
    """Make the line of one answer.

    Args:
        question: what was asked.
        text: the answer, without surrounding white space.
        model_id: name of the checkpoint.
        metadata: numbers about this answer, such as the visual tokens kept.
    """
    head = question.head()
    return {
        "question_id": head.pop("question_id"),
        "prompt": head.pop("prompt"),
        "text": text,
        **head,
        "answer_id": make_answer_id(model_id, question),
        "model_id": model_id,
        "metadata": dict(metadata),
    }


def make_answer_id(model_id: str, question: Question) -> str:
    """Make a 22-character id that looks like LLaVA's random ones, but is the same in every run.

    A run that was killed and resumed must write the same file as one that was left alone.
    """
    name = json.dumps([model_id, question.head()], sort_keys=True)
    number = uuid.uuid5(uuid.NAMESPACE_URL, name).int
    digits = []
    for _ in range(ANSWER_ID_LENGTH):
        number, digit = divmod(number, len(ANSWER_ID_ALPHABET))
        digits.append(ANSWER_ID_ALPHABET[digit])
    return "".join(reversed(digits))


def read_answers(path: Path) -> list[Row]:
    """Read an answers file, of this package or of another one that writes the same columns.

    Raises:
        InputError: there is no such file, or a line in it is broken.
    """
    return parse_rows(read_bytes(path, "`python -m llava.eval answer` makes it"), str(path))


def parse_rows(content: bytes, name: str) -> list[Row]:
    """Parse the lines of an answers file.

    A last line that is torn, as a killed writer leaves it, is ignored.

    Args:
        content: the file.
        name: how an error calls it.

    Raises:
        InputError: a line other than the last is not a JSON object with a question_id.
    """
    *lines, tail = content.split(b"\n")
    rows = [_parse_row(line, f"{name} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if tail.strip():
        try:
            rows.append(_parse_row(tail, name))
        except InputError:
            return rows
    return rows


def _parse_row(line: bytes, where: str) -> Row:
    row = parse_json(line, where)
    if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
        raise FileError(f'{where} is not an answer: a JSON object with "question_id" and "text" is needed')
    return row


def pair_answers(questions: Sequence[Question], rows: Iterable[Row], key_fields: Sequence[str]) -> dict[str, Row]:
    """Match answers with questions by key.

    A row of another tool may lack columns of the key, or write an id as text or as a number where the question file has
    the other: it belongs to the one question that all its columns fit.

    Args:
        questions: all questions of the benchmark.
        rows: answers, in any order.
        key_fields: columns that together name a question.

    Returns:
        The row of each answered question by its key; columns that the question knows and the row lacks are filled in.

    Raises:
        InputError: an answer to no question of the benchmark, or not clear to which, two different answers to the same
            one, or two questions of one key.
    """
    known = index_questions(questions, key_fields)
    loose = LooseIndex(questions, key_fields)
    paired: dict[str, Row] = {}
    for row in rows:
        key = row_key(row, key_fields)
        if key not in known:
            key = loose.find(row)
        head = known[key].head()
        row = {**head, **row, **{name: head.get(name) for name in key_fields}}
        if key in paired and paired[key]["text"] != row["text"]:
            raise InputError(f"two different answers to one question: {', '.join(key_fields)} = {key}")
        paired.setdefault(key, row)
    return paired


class LooseIndex:
    """Questions by any part of their key, with numbers and texts as one."""

    def __init__(self, questions: Sequence[Question], key_fields: Sequence[str]):
        """Take the questions; they are indexed when the first row needs it."""
        self._questions, self._key_fields = questions, key_fields
        self._by_columns: dict[tuple[str, ...], dict[tuple[str, ...], set[str]]] = {}

    def find(self, row: Mapping[str, object]) -> str:
        """Return the key of the one question that the columns of a row fit.

        Raises:
            InputError: none or several do.
        """
        columns = tuple(name for name in self._key_fields if row.get(name) is not None)
        if columns not in self._by_columns:
            index = self._by_columns[columns] = {}
            for question in self._questions:
                head = question.head()
                entry = tuple(str(head.get(name)) for name in columns)
                index.setdefault(entry, set()).add(row_key(head, self._key_fields))
        found = self._by_columns[columns].get(tuple(str(row[name]) for name in columns), set())
        if len(found) == 1:
            return next(iter(found))
        key = f"{', '.join(self._key_fields)} = {row_key(row, self._key_fields)}"
        if not found:
            raise InputError(f"an answer belongs to no question of this benchmark: {key}")
        lacking = [name for name in self._key_fields if name not in columns]
        what = f"it has no {', '.join(lacking)}" if lacking else "they have the same id"
        raise InputError(f"an answer may belong to any of {len(found)} questions, {what}: {key}")


def name_questions(questions: Sequence[Question]) -> str:
    """Name questions by id for a message; of many, the first few."""
    named = ", ".join(str(question.id) for question in questions[:MAX_NAMED_IDS])
    rest = len(questions) - MAX_NAMED_IDS
    return f"{named} and {rest} more" if rest > 0 else named


# ------------------------------------------------------------------------------------------------------ the run on disk
def check_workers(count: int) -> None:
    """Refuse several workers where the system lacks the locks by which they share the questions."""
    if fcntl is None and count > 1:
        raise InputError(f"{count} workers: this system has no locks for them to share questions; LLAVA_EVAL_WORKERS=1")


class PredictionStore:
    """The answers of one run, seen from one worker.

    Use: `open` (`holds` asks before whether the run is known), then any of `claim`, `refresh`, `append`, then `finish`.

    Attributes:
        path: the answers file; where the user named a link, what it points to.
        key_fields: columns that together name a question.
        done: keys of the answered questions, and no more of them: memory stays flat over a long run. What other workers
            wrote is seen after `refresh`.
        run: what `FILE.run.json` says, after `open`; without the images.
        changes: what the run that was moved aside by `open` had otherwise.
    """

    def __init__(self, path: Path, key_fields: Sequence[str], worker: int = 0):
        """Name the files; nothing is touched yet.

        Args:
            path: the answers file.
            key_fields: columns that together name a question.
            worker: number of this worker among those that share the questions.

        Raises:
            FileError: the path is a folder, a device or the like.
        """
        with explain_errors("write", path):
            self.path = find_target(path)
        self.key_fields = tuple(key_fields)
        self.done: set[str] = set()
        self.run: dict[str, object] = {}
        self.changes: list[str] = []
        self._worker = worker
        self._parts = self.path.with_name(f"{self.path.name}.parts")
        self._run = find_run_file(self.path)
        self._own: BinaryIO
        self._claims: BinaryIO
        self._let_others_in: Callable[[], object] = lambda: None  # see `_hold_alone`
        self._seen: dict[Path, int] = {}  # bytes read of each part
        self._merged: tuple[int, int, int] | None = None  # version of the answers file that was read last

    # Join ------------------------------------------------------------------------------------------------------
    def holds(self, run: Mapping[str, object], images: Mapping[str, str] = MappingProxyType({})) -> bool:
        """Whether the answers on disk, if any, belong to this run (see `open`)."""
        return self._compare(run, images) == []

    def open(self, run: Mapping[str, object], images: Mapping[str, str] = MappingProxyType({})) -> Path | None:
        """Join the run that `run` describes, or start it.

        Args:
            run: what all answers depend on, as JSON data; `PLACES` and `KEPT_NAME` are only noted.
            images: fingerprint of the images by question key, of those that are known. They count once a question is
                answered, so that an image that was broken and is mended costs no answers.

        Returns:
            Where answers of a different run were moved to, or None.

        Raises:
            InputError: a worker of the same number is at work on this file, or workers of a different run are; or the
                files cannot be written.
        """
        self._hold_alone()
        with explain_errors("write", self.path), self._locked():
            changes = self._compare(run, images)
            known = self._read_run() if changes == [] else {}
            moved = None if changes == [] else self._move_aside()
            self.changes = changes or []
            self.run = {**run, **{name: known[name] for name in (KEPT_NAME,) if name in known}}
            told = {**self.run, **({IMAGES: {**known.get(IMAGES, {}), **images}} if images or IMAGES in known else {})}
            self._parts.mkdir(exist_ok=True)
            if told != known:
                write_json(self._run, told)
            self._own = self._open_part()
            self._claims = (self._parts / "claims").open("a+b")
        self.refresh()
        return moved

    def _compare(self, run: Mapping[str, object], images: Mapping[str, str]) -> list[str] | None:
        """List what differs between this run and the one on disk; None where nobody knows what the answers are of."""
        known = self._read_run()
        if not known:
            return None
        names = sorted((known.keys() | run.keys()) - {*PLACES, KEPT_NAME, IMAGES})
        changes = [name for name in names if name not in known or name not in run or known[name] != run[name]]
        before = known.get(IMAGES, {})
        others = {key for key, image in images.items() if before.get(key, image) != image}
        return changes + [IMAGES] * bool(others and others & self._list_answered())

    def _read_run(self) -> dict[str, Any]:
        """Read `FILE.run.json`; empty where there is none that can be read."""
        try:
            run = read_json(self._run) if self._run.is_file() else {}
        except FileError:
            return {}
        return run if isinstance(run, dict) and isinstance(run.get(IMAGES, {}), dict) else {}

    def _list_answered(self) -> set[str]:
        """List the keys of all answers on disk."""
        parts = self._list_parts() + [self.path] * self.path.exists()
        rows = [row for part in parts for row in parse_rows(read_bytes(part), str(part))]
        return {row_key(row, self.key_fields) for row in rows}

    def _move_aside(self) -> Path | None:
        """Move files of a different run out of the way, so that nothing is lost and nothing is mixed."""
        old = [path for path in (self.path, self._run, self._parts) if path.exists()]
        if not old:
            return None
        if self._others_at_work():
            raise InputError(f"a run with other settings is at work on {self.path}; wait for it or name another file")
        taken = [path.name for path in self.path.parent.iterdir()]
        number = 1
        while any(name.startswith(f"{self.path.name}.old-{number}") for name in taken):
            number += 1
        aside = self.path.with_name(f"{self.path.name}.old-{number}")
        for path in old:
            path.rename(aside.with_name(aside.name + path.name.removeprefix(self.path.name)))
        return aside

    def _open_part(self) -> BinaryIO:
        """Open this worker's part for appending, rid of a torn last line, and take in what it holds."""
        # Unbuffered: what a full disk refuses is not written once more, nor reported once more, on closing.
        file = self._own_path().open("a+b", buffering=0)
        if not _try_lock(file):
            file.close()
            raise InputError(
                f"another process answers as worker {self._worker} of {self.path}: "
                "wait for it to end, or give this one another --worker number"
            )
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        self._note(parse_rows(whole, str(self._own_path())))
        return file

    # Work ------------------------------------------------------------------------------------------------------
    def claim(self, unit: int) -> bool:
        """Take a unit of work, unless another living worker has it. It stays ours until `finish`."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
        except OSError:
            return False
        return True

    def refresh(self) -> None:
        """Read what other workers have written since the last look."""
        own = self._own_path()
        # The own part is left alone: closing a second handle on it would drop this process's lock.
        for part in self._list_parts():
            if part != own:
                self._note(self._read_part(part))
        self._read_merged()

    def append(self, rows: Sequence[Row]) -> None:
        """Put answers on the disk: after return they survive a power cut.

        Raises:
            FileError: the disk is full, or the like.
        """
        with explain_errors("write", self._own_path()):
            content = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
            while content:
                content = content[self._own.write(content) :]
            os.fsync(self._own.fileno())
        self._note(rows)

    # Leave -----------------------------------------------------------------------------------------------------
    def finish(self, questions: Sequence[Question], asked: Sequence[Question]) -> list[Question] | None:
        """Leave the run; the last worker to leave writes the answers file.

        Args:
            questions: all that the file may hold, in its order.
            asked: those that this run was to answer, all or some of `questions`.

        Returns:
            The asked questions without an answer; None if other workers are still at it.
        """
        self._claims.close()
        self._own.close()
        with explain_errors("write", self.path), self._locked():
            # Asked before the rows are read: who has left by now has written everything, so nothing can be missed. The
            # other way round, a worker that writes and leaves in between would make its answers look missing for good.
            others_at_work = self._others_at_work()
            rows = self._collect()
            missing = [question for question in asked if self._key(question) not in rows]
            if missing and others_at_work:
                return None
            write_jsonl(self.path, (rows[key] for key in map(self._key, questions) if key in rows))
            if not missing:
                shutil.rmtree(self._parts, ignore_errors=True)
        self._let_others_in()
        return missing

    def _collect(self) -> dict[str, Row]:
        """Read the rows of all workers from the disk, by key."""
        self._seen.clear()
        rows: dict[str, Row] = {}
        merged = read_answers(self.path) if self.path.exists() else []
        for part in (*map(self._read_part, self._list_parts()), merged):
            for row in part:
                rows.setdefault(row_key(row, self.key_fields), row)
        return rows

    # Files and locks -------------------------------------------------------------------------------------------
    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other workers from starting or ending meanwhile."""
        if fcntl is None:
            yield  # there are none, see `_hold_alone`
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _hold_alone(self) -> None:
        """Without locks of byte ranges, keep every other worker out until `finish`, or until this process ends.

        Raises:
            InputError: another worker is at work on the file.
        """
        if fcntl is not None:
            return
        from filelock import FileLock, Timeout  # elsewhere nothing needs it here

        with explain_errors("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise InputError(f"a worker is already at work on {self.path}; this system allows only one") from None
        self._let_others_in = lock.release

    def _others_at_work(self) -> bool:
        """Whether another living process has a part open (asked while our own is closed)."""
        for part in self._list_parts():
            with part.open("r+b") as file:
                if not _try_lock(file):
                    return True
        return False

    def _own_path(self) -> Path:
        return self._parts / f"{self._worker}.jsonl"

    def _list_parts(self) -> list[Path]:
        return sorted(self._parts.glob("*.jsonl"))

    def _read_part(self, part: Path) -> list[Row]:
        """Return the whole lines that were appended to a part since the last look."""
        start = self._seen.get(part, 0)
        try:
            with part.open("rb") as file:
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            # Its worker found the run complete, and has just put all parts together into the answers file.
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._seen[part] = start + len(whole)
        return parse_rows(whole, str(part))

    def _read_merged(self) -> None:
        """Take in the answers file, if there is one and it is not the version seen last."""
        if not self.path.exists():
            return
        status = self.path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version != self._merged:
            self._merged = version
            self._note(read_answers(self.path))

    def _note(self, rows: Iterable[Row]) -> None:
        self.done.update(row_key(row, self.key_fields) for row in rows)

    def _key(self, question: Question) -> str:
        return row_key(question.head(), self.key_fields)


def _try_lock(file: BinaryIO) -> bool:
    """Lock a whole file against other processes; released when this one closes it (by any handle) or ends."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
