"""By which protocol a result was measured: what must be the same before two numbers of a benchmark may be compared.

Tables of the field mix TextVQA with and without OCR tokens in the prompt, or MME's perception points with its sum over
all subtasks. A result therefore says how its number came about, in fields that a person can read, and what compares
results refuses those that differ. What is compared may differ: checkpoint, token reduction and answers.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Question
from llava.eval.predictions import find_run_file
from llava.files import FileError, read_json
from llava.prompt import query_of

DIGITS = 12
"""Hexadecimal digits of a hash."""
COUNTED = "tokens that the language model reads"
DECODING = ("temperature", "top_p", "num_beams", "max_new_tokens")
MODEL = ("checkpoint", "base_checkpoint", "vision_tower", "reduce", "dtype", "tower_dtype", "load_8bit", "load_4bit")
"""What the record of a run (`FILE.run.json`) says of its model."""
WHOLE_PROMPT, SHORTENED_PROMPT = "the prompt", "the prompt without its last line"


@dataclass(frozen=True)
class ProtocolRecord:
    """How a result came about. None is what nobody knows; it equals anything.

    Attributes:
        benchmark, split: which questions, by name.
        ocr_hint: whether prompts hold recognised text (TextVQA); None for the benchmarks that have no such question.
        headline: which of the benchmark's numbers the headline is (MME: perception).
        template: conversation template around each prompt.
        query: which text the CLIP text tower reads.
        decoding: `DECODING` by name; `top_p` is None where the likeliest token is taken.
        scorer: version of the benchmark's scoring rules here.
        counted: what numbers of visual tokens in the result count.
        num_questions: of the split, answered or not.
        questions: hash of their keys and prompts, in any order.
        model: `MODEL` by name, what may differ between results that are compared; None or absent is unknown.
    """

    benchmark: str
    split: str | None = None
    ocr_hint: bool | None = None
    headline: str | None = None
    template: str | None = None
    query: str | None = None
    decoding: Mapping[str, Any] | None = None
    scorer: int | None = None
    counted: str | None = None
    num_questions: int | None = None
    questions: str | None = None
    model: Mapping[str, Any] | None = None

    @property
    def hash(self) -> str:
        """Short name of everything but the model: equal ones are the same protocol."""
        return hash_json(asdict(replace(self, model=None)))

    def to_json(self) -> dict[str, Any]:
        return {"hash": self.hash, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> "ProtocolRecord":
        """Read what `to_json` wrote; fields of a later version are left out.

        Raises:
            InputError: it is something else.
        """
        known = (
            {each.name: data[each.name] for each in fields(cls) if each.name in data} if isinstance(data, dict) else {}
        )
        kinds = {"decoding": dict, "model": dict, "ocr_hint": bool, "scorer": int, "num_questions": int}
        for name, value in known.items():
            if value is not None and not isinstance(value, kinds.get(name, str)):
                raise InputError(f'{where}: "protocol" has no right "{name}": {json.dumps(value):.60}')
        if not known.get("benchmark"):
            raise InputError(f'{where}: "protocol" must be an object that names its "benchmark"')
        return cls(**known)

    def list_fields(self) -> Iterator[tuple[str, Any]]:
        """List what must be the same, known fields only."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "decoding":
                yield from (value or {}).items()
            elif each.name != "model" and value is not None:
                yield each.name, value


def hash_json(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:DIGITS]


def describe_protocol(task: Benchmark, questions: Sequence[Question], root: Path, answers_file: Path) -> ProtocolRecord:
    """Describe how a benchmark's answers came about.

    Args:
        task: the benchmark.
        questions: all of its questions.
        root: its folder.
        answers_file: the answers; what the model was told beyond the questions is in `FILE.run.json`, if it is there.
    """
    run = read_run_record(answers_file)
    decoding = {name: run[name] for name in DECODING} if run.keys() >= set(DECODING) else None
    if decoding and not decoding["temperature"]:
        decoding["top_p"] = None
    return ProtocolRecord(
        benchmark=task.name,
        split=task.split_in(root),
        ocr_hint=task.has_ocr_hint(questions),
        headline=task.headline_name,
        template=run.get("conv_mode") if isinstance(run.get("conv_mode"), str) else None,
        query=None if run.get("endpoint") and not run.get("reduce") else name_query_rule(questions),
        decoding=decoding,
        scorer=task.scorer_version,
        counted=COUNTED,
        num_questions=len(questions),
        questions=hash_json(sorted([task.key(question), question.prompt] for question in questions)),
        model={name: run[name] for name in MODEL if run.get(name)} or None,
    )


def read_run_record(answers_file: Path) -> dict[str, Any]:
    """Read what is known of the run that wrote an answers file; nothing of one by another tool."""
    with suppress(FileError):
        run = read_json(find_run_file(answers_file))
        return run if isinstance(run, dict) else {}
    return {}


def name_query_rule(questions: Sequence[Question]) -> str:
    """Say which text the CLIP text tower reads, by comparing it with the prompts."""
    pairs = [(query_of(each.prompt).strip(), each.query.strip()) for each in questions if not each.fault]
    if all(query == prompt for prompt, query in pairs):
        return WHOLE_PROMPT
    if all(query == prompt.rpartition("\n")[0].strip() for prompt, query in pairs):
        return SHORTENED_PROMPT
    return f"a text of its own ({hash_json(sorted(pairs))})"


def require_one_protocol(label: str, runs: Sequence[tuple[str, ProtocolRecord | None]]) -> None:
    """Refuse to compare results of one benchmark that were measured by different protocols.

    Args:
        label: of the benchmark.
        runs: name and protocol of each; None, of results without one, is compared with nothing.

    Raises:
        InputError: names the fields that differ, with both values.
    """
    known = [(name, dict(record.list_fields())) for name, record in runs if record is not None]
    for (first, mine), (second, other) in combinations(known, 2):
        differing = [
            f"{name} is {json.dumps(mine[name])} in {first}, {json.dumps(other[name])} in {second}"
            for name in mine
            if name in other and mine[name] != other[name]
        ]
        if differing:
            raise InputError(f"{label}: different protocols cannot be compared: {'; '.join(differing)}")
