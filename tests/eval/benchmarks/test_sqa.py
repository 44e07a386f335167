import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from llava.errors import InputError
from llava.eval import eval_science_qa
from llava.eval.benchmark import row_key
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.sqa import name_groups
from llava.eval.predictions import read_answers
from llava.eval.results import score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

SQA = find_benchmark("sqa")


@pytest.fixture
def science(golden: Path, tmp_path: Path) -> Path:
    """Made-up ScienceQA answers with the numbers of LLaVA's scripts; a test may spoil them."""
    folder = tmp_path / "scienceqa"
    shutil.copytree(golden / "oracle" / "scienceqa", folder)
    return folder


@pytest.fixture
def expected(science: Path) -> dict:
    return json.loads((science / "expected.json").read_text())


def test_every_number_of_the_released_script_is_reproduced(science: Path, expected: dict) -> None:
    result = score_answers(SQA, science / "answers.jsonl", science, allow_partial=True)
    main = expected["main"]
    for name in ("accuracy", "img_accuracy"):
        assert result.scores[name] == pytest.approx(main.pop(name), abs=1e-6)
    assert {name: result.scores[name] for name in main} == main
    assert result.headline == result.scores["img_accuracy"]
    assert (result.count, result.missing) == (expected["n_questions"], 5)


def test_the_official_breakdown_is_reproduced(science: Path, expected: dict) -> None:
    scores = score_answers(SQA, science / "answers.jsonl", science, allow_partial=True).scores
    del expected["official_breakdown"]["note"]
    assert scores["official_breakdown"] == expected["official_breakdown"]
    assert scores["breakdown"]["acc_natural"] == pytest.approx(25.5813953, abs=1e-6)


@pytest.mark.parametrize("num_left_out", [0, 40])
def test_the_headline_follows_from_the_verdicts(science: Path, num_left_out: int) -> None:
    rows = read_answers(science / "answers.jsonl")[num_left_out:]
    scores = SQA.score({row_key(row, SQA.key_fields): row for row in rows}, science)
    assert SQA.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    assert len(scores.verdicts) == scores.count == 110
    unanswered = [verdict for verdict in scores.verdicts if verdict.details == {"answered": False}]
    assert len(unanswered) == 5 + num_left_out
    assert not any(verdict.points for verdict in unanswered)


def test_verdicts_have_the_letter_that_was_read(science: Path) -> None:
    rows = read_answers(science / "answers.jsonl")
    verdicts = SQA.score({row_key(row, SQA.key_fields): row for row in rows}, science).verdicts
    found = {each.key: (each.prediction, each.parsed, each.reference, each.points, each.category) for each in verdicts}
    assert found['["222"]'] == ("A", "A", "A", 1.0, "image")
    assert found['["459"]'] == ("A. ", "A", "B", 0.0, "image")
    assert found['["518"]'] == (" D", "FAILED", "A", 0.0, "text")
    assert found['["8941"]'][:2] == ("FAILED", "FAILED")
    assert found['["8941"]'][3:] == (0.0, "image")


@pytest.mark.parametrize("prompt", [None, ""])
def test_answers_without_prompt_stay_in_the_headline(
    science: Path, expected: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, prompt: str | None
) -> None:
    rows = read_answers(science / "answers.jsonl")
    for row in rows:
        del row["prompt"]
        row.update({} if prompt is None else {"prompt": prompt})
    write_jsonl(science / "answers.jsonl", rows)
    result = score_answers(SQA, science / "answers.jsonl", science, allow_partial=True)
    assert result.scores["img_total"] == expected["main"]["img_total"]
    assert result.headline == pytest.approx(expected["main"]["img_accuracy"], abs=1e-6)
    run_command_of_llava(science, monkeypatch, "--allow-partial")
    assert capsys.readouterr().out == expected["main"]["stdout"] + "\n"


def test_prompts_and_queries_are_the_released_ones(science: Path) -> None:
    recorded = [json.loads(line) for line in (science / "expected_prompts.jsonl").read_text().splitlines()]
    for question, row in zip(SQA.load(science), recorded, strict=True):
        assert question.head() == {"question_id": row["question_id"], "prompt": row["answers_file_prompt"]}
        assert question.query == row["trim_text"]
        assert wrap_prompt(question.prompt, len(question.images), "vicuna_v1") == row["prompt_sent_to_llm"]
        assert bool(question.images) == row["has_image"]
        assert SQA.max_new_tokens == row["max_new_tokens"]


def test_images_are_looked_up_in_the_folder_of_the_test_split(science: Path) -> None:
    question = next(question for question in SQA.load(science) if question.id == "222")
    assert question.images == (science / "images" / "test" / "222" / "image.png",)


def test_answers_go_where_the_script_puts_them(tmp_path: Path) -> None:
    assert SQA.place_answers(tmp_path, "run") == tmp_path / "answers/run/merge.jsonl"
    assert SQA.place_upload(tmp_path, "run") is None


def test_missing_answers_are_refused_unless_allowed(science: Path) -> None:
    with pytest.raises(InputError, match=r"lacks 5 of 110 answers \(question 8941, .*--allow-partial"):
        score_answers(SQA, science / "answers.jsonl", science)


def test_a_missing_answer_leaves_the_headline_but_not_the_accuracy(science: Path) -> None:
    whole = score_answers(SQA, science / "answers.jsonl", science, allow_partial=True).scores
    rows = [row for row in read_answers(science / "answers.jsonl") if row["question_id"] != "222"]
    write_jsonl(science / "fewer.jsonl", rows)
    fewer = score_answers(SQA, science / "fewer.jsonl", science, allow_partial=True).scores
    assert (fewer["img_total"], fewer["img_correct"]) == (whole["img_total"] - 1, whole["img_correct"] - 1)
    assert (fewer["count"], fewer["correct"]) == (whole["count"], whole["correct"] - 1)


def test_answers_to_text_alone_have_no_headline(science: Path) -> None:
    rows = [row for row in read_answers(science / "answers.jsonl") if "<image>" not in row["prompt"]]
    write_jsonl(science / "text.jsonl", rows)
    with pytest.raises(InputError, match="none of the questions with an image has an answer"):
        score_answers(SQA, science / "text.jsonl", science, allow_partial=True)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("pid_splits.json", '"test"', '"exam"', r'pid_splits.json: "test" must be a list'),
        ("pid_splits.json", '"222"', '"1000000"', r'problems.json \(.*pid_splits.json\): "1000000" must be an object'),
        ("problems.json", '"choices": ["guitar"', '"choices": "x", "y": ["guitar"', r'problem 222: "choices" must be'),
        ("problems.json", '"222"', '222"', r"problems.json is not JSON"),
    ],
)
def test_problems_that_cannot_be_scored_are_named(science: Path, name: str, old: str, new: str, words: str) -> None:
    change(science / name, old, new)
    with pytest.raises(InputError, match=words):
        score_answers(SQA, science / "answers.jsonl", science, allow_partial=True)


@pytest.mark.parametrize(
    ("old", "new", "identity", "words"),
    [
        ('"image": "222/image.png"', '"image": 7', "222", '"image" must be a file name'),
        ('"id": "222"', '"id": 222', "llava_test_CQM-A.json record 1", '"id" must be a string'),
        ('"value": "<image>', '"text": "<image>', "222", '"conversations" must start with'),
    ],
)
def test_a_broken_question_costs_its_own_answer_only(
    science: Path, old: str, new: str, identity: str, words: str
) -> None:
    change(science / "llava_test_CQM-A.json", old, new)
    faults = {question.id: question.fault for question in SQA.load(science) if question.fault}
    assert list(faults) == [identity]
    assert words in faults[identity]


def test_a_file_of_something_else_is_refused(science: Path) -> None:
    (science / "llava_test_CQM-A.json").write_text('{"222": 1}')
    with pytest.raises(InputError, match="a JSON array is needed"):
        SQA.load(science)
    (science / "llava_test_CQM-A.json").write_text("[]")
    with pytest.raises(InputError, match="it is empty"):
        SQA.load(science)


def run_command_of_llava(science: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    arguments = ["--base-dir", science, "--result-file", science / "answers.jsonl"]
    arguments += ["--output-file", science / "output.jsonl", "--output-result", science / "result.json", *more]
    monkeypatch.setattr("sys.argv", ["eval_science_qa", *map(str, arguments)])
    eval_science_qa.main()


def test_the_released_command_prints_and_writes_what_it_did(
    science: Path, expected: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_command_of_llava(science, monkeypatch, "--allow-partial", "--path_to_all_results", str(science / "all.tsv"))
    assert capsys.readouterr().out == expected["main"]["stdout"] + "\n"
    result = json.loads((science / "result.json").read_text())
    assert (result["acc"], result["correct"], result["count"]) == (30.0, 33, 110)
    assert result["results"] == expected["main"]["pred_index"]
    output = json.loads((science / "output.jsonl").read_text())
    assert (len(output["correct"]), len(output["incorrect"])) == (33, 77)
    missing = next(answer for answer in output["incorrect"] if answer["question_id"] == "8941")
    assert (missing["pred"], missing["question"], missing["is_multimodal"]) == ("FAILED", "Unknown", False)
    assert (science / "all.tsv").read_text() == "ScienceQA (IMG) [5 answers missing]\t35.71\n"


def test_the_released_command_refuses_incomplete_answers(science: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="lacks 5 of 110 answers"):
        run_command_of_llava(science, monkeypatch)


def load_script(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_question_file_can_be_made_from_the_problems(
    science: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    published = science / "llava_test_CQM-A.json"
    records = json.loads(published.read_text())
    published.unlink()
    monkeypatch.setattr("sys.argv", ["convert_sqa_to_llava", "convert_to_llava", "--base-dir", str(science)])
    load_script(repository, "convert_sqa_to_llava").main()
    assert capsys.readouterr().out == f"110 questions in {published}\n"
    assert json.loads(published.read_text()) == records


def test_a_problem_with_a_image_but_no_hint_has_context() -> None:
    problem = {"subject": "social science", "grade": "grade12", "topic": "geography", "hint": ""}
    assert name_groups(problem | {"image": "1.png"}) == ["social", "has_image", "grade_7_12", "geography"]
    assert name_groups(problem | {"image": None}) == ["social", "no_context", "grade_7_12", "geography"]
    assert name_groups({"subject": "natural science", "grade": "grade6", "hint": "h", "topic": "t"}) == [
        "natural",
        "has_text",
        "grade_1_6",
        "t",
    ]
