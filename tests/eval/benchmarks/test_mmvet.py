import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import pytest

from llava.errors import InputError
from llava.eval import model_vqa, model_vqa_loader
from llava.eval.benchmarks.mmvet import OWN_PROMPT, RETRY_SUFFIX, MmVet, parse_score
from llava.eval.judge import ApiJudge, ReplyCache, make_judge
from llava.eval.predictions import read_answers
from llava.eval.results import score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

MMVET = MmVet()


@pytest.fixture
def oracle(golden: Path) -> Path:
    """Made-up answers and judge's replies with the numbers of the official evaluator."""
    return golden / "oracle" / "mm_vet"


@pytest.fixture
def copied(oracle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "mm-vet"
    shutil.copytree(oracle, folder)
    return folder


def name_question(body: dict) -> str:
    return re.search(r"\[(v1_\d+)\]", body["messages"][0]["content"])[1]


@pytest.fixture
def canned(endpoint, oracle: Path) -> None:
    """The endpoint serves each question's recorded replies one after another, over all runs."""
    waiting = json.loads((oracle / "judge_replies.json").read_text())
    lock = Lock()

    def respond(body: dict) -> str:
        with lock:
            return waiting[name_question(body)].pop(0)

    endpoint.respond = respond


@pytest.fixture
def connect(endpoint, tmp_path: Path) -> Callable[..., ApiJudge]:
    def make(num_runs: int = 1) -> ApiJudge:
        return make_judge(None, None, tmp_path / "run.judge.jsonl", MMVET, num_runs=num_runs)

    return make


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("num_runs", [1, 3])
def test_every_number_of_the_official_evaluator_is_reproduced_at_an_endpoint(
    oracle: Path, endpoint, connect, num_runs: int
) -> None:
    expected = json.loads((oracle / "expected.json").read_text())
    result = score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect(num_runs))
    for part in {"num_run_1", f"num_run_{num_runs}"}:
        found, wanted = result.scores[part], dict(expected["main"][part])
        if "total_unrounded" in wanted:
            assert found["total_unrounded"] == pytest.approx(wanted.pop("total_unrounded"), abs=1e-6)
        assert {name: found[name] for name in wanted} == wanted
    assert round(result.headline, 1) == expected["main"][f"num_run_{num_runs}"]["total"]
    assert result.count == expected["n_questions"] == 48
    calls = Counter(map(name_question, endpoint.requests))
    assert calls == expected["main"][f"num_run_{num_runs}"]["n_calls"]


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("part", [slice(None), slice(1, None, 2), slice(3)])
@pytest.mark.parametrize("num_runs", [1, 3])
def test_the_headline_follows_from_the_verdicts(oracle: Path, connect, num_runs: int, part: slice) -> None:
    rows = read_answers(oracle / "answers.jsonl")[part]
    scores = MMVET.score({f"[{row['question_id']}]": row for row in rows}, oracle, connect(num_runs))
    assert MMVET.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    assert scores.headline == pytest.approx(scores.scores[f"num_run_{num_runs}"]["total_unrounded"], abs=1e-9)
    assert len(scores.verdicts) == scores.count == len(rows)


@pytest.mark.usefixtures("canned")
def test_verdicts_hold_answer_reference_and_mean_grade(oracle: Path, connect) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    scores = MMVET.score({f"[{row['question_id']}]": row for row in rows}, oracle, connect(3))
    annotations = json.loads((oracle / "mm-vet.json").read_text())
    grades = scores.scores["num_run_3"]["grade"]
    verdicts = {json.loads(verdict.key)[0]: verdict for verdict in scores.verdicts}
    for row in rows:
        key, verdict = f"v1_{row['question_id']}", verdicts[row["question_id"]]
        assert (verdict.prediction, verdict.reference) == (row["text"], annotations[key]["answer"])
        assert verdict.category == "_".join(sorted(annotations[key]["capability"]))
        assert (verdict.unit, verdict.parsed, verdict.details) == ("question", None, {})
        assert verdict.points == pytest.approx(sum(grades[key]["score"]) / 3)
    # By the recorded replies 0.8, 0.6, 0.4; 0.0, 0.1, 0.7; "1.0 because", 0.9, 1.0.
    assert [verdicts[number].points for number in (0, 1, 4)] == pytest.approx([0.6, 0.8 / 3, 2.9 / 3])
    assert (verdicts[0].reference, verdicts[0].category, verdicts[0].correct) == ("basket", "ocr_rec", True)
    assert (verdicts[1].category, verdicts[1].correct) == ("math_ocr_spat", False)


def test_files_have_the_places_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "mmvet").mkdir()
    root = MMVET.find_root(tmp_path)
    assert root == tmp_path / "mmvet"
    assert MMVET.place_answers(root, "run-1") == root / "answers" / "run-1.jsonl"
    assert MMVET.place_upload(root, "run-1") == root / "results" / "run-1"


@pytest.mark.usefixtures("canned")
def test_the_headline_is_not_rounded(oracle: Path, connect) -> None:
    result = score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect())
    assert result.headline == pytest.approx(37.708333333333336, abs=1e-9)
    assert result.columns["Total"] == 37.7
    assert list(result.columns) == ["Total", "rec", "ocr", "know", "gen", "spat", "math"]


@pytest.mark.usefixtures("canned")
def test_retries_follow_the_official_pattern(oracle: Path, endpoint, connect) -> None:
    score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect())
    expected = json.loads((oracle / "expected.json").read_text())["main"]["call_pattern_example"]
    for key, calls in expected.items():
        found = [
            {
                "temperature": body["temperature"],
                "max_tokens": body["max_tokens"],
                "retry_suffix": body["messages"][0]["content"].endswith(RETRY_SUFFIX),
            }
            for body in endpoint.requests
            if name_question(body) == key
        ]
        assert found == calls


@pytest.mark.usefixtures("canned")
def test_a_judged_run_is_never_asked_again_and_more_runs_ask_only_the_new_ones(oracle: Path, endpoint, connect) -> None:
    first = score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect())
    num_calls = len(endpoint.requests)
    assert score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect()) == first
    assert len(endpoint.requests) == num_calls
    expected = json.loads((oracle / "expected.json").read_text())["main"]["num_run_3"]
    more = score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect(3))
    assert more.scores["num_run_1"] == first.scores["num_run_1"]
    assert more.scores["num_run_3"]["runs"] == expected["runs"]
    assert len(endpoint.requests) == sum(expected["n_calls"].values())


@pytest.mark.usefixtures("canned")
def test_the_judge_gets_one_message_prompt_and_table_row(oracle: Path, endpoint, connect) -> None:
    score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=connect())
    first = {name_question(body): body["messages"] for body in reversed(endpoint.requests)}
    rows = {f"v1_{row['question_id']}": row["text"] for row in read_answers(oracle / "answers.jsonl")}
    annotations = json.loads((oracle / "mm-vet.json").read_text())
    for key, messages in first.items():
        truth = annotations[key]["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        content = f"{OWN_PROMPT}\n{annotations[key]['question']} | {truth} | {rows[key]} | "
        assert messages == [{"role": "user", "content": content}]


def test_our_prompt_has_the_official_form() -> None:
    instruction, table = OWN_PROMPT.split("\n\n")
    for word in ("<AND>", "<OR>", "0.0, 0.1", "1.0", "last field"):
        assert word in instruction
    head, rule, *rows = table.split("\n")
    assert head == "Question | Ground truth | Prediction | Correctness"
    assert rule == "--- | --- | --- | ---"
    fields = [row.split(" | ") for row in rows]
    assert [len(row) for row in fields] == [4] * 7
    assert all(parse_score(row[3]) is not None for row in fields)
    assert [row[0] for row in fields] == [fields[0][0]] * 5 + [fields[5][0]] * 2


@pytest.mark.usefixtures("canned")
def test_a_users_prompt_file_replaces_our_words(copied: Path, endpoint, connect) -> None:
    (copied / "judge_prompt.txt").write_text("Official words.\nQuestion | ...\n")
    score_answers(MMVET, copied / "answers.jsonl", copied, judge=connect())
    assert all(
        body["messages"][0]["content"].startswith("Official words.\nQuestion | ...\nWhat does")
        for body in endpoint.requests
    )
    (copied / "judge_prompt.txt").write_text("\n")
    with pytest.raises(InputError, match=r"judge_prompt.txt is empty"):
        score_answers(MMVET, copied / "answers.jsonl", copied, judge=connect())


def test_prompts_and_queries_are_the_published_ones_with_room_for_1024_tokens(oracle: Path) -> None:
    expected = [json.loads(line) for line in (oracle / "expected_prompts.jsonl").read_text().splitlines()]
    questions = MMVET.load(oracle)
    assert len(questions) == len(expected) == 48
    for question, record in zip(questions, expected, strict=True):
        assert question.id == record["question_id"]
        assert wrap_prompt(question.prompt, 1, "vicuna_v1") == record["prompt_sent_to_llm"]
        assert question.query == record["trim_text"]
        assert question.head()["prompt"] == record["answers_file_prompt"]
        assert record["max_new_tokens"] == MMVET.max_new_tokens == 1024


def test_files_are_found_where_unpacking_the_archive_puts_them(copied: Path) -> None:
    (copied / "mm-vet").mkdir()
    (copied / "mm-vet.json").rename(copied / "mm-vet" / "mm-vet.json")
    (copied / "mm-vet" / "images").mkdir()
    judge = make_judge("exact", None, copied / "c.jsonl", MMVET)
    assert score_answers(MMVET, copied / "answers.jsonl", copied, judge=judge).count == 48
    assert MMVET.load(copied)[0].images[0] == copied / "mm-vet" / "images" / "v1_0.jpg"


@pytest.mark.parametrize(
    ("text", "score"),
    [("0.7", 0.7), ("1", 1.0), ("0", 0.0), ("1.5", None), ("-0.1", None), ("", None), ("nan", None), ("The", None)],
)
def test_scores_are_numbers_from_0_to_1(text: str, score: float | None) -> None:
    assert parse_score(text) == score


def test_the_results_file_is_the_published_one_byte_for_byte(oracle: Path, tmp_path: Path) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    answers = {f"[{row['question_id']}]": row for row in rows}
    (path,) = MMVET.export(answers, oracle, tmp_path)
    assert path.name == "made-up-llava.json"
    assert path.read_bytes() == (oracle / "expected_results.json").read_bytes()


def test_the_published_converter_writes_the_published_file(oracle: Path, tmp_path: Path, repository: Path) -> None:
    script = repository / "scripts" / "convert_mmvet_for_eval.py"
    target = tmp_path / "results" / "x.json"
    command = [sys.executable, script, "--src", oracle / "answers.jsonl", "--dst", target]
    subprocess.run(list(map(str, command)), check=True)
    assert target.read_bytes() == (oracle / "expected_results.json").read_bytes()
    rows = read_answers(oracle / "answers.jsonl")
    write_jsonl(tmp_path / "twice.jsonl", [*rows, rows[3] | {"text": "something else"}])
    command[3] = tmp_path / "twice.jsonl"
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: two different answers to question 3\n")


def test_answers_are_paired_by_id_not_by_position(oracle: Path, tmp_path: Path) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    random.Random(3).shuffle(rows)
    write_jsonl(tmp_path / "shuffled.jsonl", rows)
    judge = make_judge("exact", None, tmp_path / "c.jsonl", MMVET)
    shuffled = score_answers(MMVET, tmp_path / "shuffled.jsonl", oracle, judge=judge)
    assert shuffled.scores == score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=judge).scores


def test_partial_answers_are_scored_alone(oracle: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "some.jsonl", read_answers(oracle / "answers.jsonl")[:10])
    judge = make_judge("exact", None, tmp_path / "c.jsonl", MMVET)
    partial = score_answers(MMVET, tmp_path / "some.jsonl", oracle, allow_partial=True, judge=judge)
    assert (partial.count, partial.missing) == (10, 38)
    assert len(partial.scores["num_run_1"]["grade"]) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("v1_7"), "mm-vet.json has no v1_7; it and llava-mm-vet.jsonl must come from the same"),
        (lambda data: data["v1_7"].pop("answer"), 'v1_7: "answer" must be a string'),
        (lambda data: data["v1_7"].update(capability="ocr"), 'v1_7: "capability" must be a list'),
        (lambda data: data["v1_7"].update(capability=["ocr", 1]), 'v1_7: "capability" must be a list of strings'),
        (lambda data: data.update(v1_7=["ocr"]), 'v1_7: "question" must be a string'),
    ],
)
def test_an_annotation_that_is_missing_or_broken_is_named(
    copied: Path, change: Callable, words: str, endpoint, connect
) -> None:
    annotations = json.loads((copied / "mm-vet.json").read_text())
    change(annotations)
    (copied / "mm-vet.json").write_text(json.dumps(annotations))
    with pytest.raises(InputError, match=words):
        score_answers(MMVET, copied / "answers.jsonl", copied, judge=connect())
    assert not endpoint.requests


def test_faults_on_the_way_do_not_count_as_replies(oracle: Path, endpoint, tmp_path: Path, fault) -> None:
    """Rate limits, server errors, hang-ups and garbage between the recorded replies change no number."""
    waiting = json.loads((oracle / "judge_replies.json").read_text())
    faults = [
        fault(status=429, body="{}", headers=(("Retry-After", "0"),)),
        fault(status=500, body="oops"),
        None,
        fault(body="<html>", content_type="text/html"),
        fault(body="0.9"),
    ]
    dice = random.Random(6)

    def respond(body: dict) -> object:
        return dice.choice(faults) if dice.random() < 0.4 else waiting[name_question(body)].pop(0)

    endpoint.respond = respond
    cache = ReplyCache(tmp_path / "c.jsonl")
    judge = ApiJudge("m", cache, address=endpoint.address, first_pause_seconds=0.001, max_tries=30)
    expected = json.loads((oracle / "expected.json").read_text())["main"]["num_run_1"]
    result = score_answers(MMVET, oracle / "answers.jsonl", oracle, judge=judge)
    assert result.scores["num_run_1"]["grade"] == expected["grade"]
    assert len(cache) == sum(expected["n_calls"].values()) < len(endpoint.requests)


def test_the_published_command_for_long_answers_allows_1024_tokens(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(model_vqa_loader, "answer_and_exit", lambda *arguments: asked.append(arguments))
    fixed = ["--model-path", "x", "--question-file", oracle / "llava-mm-vet.jsonl", "--image-folder", "pictures"]
    fixed += ["--answers-file", tmp_path / "a.jsonl", "--temperature", "0", "--conv-mode", "vicuna_v1"]
    monkeypatch.setattr("sys.argv", ["model_vqa", *map(str, fixed)])
    model_vqa.main()
    ((arguments, questions, answers_file, max_new_tokens, key_fields),) = asked
    assert max_new_tokens == 1024
    assert questions[0].images == (Path("pictures/v1_0.jpg"),)
    assert (answers_file, arguments.conv_mode, arguments.temperature) == (tmp_path / "a.jsonl", "vicuna_v1", 0.0)
    assert key_fields == ("question_id", "prompt")


@pytest.mark.parametrize(
    ("script", "folder"), [("llavabench", "llava-bench-in-the-wild"), ("mmvet", "mm-vet"), ("mmvet", "mmvet")]
)
def test_the_scripts_answer_and_let_the_named_judge_score(
    script: str, folder: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "model").mkdir()
    command = ["bash", repository / "scripts" / "v1_5" / "eval" / f"{script}.sh", "run-1", "model"]
    command += ["--", "--judge-model", "gpt-4o", "--batch-size", "4"]
    settings = {"DRY_RUN": "1", "PYTHON": sys.executable, "LLAVA_EVAL_ROOT": "data", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=True
    )
    answer, *_, score = done.stdout.splitlines()
    answers = tmp_path / "data" / folder / "answers" / "run-1.jsonl"
    assert f"answer {script} --root {answers.parents[1]} --answers {answers} " in answer
    assert "--batch-size 4" in answer
    assert "judge" not in answer
    assert f"score {script} --answers {answers} --root {answers.parents[1]} " in score
    assert "--judge-model gpt-4o" in score
