"""Answers on disk while a run goes on: written as they come, shared by workers, resumed after any kill.

Beside the answers file `FILE`, which appears when the run is over and never half,

* `FILE.run.json` says which run the answers belong to; answers of another run are never mixed in, they are moved to
  `FILE.old-1` and so on;
* `FILE.parts/<worker>.jsonl` takes the answers of one worker, appended and synced batch by batch;
* `FILE.parts/claims` is a file of locks, one byte per unit of work: a worker that holds byte i answers unit i.

The kernel drops the locks of a process however it ends, so a killed worker's units are free for the next comer and
nothing has to be cleaned up. Workers may come and go; the last one to finish writes `FILE`. The locks are POSIX
file locks: they work between processes of one machine and on network file systems that support locking.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.answers import dump_row, explain_write_errors, parse_rows, write_answers
from llava.eval.benchmark import Question, Row, row_key


class AnswerStore:
    """The answers of one run, seen from one worker.

    Use: `holds` if you like, `open`, then any of `claim`, `refresh`, `append`, then `finish`.

    Attributes:
        done: keys of the answered questions, and no more of them: memory stays flat over a long run. What other workers
            wrote is seen after `refresh`.
    """

    def __init__(self, path: Path, key_fields: Sequence[str], worker: int = 0):
        """Name the files; nothing is touched yet.

        Args:
            path: the answers file.
            key_fields: columns that together name a question.
            worker: number of this worker among those that share the questions.
        """
        self.path = path
        self.key_fields = tuple(key_fields)
        self.worker = worker
        self.done: set[str] = set()
        self._parts = path.with_name(f"{path.name}.parts")
        self._run = path.with_name(f"{path.name}.run.json")
        self._own: Any = None
        self._claims: Any = None
        self._seen: dict[Path, int] = {}
        self._merged: tuple[int, int, int] | None = None

    def holds(self, run: Mapping[str, Any]) -> bool:
        """Tell whether the answers on disk, if any, belong to this run."""
        return self._read_run() == dict(run)

    def open(self, run: Mapping[str, Any]) -> Path | None:
        """Join the run that `run` describes, or start it.

        Args:
            run: everything the answers depend on, as JSON data.

        Returns:
            Where answers of a different run were moved to, or None.

        Raises:
            InputError: a worker of the same number is at work on this file, or workers of a different run are.
        """
        with explain_write_errors(self.path), self._locked():
            moved = None if self.holds(run) else self._move_aside()
            self._parts.mkdir(exist_ok=True)
            _write_json(self._run, run)
            self._own = self._open_part()
            self._claims = (self._parts / "claims").open("a+b")
        self.refresh()
        return moved

    def claim(self, unit: int) -> bool:
        """Take a unit of work, unless another living worker has it. It stays ours until `finish`."""
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
        """Put answers on the disk: after return they survive a power cut."""
        self._own.write("".join(map(dump_row, rows)).encode())
        self._own.flush()
        os.fsync(self._own.fileno())
        self._note(rows)

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
        with self._locked():
            # Asked before the rows are read: who has left by now has written everything, so nothing can be missed. The
            # other way round, a worker that writes and leaves in between would make its answers look missing for good.
            others_at_work = self._others_at_work()
            rows = self._collect()
            missing = [question for question in asked if self._key(question) not in rows]
            if missing and others_at_work:
                return None
            write_answers(self.path, (rows[key] for key in map(self._key, questions) if key in rows))
            if not missing:
                shutil.rmtree(self._parts, ignore_errors=True)
        return missing

    def _key(self, question: Question) -> str:
        return row_key(question.head(), self.key_fields)

    def _collect(self) -> dict[str, Row]:
        """Read the rows of all workers from the disk, by key."""
        self._seen.clear()
        rows: dict[str, Row] = {}
        merged = parse_rows(self.path.read_bytes(), str(self.path)) if self.path.exists() else []
        for part in (*map(self._read_part, self._list_parts()), merged):
            for row in part:
                rows.setdefault(row_key(row, self.key_fields), row)
        return rows

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other workers from starting or ending meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _own_path(self) -> Path:
        return self._parts / f"{self.worker}.jsonl"

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
        """Take in the answers file, if there is one and it is not the one seen last."""
        if not self.path.exists():
            return
        status = self.path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version != self._merged:
            self._merged = version
            self._note(parse_rows(self.path.read_bytes(), str(self.path)))

    def _note(self, rows: Iterable[Row]) -> None:
        self.done.update(row_key(row, self.key_fields) for row in rows)

    def _read_run(self) -> dict[str, Any] | None:
        """Return what the answers on disk belong to; None where there are none or nobody knows."""
        try:
            return json.loads(self._run.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _open_part(self) -> Any:
        """Open this worker's part for appending, rid of a torn last line, and take in what it holds."""
        file = self._own_path().open("a+b")
        if not _try_lock(file):
            file.close()
            raise InputError(
                f"worker {self.worker} is already at work on {self.path}; give each its own --worker number"
            )
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        self._note(parse_rows(whole, str(self._own_path())))
        return file

    def _others_at_work(self) -> bool:
        """Tell whether another living process has a part open (asked while our own is closed)."""
        for part in self._list_parts():
            with part.open("r+b") as file:
                if not _try_lock(file):
                    return True
        return False

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


def _try_lock(file: Any) -> bool:
    """Lock a whole file against other processes; released when this one closes it (by any handle) or ends."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
