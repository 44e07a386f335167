"""What a benchmark is: its questions, its scores with a verdict per question, and the facts that set it apart.

A benchmark is one file in `llava/eval/benchmarks`: a subclass of `Benchmark`. It knows its files, prompts, metric, hub
datasets and what its judge reads; it knows nothing of models, batches, GPUs or result files. Nothing here needs torch.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from llava.download.table import Download
from llava.errors import InputError
from llava.eval.hub import HubForm
from llava.eval.metrics.means import COUNT, POINTS, collect
from llava.image import EmbeddedImage
from llava.picture import Picture

Item = TypeVar("Item")
Result = TypeVar("Result")

Row = dict[str, Any]
"""One line of an answers file: question_id, prompt, text, answer_id, model_id, metadata and a benchmark's own keys."""

ImageSource = Path | EmbeddedImage | Picture
"""An image file, an image inside a file of the benchmark, or what a Python user has; equal ones are encoded once."""

DEFAULT_KEY_FIELDS = ("question_id",)
LOADER_MAX_NEW_TOKENS = 128
"""Answer length of LLaVA's scripts for short answers (VQAv2, GQA, VizWiz, TextVQA, POPE, MME, SEED)."""
CORRECT_FROM = 0.5
"""An answer counts as correct from half of the points on."""


# ---------------------------------------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class Question:
    """One question to the model.

    Attributes:
        id: as in the question file, with its JSON type.
        prompt: the user's turn that the language model reads, without image placeholders and conversation template. A
            text that has exactly one `<image>` per image keeps them where they are.
        query: what the CLIP text tower reads to choose image tokens.
        images: the images, in order of their placeholders; empty for a question of text alone.
        record: the `prompt` column of the answers file, where it differs from `prompt`.
        category: the part of the benchmark it belongs to, where the question file names one.
        fields: further columns of the answers file, such as MMBench's `round_id`.
        fault: why this record cannot be asked, or None. It is reported with its id, and the others go on.
    """

    id: int | str
    prompt: str = ""
    query: str = ""
    images: tuple[ImageSource, ...] = ()
    record: str | None = None
    category: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    def head(self) -> Row:
        """Return the columns of the answers file that are known before the answer."""
        return {"question_id": self.id, "prompt": self.prompt if self.record is None else self.record, **self.fields}


def row_key(row: Mapping[str, Any], key_fields: Sequence[str]) -> str:
    """Name the question of a row: the same string for an answer and for its question, whatever their order.

    The JSON type of an id counts: 1 and "1" are different questions.
    """
    return json.dumps([row.get(name) for name in key_fields], ensure_ascii=False)


def index_questions(questions: Sequence[Question], key_fields: Sequence[str]) -> dict[str, Question]:
    """List questions by key; two different ones of one key are refused: their answers could not be told apart."""
    index: dict[str, Question] = {}
    for question in questions:
        first = index.setdefault(row_key(question.head(), key_fields), question)
        if (first.prompt, first.images, first.query) != (question.prompt, question.images, question.query):
            raise InputError(f"two different questions share the id {question.id}")
    return index


# ------------------------------------------------------------------------------------------------------------- scores
@dataclass(frozen=True)
class Verdict:
    """What the scorer says about one question, or about a group of questions that counts as one.

    Attributes:
        key: `row_key` of the question; of a group any string that names it.
        prediction: the model's answer as it is in the answers file; of a group the answers joined by " | ".
        reference: the reference answer; several where any of them (VQA: each of ten people) counts.
        points: what the answer is worth, a fraction in [0, 1].
        parsed: what the scorer reads in the prediction, such as "yes" or "B"; None where it compares the whole text.
        category: the part of the benchmark it belongs to.
        unit: "group" for questions that are right together or not at all (MMBench); "pair" for MME's two questions on
            an image, which count besides the questions themselves.
        details: what else the headline needs, as JSON data.
        image, query, num_tokens: the image's path in the benchmark's folder, what the CLIP text tower read, and the
            visual tokens that the language model read; filled in by `llava.eval.results`.
    """

    key: str
    prediction: str
    reference: str | tuple[str, ...]
    points: float
    parsed: str | None = None
    category: str | None = None
    unit: Literal["question", "group", "pair"] = "question"
    details: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None
    query: str | None = None
    num_tokens: int | None = None

    @property
    def correct(self) -> bool:
        return self.points >= CORRECT_FROM


@dataclass(frozen=True)
class Scores:
    """What a benchmark gives for a set of answers.

    Attributes:
        headline: the number that papers print, unrounded; percent (MME: perception points).
        scores: every number of the official scorer, nested as is natural for the benchmark.
        count: number of questions that were scored.
        columns: the few numbers that a table of several runs shows, by column title.
        verdicts: one per question (or group) that was scored; `Benchmark.headline` of them is `headline`.
    """

    headline: float
    scores: Mapping[str, Any]
    count: int
    columns: Mapping[str, float]
    verdicts: Sequence[Verdict] = ()


# -------------------------------------------------------------------------------------------------------------- judge
@dataclass(frozen=True)
class Case:
    """What is judged, in the benchmark's own terms, for judges that compute instead of reading.

    Attributes:
        task: name of the benchmark.
        key: name of the question and, where it is asked several times, of the round; cached replies are found by it.
        options: text by letter, for multiple choice.
    """

    task: str
    key: str
    question: str
    references: Sequence[str]
    prediction: str
    options: Mapping[str, str] | None = None


class Judge(Protocol):
    """A judge, safe to call from several threads.

    Attributes:
        name: the model; it is printed beside every number that depends on it.
        offline: it is the stand-in that compares texts; its numbers are not the benchmark's and are labelled.
        num_runs: how many times each answer is judged; the benchmark averages, and gives each run attempts of its own.
    """

    name: str
    offline: bool
    num_runs: int

    def ask(
        self,
        case: Case,
        messages: Sequence[Mapping[str, str]],
        *,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
    ) -> str:
        """Return the reply to a chat, from the cache if the same was asked before.

        Args:
            case: what is judged.
            messages: `role` and `content` each, as the benchmark words them.
            attempt: counts how often a case is asked (once more for each run, and for each reply that could not be
                read), so that each time has its own reply.
            temperature, max_tokens: of the reply.

        Raises:
            InputError: no reply after bounded retries; names the question and what came back.
        """

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items, several at a time, and return the results in the order of the items."""


# ---------------------------------------------------------------------------------------------------------- benchmark
class Extent(NamedTuple):
    """How much there is in the official files of a split: questions, and images that they are about (None: unknown)."""

    questions: int
    images: int | None = None


class Benchmark(ABC):
    """A benchmark.

    Attributes:
        name: on the command line, of the script, and of the file in `benchmarks`.
        row: the label in the results file.
        folders: folders under the data root that may hold its files; the first that is there is taken.
        answers_file: where its script puts the answers of the run `{run}`, under its folder.
        upload_folder: where its script puts the files of `export`; None: only where nothing but a server can score,
            beside the answers.
        max_new_tokens: length limit of an answer.
        key_fields: columns of the answers file that together name a question (ids alone repeat in some benchmarks).
        server: where the files of `export` go, for a person to read; None where no server takes any.
        uses_judge: a language model scores the answers: "never", "optional" (it settles what a rule cannot read) or
            "always" (there is no score without one).
        judge_model: the judge of the paper.
        full_marks: the headline of a run without a mistake.
        headline_name: which of its numbers the headline is.
        scorer_version: of its scoring rules; a change that can change a score raises it.
        hub: its datasets on the Hugging Face hub by split, the default one first; empty where there are none.
        downloads: what its files are fetched from; the first split that is named is the default one. Empty where the
            files are the user's own.
        official: how much the official files hold, by split.
    """

    name: ClassVar[str]
    row: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    answers_file: ClassVar[str] = "answers/{run}/merge.jsonl"
    upload_folder: ClassVar[str | None] = None
    max_new_tokens: ClassVar[int] = LOADER_MAX_NEW_TOKENS
    key_fields: ClassVar[tuple[str, ...]] = DEFAULT_KEY_FIELDS
    server: ClassVar[str | None] = None
    uses_judge: ClassVar[Literal["never", "optional", "always"]] = "never"
    judge_model: ClassVar[str] = "gpt-4-0613"
    full_marks: ClassVar[float] = 100.0
    headline_name: ClassVar[str] = "accuracy"
    scorer_version: ClassVar[int] = 1
    hub: ClassVar[Mapping[str, HubForm]] = {}
    downloads: ClassVar[tuple[Download, ...]] = ()
    official: ClassVar[Mapping[str, Extent]] = {}

    # Which questions -------------------------------------------------------------------------------------------
    def with_split(self, split: str) -> "Benchmark":
        """Return this benchmark on another split of its data, named as in its files (VQAv2: `val2014`).

        Raises:
            InputError: there is no such split; lists those there are.
        """
        raise InputError(f"{self.name} has one split only: leave out --split {split}")

    def split_in(self, root: Path) -> str:
        """Name the split, where it is not named chosen by what is in a folder."""
        return next(iter(self.hub), "all")

    def has_ocr_hint(self, questions: Sequence[Question]) -> bool | None:
        """Whether the prompts hold recognised text; None for a benchmark that never has any."""
        return None

    @abstractmethod
    def load(self, root: Path) -> list[Question]:
        """Read the questions, in the order of the answers file.

        Args:
            root: the folder of this benchmark, such as `playground/data/eval/pope`.

        Raises:
            InputError: a file is missing, or files of the benchmark contradict one another.
        """

    # What the answers are worth --------------------------------------------------------------------------------
    @classmethod
    def key(cls, question: Question) -> str:
        return row_key(question.head(), cls.key_fields)

    @classmethod
    def pair(cls, questions: Sequence[Question], answers: Mapping[str, Row]) -> list[tuple[str, Question, Row]]:
        """List the answered questions, in their order: the key, the question and the row of its answer.

        Raises:
            InputError: none is answered.
        """
        keys = [cls.key(question) for question in questions]
        pairs = [(key, each, answers[key]) for key, each in zip(keys, questions, strict=True) if key in answers]
        if not pairs:
            raise InputError(f"{cls.name}: none of the questions has an answer")
        return pairs

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

    def tally(self, verdict: Verdict) -> Mapping[str, float]:
        """Return what a verdict adds to the sums that the headline is computed from, by name.

        Nothing for a verdict that has no part in it. Of questions that count towards the same part of the headline the
        names are the same, whatever the answer.
        """
        return {POINTS: verdict.points, COUNT: 1}

    def combine(self, sums: Mapping[str, float]) -> float:
        """Compute the headline from sums of tallies; by default the mean of the points, in percent.

        The sums may be weighted: an image that is drawn twice counts twice.
        """
        return 100 * sums[POINTS] / sums[COUNT]

    def headline(self, verdicts: Sequence[Verdict]) -> float:
        """Compute the headline from verdicts alone, at least one that has a part in it."""
        amounts = collect(item for verdict in verdicts for item in self.tally(verdict).items())
        if not amounts:
            raise InputError(f"{self.name}: none of the questions has an answer")
        return self.combine({name: sum(each) for name, each in amounts.items()})

    def tally_images(self, verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
        """Sum up the tallies of each image, for `llava.eval.metrics.evidence`: by name of the image, then of the sum.

        A question without image stands for itself; images that have no part in the headline are left out.
        """
        images: dict[str, dict[str, float]] = {}
        for verdict in verdicts:
            for name, amount in self.tally(verdict).items():
                sums = images.setdefault(verdict.image or verdict.key, {})
                sums[name] = sums.get(name, 0.0) + float(amount)
        return images

    def sum_up(self, verdicts: Sequence[Verdict], scores: Mapping[str, Any], columns: Mapping[str, float]) -> Scores:
        """Return the scores of verdicts, at least one; their headline follows from them."""
        count = sum(verdict.unit != "pair" for verdict in verdicts)
        return Scores(self.headline(verdicts), scores, count, columns, verdicts)

    # Where files go --------------------------------------------------------------------------------------------
    def find_root(self, data_root: Path) -> Path:
        """Return the benchmark's folder under the data root; where none is there, the first that could be."""
        candidates = [data_root / folder for folder in self.folders]
        return next(filter(Path.is_dir, candidates), candidates[0])

    def place_answers(self, root: Path, run: str) -> Path:
        """Return where the script puts the answers of a run; benchmarks of several splits keep them apart."""
        return root / self.answers_file.format(run=run)

    def place_upload(self, root: Path, run: str) -> Path | None:
        """Return the folder where the script puts the files of `export`; see `upload_folder`."""
        return None if self.upload_folder is None else root / self.upload_folder.format(run=run)

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

    # Judge and hub ---------------------------------------------------------------------------------------------
    def offline_reply(self, case: Case) -> str:
        """Compute the reply that the offline stand-in gives instead of a judge, from the texts alone."""
        raise InputError(f"{self.name} is scored by rules: it takes no judge")

    def find_hub_form(self) -> tuple[str, HubForm]:
        """Return the split and its dataset on the hub.

        Raises:
            InputError: there is none.
        """
        named = getattr(self, "split", None) or getattr(self, "table", None)
        # Where the hub has all splits in one dataset, a benchmark's own ones only choose among its questions.
        split = named if named and len(self.hub) > 1 else next(iter(self.hub), None)
        if split not in self.hub:
            raise InputError(
                f"{self.name}: no hub dataset of split {split}; known: {', '.join(self.hub) or 'none'}; "
                "leave out --source hub and see playground/data/eval/README.md"
            )
        return split, self.hub[split]
