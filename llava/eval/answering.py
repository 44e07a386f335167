"""A whole run: from a checkpoint and questions to a finished answers file.

Joins or starts the run on disk, loads the model only if something is left to answer, asks, and closes the run. The
command `answer` and the published module commands are thin faces of `make_answers`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.eval.answers import explain_write_errors, name_questions
from llava.eval.benchmark import Question, index_questions, row_key
from llava.eval.runner import Fault, Settings, answer_questions
from llava.eval.store import AnswerStore
from llava.mm_utils import get_model_name_from_path

BATCH_SETTINGS = ("batch_size", "cached_images", "num_workers")
"""Settings that answers do not depend on."""


@dataclass(frozen=True)
class Checkpoint:
    """Which model answers, and how it is loaded.

    Attributes:
        path: folder or hub id.
        base: base model of a LoRA or projector-only checkpoint.
        reduce: token reduction; None: what the checkpoint's config.json says, "none": none.
        device: None: the accelerator if there is one, else the CPU.
        dtype: "float16", "bfloat16", "float32"; None: float16 on an accelerator, float32 on the CPU.
        tower_dtype: of the vision and text towers; None: float32.
        attn_implementation: of the language model; None: transformers' choice.
    """

    path: str
    base: str | None = None
    reduce: str | None = None
    device: str | None = None
    dtype: str | None = None
    tower_dtype: str | None = None
    attn_implementation: str | None = None

    @property
    def name(self) -> str:
        """The model_id of the answers file, from the path as published."""
        return get_model_name_from_path(self.path)

    def load(self) -> tuple[Any, Any, Any]:
        """Load the model: tokenizer, model, image processor."""
        from llava.model.builder import load_pretrained_model

        return load_pretrained_model(
            self.path,
            self.base,
            self.name,
            device=self.device,
            reduce=self.reduce,
            dtype=self.dtype,
            tower_dtype=self.tower_dtype,
            attn_implementation=self.attn_implementation,
        )[:3]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, seen from one worker.

    Attributes:
        faults: questions that this worker could not answer.
        missing: questions without an answer when the file was written; None if other workers are still at it.
    """

    faults: list[Fault]
    missing: list[Question] | None

    @property
    def complete(self) -> bool:
        """Whether this worker leaves nothing undone."""
        return not self.faults and not self.missing

    def describe(self, answers_file: Path) -> list[str]:
        """Say what went wrong and what was done, in lines for a person."""
        lines = [f"question {fault.question.id}: {fault.reason}" for fault in self.faults]
        if self.missing is None:
            lines.append(f"done here; another worker will finish {answers_file}")
        elif self.missing:
            lines.append(f"{answers_file} lacks {len(self.missing)} answers: question {name_questions(self.missing)}")
        return lines


def make_answers(
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    answers_file: Path,
    settings: Settings,
    key_fields: Sequence[str],
    *,
    limit: int | None = None,
    worker: int = 0,
    notify: Callable[[str], None],
) -> Outcome:
    """Answer questions into a file.

    Args:
        checkpoint: the model.
        questions: all questions of the file.
        answers_file: where the answers go.
        settings: how to ask.
        key_fields: columns that together name a question.
        limit: answer only so many, from the start.
        worker: number of this worker, where several processes share the questions.
        notify: told in one line each what a person should know while the run goes on.

    Raises:
        InputError: two questions cannot be told apart, the model cannot be loaded, or the file cannot be written or
            is in use by another worker of this number.
    """
    index_questions(questions, key_fields)
    asked = list(questions[:limit])
    with explain_write_errors(answers_file):
        answers_file.parent.mkdir(parents=True, exist_ok=True)
    run = describe_run(checkpoint, questions, settings, key_fields)
    store = AnswerStore(answers_file, key_fields, worker)
    # A run that goes on may have nothing left to do. A fresh one pushes old answers aside once its model is loaded.
    parts = None if store.holds(run) else checkpoint.load()
    moved = store.open(run)
    if moved:
        notify(f"{answers_file} held answers of a run with other settings; they are now {moved}")
    unanswered = [question for question in asked if row_key(question.head(), key_fields) not in store.done]
    if len(unanswered) < len(asked):
        notify(f"{len(asked) - len(unanswered)} of {len(asked)} questions are answered already")
    faults = [Fault(question, question.fault) for question in unanswered if question.fault]
    if len(faults) < len(unanswered):
        tokenizer, model, image_processor = parts or checkpoint.load()
        faults = answer_questions(model, tokenizer, image_processor, asked, store, settings)
    return Outcome(faults, store.finish(questions, asked))


def describe_run(
    checkpoint: Checkpoint, questions: Sequence[Question], settings: Settings, key_fields: Sequence[str]
) -> dict[str, Any]:
    """List everything the answers depend on; answers of a different list are not mixed with these."""
    asked = [
        [row_key(question.head(), key_fields), question.prompt, question.query, [path.name for path in question.images]]
        for question in questions
    ]
    device = checkpoint.device.split(":")[0] if checkpoint.device else "auto"
    return {
        **asdict(checkpoint),
        "device": device if checkpoint.dtype is None else "any",
        "weights": fingerprint_folder(checkpoint.path),
        "base_weights": fingerprint_folder(checkpoint.base) if checkpoint.base else None,
        "questions": fingerprint(json.dumps(asked)),
        **{name: value for name, value in asdict(settings).items() if name not in BATCH_SETTINGS},
    }


def fingerprint_folder(path: str) -> str | None:
    """Name the state of a checkpoint folder by its files' names, sizes and times; None for a hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return fingerprint(json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]))


def fingerprint(text: str) -> str:
    """Shorten a text to 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
