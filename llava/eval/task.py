"""What a benchmark is: its questions, its scores, and the few facts that set it apart.

A benchmark is a small subclass of `Task` in `llava/eval/tasks`. It knows its files and its metric; it knows nothing
of models, batches, GPUs or result files. Nothing here needs torch.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from llava.errors import InputError
from llava.eval.judging import Judge
from llava.image import EmbeddedImage

Row = dict[str, Any]
"""One line of an answers file: question_id, prompt, text, answer_id, model_id, metadata and a benchmark's own keys."""

DEFAULT_KEY_FIELDS = ("question_id",)
Picture = Path | EmbeddedImage
"""A file, or a picture that came inside a file of the benchmark; equal pictures are encoded once."""

LOADER_MAX_NEW_TOKENS = 128
"""Answer length of the published short-answer benchmarks (VQAv2, GQA, VizWiz, TextVQA, POPE, MME, SEED)."""


@dataclass(frozen=True)
class Question:
    """One question to the model.

    Attributes:
        id: as in the question file, with its JSON type.
        prompt: what the language model reads in the user's turn, without image marks and conversation wrapper. A text
            that carries exactly one `<image>` mark per image keeps them where they stand.
        query: what the CLIP text tower reads to choose image tokens.
        images: the pictures, in order of their marks; empty for a question of text alone.
        record: the `prompt` column of the answers file, where it differs from `prompt`.
        category: the part of the benchmark it belongs to, where the question file says so.
        fields: further columns of the answers file, such as MMBench's `round_id`.
        fault: why this record cannot be asked, or None. It is reported with its id, and the others go on.
    """

    id: int | str
    prompt: str = ""
    query: str = ""
    images: tuple[Picture, ...] = ()
    record: str | None = None
    category: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    def head(self) -> Row:
        """Return the columns of the answers file that are known before the answer."""
        return {"question_id": self.id, "prompt": self.prompt if self.record is None else self.record, **self.fields}


@dataclass(frozen=True)
class Scores:
    """What a benchmark says about a set of answers.

    Attributes:
        headline: the number that papers print, unrounded; percent (MME: perception points).
        scores: every number of the official scorer, nested as is natural for the benchmark.
        count: number of questions that were scored.
        columns: the few numbers that a table of several runs shows, by column title.
    """

    headline: float
    scores: Mapping[str, Any]
    count: int
    columns: Mapping[str, float]


class Task(ABC):
    """A benchmark.

    Attributes:
        name: the word on the command line, of the script and of the file in `tasks`.
        row: the label in the results file, as published.
        max_new_tokens: length limit of an answer.
        key_fields: columns of the answers file that together name a question (ids alone repeat in some benchmarks).
        uses_judge: a language model scores the answers: "never", "optional" (it settles what a rule cannot read) or
            "always" (there is no score without one).
        server: where the files of `export` go, for a person to read; None where no server takes any.
    """

    name: ClassVar[str]
    row: ClassVar[str]
    max_new_tokens: ClassVar[int] = LOADER_MAX_NEW_TOKENS
    key_fields: ClassVar[tuple[str, ...]] = DEFAULT_KEY_FIELDS
    uses_judge: ClassVar[Literal["never", "optional", "always"]] = "never"
    server: ClassVar[str | None] = None

    def with_split(self, split: str) -> "Task":
        """Return this benchmark on another split of its data, such as VQAv2's `val2014`.

        Args:
            split: as the data's own file names have it.

        Raises:
            InputError: there is no such split; says which there are.
        """
        raise InputError(f"{self.name} has one split only: leave out --split {split}")

    @abstractmethod
    def load(self, root: Path) -> list[Question]:
        """Read the questions, in the order of the answers file.

        Args:
            root: the folder of this benchmark, such as `playground/data/eval/pope`.

        Raises:
            InputError: a file is missing, or files of the benchmark contradict one another.
        """

    @abstractmethod
    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        """Score answers by the official rules.

        Args:
            answers: rows of the answers file by question key (`row_key`); questions without an answer are absent and
                take no part in the score (the caller has refused them, or was told to allow them).
            root: the folder of this benchmark.
            judge: the language model that judges, where `uses_judge` is not "never"; always given where it is "always".

        Returns:
            None where only a server can score this split; `export` writes what it wants.
        """

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the files that the benchmark's server (or official script) reads.

        Args:
            answers: as for `score`.
            root: the folder of this benchmark.
            destination: folder for the files; it is there.

        Returns:
            The files written.

        Raises:
            InputError: this benchmark has no such file.
        """
        raise InputError(f"{self.name} has no upload file: it is scored here, with `python -m llava.eval score`")


def row_key(row: Mapping[str, Any], key_fields: Sequence[str]) -> str:
    """Name the question of a row: the same string for an answer and for its question, whatever their order.

    The JSON type of an id counts: 1 and "1" are different questions.
    """
    return json.dumps([row.get(name) for name in key_fields], ensure_ascii=False)


def index_questions(questions: Sequence[Question], key_fields: Sequence[str]) -> dict[str, Question]:
    """List questions by key.

    Raises:
        InputError: two different questions share a key, so that their answers could not be told apart.
    """
    index: dict[str, Question] = {}
    for question in questions:
        first = index.setdefault(row_key(question.head(), key_fields), question)
        if (first.prompt, first.images, first.query) != (question.prompt, question.images, question.query):
            raise InputError(f"two different questions share the id {question.id}")
    return index
