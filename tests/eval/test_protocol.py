"""Numbers that came about in different ways are not put side by side."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.protocol import (
    SHORTENED_PROMPT,
    WHOLE_PROMPT,
    ProtocolRecord,
    describe_protocol,
    name_query_rule,
    require_one_protocol,
)
from llava.eval.results import read_result
from tests.eval.conftest import SUFFIX
from tests.eval.test_commands import run
from tests.eval.test_promises import FOLDERS

QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
RUN = {
    "path": "models/llava",
    "conv_mode": "vicuna_v1",
    "temperature": 0.0,
    "top_p": 0.9,
    "num_beams": 1,
    "max_new_tokens": 128,
    "checkpoint": "c0ffee",
    "vision_tower": "70ee",
    "reduce": "TRIM:-1",
}


@pytest.fixture
def textvqa(golden: Path, tmp_path: Path) -> Path:
    """A copy of the made-up TextVQA, whose prompts hold OCR tokens."""
    return Path(shutil.copytree(golden / "oracle" / "textvqa", tmp_path / "with"))


@pytest.fixture
def without_hint(textvqa: Path, tmp_path: Path) -> Path:
    """The same questions without their OCR tokens, as some papers ask them, and the same answers."""
    root = Path(shutil.copytree(textvqa, tmp_path / "without"))
    for name, column in ((QUESTION_FILE, "text"), ("answers.jsonl", "prompt")):
        rows = [json.loads(line) for line in (root / name).read_text().splitlines()]
        for row in rows:
            text = re.sub(r"Reference OCR token:.*\n", "", row[column])
            # LLaVA's older form, of one line.
            row[column] = re.sub(
                r"OCR tokens: .*Question: (.*?) Short answer:.*", rf"\1{SUFFIX}", text, flags=re.DOTALL
            )
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_run(answers: Path, **changes: object) -> None:
    answers.with_name(f"{answers.name}.run.json").write_text(json.dumps(RUN | changes))


def score(root: Path, out: Path, task: str = "textvqa") -> Path:
    options = ["--root", root, "--answers", root / "answers.jsonl", "--json", out, "--allow-partial"]
    done = run("score", task, *options)
    assert done.returncode == 0, done.stderr
    return out


def record(**changes: object) -> ProtocolRecord:
    plain = ProtocolRecord("pope", "coco", None, "accuracy", "vicuna_v1", WHOLE_PROMPT, {"temperature": 0.0}, 1)
    return dataclasses.replace(plain, **changes)


# ------------------------------------------------------------------------------------------------------- the command
def test_scores_with_and_without_ocr_hint_are_refused_in_one_line(
    textvqa: Path, without_hint: Path, tmp_path: Path
) -> None:
    files = [f"{root.name}={score(root, tmp_path / f'{root.name}.json')}" for root in (textvqa, without_hint)]
    for layout in ("--overview", "--by-benchmark"):
        done = run("report", *files, layout)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            "error: TextVQA (Acc): different protocols cannot be compared: "
            "ocr_hint is true in with, false in without; questions is "
        )
        assert done.stderr.count("\n") == 1


def test_the_same_protocol_of_another_checkpoint_and_reduction_is_compared(textvqa: Path, tmp_path: Path) -> None:
    write_run(textvqa / "answers.jsonl", checkpoint="other", reduce="none", path="elsewhere")
    first = score(textvqa, tmp_path / "plain.json")
    write_run(textvqa / "answers.jsonl", top_p=None)
    second = score(textvqa, tmp_path / "trim.json")
    done = run("report", f"plain={first}", f"trim={second}", "--overview")
    assert done.returncode == 0, done.stderr
    assert "rotocol" not in done.stdout
    protocols = [read_result(file).protocol for file in (first, second)]
    assert protocols[0].hash == protocols[1].hash
    assert [each.model["reduce"] for each in protocols] == ["none", "TRIM:-1"]


def test_results_without_a_protocol_are_read_and_marked(textvqa: Path, without_hint: Path, tmp_path: Path) -> None:
    old, new = score(textvqa, tmp_path / "old.json"), score(without_hint, tmp_path / "new.json")
    data = json.loads(old.read_text())
    del data["protocol"]
    old.write_text(json.dumps(data))
    done = run("report", f"old={old}", f"new={new}", "--json", tmp_path / "table.json")
    assert done.returncode == 0, done.stderr
    assert "old (protocol unknown)" in done.stdout
    assert "new (" not in done.stdout
    overview = run("report", f"old={old}", f"new={new}", "--overview")
    note = "Protocol unknown, from files that do not say how they were measured: old: TextVQA (Acc)."
    assert note in " ".join(overview.stdout.split())


def test_flips_between_different_decodings_are_refused(textvqa: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    shutil.copy(textvqa / "answers.jsonl", other)
    write_run(textvqa / "answers.jsonl")
    options = ["--root", textvqa, "--answers", textvqa / "answers.jsonl", "--against", other]
    assert run("wrong", "textvqa", *options).returncode == 0  # nobody knows how the other one was decoded
    write_run(other, temperature=0.2)
    done = run("wrong", "textvqa", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "temperature is 0.0 in answers, 0.2 in other" in done.stderr
    write_run(other, checkpoint="other")
    assert run("wrong", "textvqa", *options).returncode == 0


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("fast", '"protocol" must be an object that names its "benchmark"'),
        ({"split": "val"}, '"protocol" must be an object that names its "benchmark"'),
        ({"benchmark": "pope", "decoding": 7}, '"protocol" has no right "decoding": 7'),
        ({"benchmark": "pope", "ocr_hint": "yes"}, '"protocol" has no right "ocr_hint": "yes"'),
    ],
)
def test_a_broken_protocol_is_named(protocol: object, words: str, textvqa: Path, tmp_path: Path) -> None:
    file = score(textvqa, tmp_path / "scores.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "protocol": protocol}))
    done = run("report", file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


# --------------------------------------------------------------------------------------------------------- the record
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_how_it_is_measured(name: str, golden: Path, tmp_path: Path) -> None:
    task, root = BENCHMARKS[name], golden / "oracle" / FOLDERS.get(name, name)
    write_run(tmp_path / "answers.jsonl")
    questions = task.load(root)
    found = describe_protocol(task, questions, root, tmp_path / "answers.jsonl")
    assert found.split
    assert found.headline == {"mme": "perception"}.get(name, found.headline)
    assert found.ocr_hint is (True if name == "textvqa" else None)
    assert found.query == (SHORTENED_PROMPT if name.startswith("mmbench") else WHOLE_PROMPT)
    assert found.decoding == {"temperature": 0.0, "top_p": None, "num_beams": 1, "max_new_tokens": 128}
    assert (found.template, found.num_questions) == ("vicuna_v1", len(questions))
    again = describe_protocol(task, questions[::-1], root, tmp_path / "answers.jsonl")
    assert again == found
    assert ProtocolRecord.from_json(json.loads(json.dumps(found.to_json() | {"new": 1})), "x") == found


def test_a_question_that_is_worded_otherwise_is_another_protocol(golden: Path, tmp_path: Path) -> None:
    task, root = BENCHMARKS["pope"], golden / "oracle" / "pope"
    questions = task.load(root)
    first, *others = questions
    changed = [dataclasses.replace(first, prompt=first.prompt + " "), *others]
    hashes = {describe_protocol(task, each, root, tmp_path / "none").questions for each in (questions, changed, others)}
    assert len(hashes) == 3


def test_a_query_of_another_text_is_named_by_its_hash() -> None:
    assert name_query_rule([Question(1, "Is it red?", "red")]).startswith("a text of its own (")
    assert name_query_rule([Question(1, "Is it\nred?", "Is it"), Question(2, fault="broken")]) == SHORTENED_PROMPT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"headline": "perception + cognition"}, 'headline is "accuracy" in a, "perception + cognition" in b'),
        ({"scorer": 2}, "scorer is 1 in a, 2 in b"),
        ({"split": "aokvqa"}, 'split is "coco" in a, "aokvqa" in b'),
        ({"decoding": {"temperature": 0.2}}, "temperature is 0.0 in a, 0.2 in b"),
        ({"counted": "patches", "template": "plain"}, 'template is "vicuna_v1" in a, "plain" in b'),
    ],
)
def test_a_field_that_differs_is_named_with_both_values(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        require_one_protocol("POPE", [("a", record()), ("old", None), ("b", record(**changes))])


def test_what_nobody_knows_equals_anything_but_hides_no_difference_between_others() -> None:
    unknown = record(scorer=None, decoding=None)
    require_one_protocol("POPE", [("a", record()), ("b", unknown), ("c", record(model={"checkpoint": "x"}))])
    with pytest.raises(InputError, match="scorer is 1 in b, 2 in c"):
        require_one_protocol("POPE", [("a", unknown), ("b", record()), ("c", record(scorer=2))])
