import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmark import row_key
from llava.eval.benchmarks import find_benchmark
from llava.eval.predictions import read_answers
from llava.eval.results import Result, export_answers, score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

SEED = find_benchmark("seed")


@pytest.fixture
def seed(golden: Path, tmp_path: Path) -> Path:
    """Made-up SEED-Bench answers with the numbers of LLaVA's scripts; a test may spoil them."""
    folder = tmp_path / "seed_bench"
    shutil.copytree(golden / "oracle" / "seed_bench", folder)
    return folder


@pytest.fixture
def expected(seed: Path) -> dict:
    return json.loads((seed / "expected.json").read_text())


def score(seed: Path, split: str | None = None, answers: str = "answers.jsonl") -> Result:
    task = SEED.with_split(split) if split else SEED
    return score_answers(task, seed / answers, seed, allow_partial=True)


def test_every_number_of_the_released_script_is_reproduced(seed: Path, expected: dict) -> None:
    result = score(seed)
    per_type = expected["main"].pop("per_type")
    assert set(result.scores["per_type"]) == set(per_type)
    for name, numbers in per_type.items():
        assert result.scores["per_type"][name] == pytest.approx(numbers, abs=1e-6)
    assert {name: result.scores[name] for name in expected["main"]} == pytest.approx(expected["main"], abs=1e-6)
    assert result.headline == result.scores["image_accuracy"]
    assert (result.count, result.missing) == (130, 9)


@pytest.mark.parametrize("split", [None, "image", "video", "all"])
def test_the_headline_follows_from_the_verdicts(seed: Path, split: str | None) -> None:
    task = SEED.with_split(split) if split else SEED
    rows = read_answers(seed / "answers.jsonl")[7:]
    scores = task.score({row_key(row, task.key_fields): row for row in rows}, seed)
    assert task.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    assert len(scores.verdicts) == scores.count == {"image": 110, "video": 20}.get(split, 130)


def test_every_question_has_a_verdict_an_unanswered_one_too(seed: Path) -> None:
    rows = read_answers(seed / "answers.jsonl")
    scores = SEED.score({row_key(row, SEED.key_fields): row for row in rows}, seed)
    found = {
        verdict.key: (verdict.prediction, verdict.reference, verdict.points, verdict.category)
        for verdict in scores.verdicts
    }
    assert found["[100000]"] == ("B", "B", 1.0, "Text Understanding")
    assert found["[100028]"] == ("kite", "C", 0.0, "Instance Location")
    assert found['["v33112"]'] == ("B", "B", 1.0, "Action Prediction")
    assert found["[100140]"][::2] == ("", 0.0)


def test_the_leaderboards_file_is_equal_byte_for_byte(seed: Path, tmp_path: Path) -> None:
    [file] = export_answers(SEED, seed / "answers.jsonl", seed, tmp_path / "out", allow_partial=True)
    assert file.read_bytes() == (seed / "expected_upload.jsonl").read_bytes()


def test_answers_go_where_the_script_puts_them(tmp_path: Path) -> None:
    assert SEED.place_answers(tmp_path, "run") == tmp_path / "answers/run/merge.jsonl"
    assert SEED.place_upload(tmp_path, "run") == tmp_path / "answers_upload/run"


def test_prompts_and_queries_are_the_released_ones(seed: Path) -> None:
    recorded = [json.loads(line) for line in (seed / "expected_prompts.jsonl").read_text().splitlines()]
    for question, row in zip(SEED.load(seed), recorded, strict=True):
        assert question.head() == {"question_id": row["question_id"], "prompt": row["answers_file_prompt"]}
        assert question.query == row["trim_text"]
        assert wrap_prompt(question.prompt, len(question.images), "vicuna_v1") == row["prompt_sent_to_llm"]
        assert SEED.max_new_tokens == row["max_new_tokens"]


@pytest.mark.parametrize("text", ["A.", "a", "A ", " A", "(A)", "A. bucket", ""])
def test_nothing_but_the_bare_letter_is_right(seed: Path, text: str) -> None:
    annotations = json.loads((seed / "SEED-Bench.json").read_text())
    for question in annotations["questions"]:
        question["answer"] = "A"
    (seed / "SEED-Bench.json").write_text(json.dumps(annotations))
    rows = read_answers(seed / "answers.jsonl")
    write_jsonl(seed / "all.jsonl", [row | {"text": text} for row in rows])
    assert score(seed, answers="all.jsonl").scores["total_accuracy"] == 0


def test_without_frames_the_videos_are_left_out_with_a_warning(
    seed: Path, expected: dict, caplog: pytest.LogCaptureFixture
) -> None:
    (seed / "SEED-Bench-image").mkdir()
    with caplog.at_level(logging.WARNING):
        questions = SEED.load(seed)
    assert len(questions) == 110
    assert all(isinstance(question.id, int) for question in questions)
    [record] = caplog.records
    assert "so 20 video questions are left out and 110 about images stay" in record.getMessage()
    write_jsonl(
        seed / "images.jsonl",
        [row for row in read_answers(seed / "answers.jsonl") if isinstance(row["question_id"], int)],
    )
    scores = score(seed, answers="images.jsonl").scores
    assert scores["image_accuracy"] == pytest.approx(expected["main"]["image_accuracy"])
    assert "video_accuracy" not in scores
    assert scores["n_video"] == 0


def test_with_frames_or_without_any_image_every_question_is_asked(seed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(SEED.load(seed)) == 130
    (seed / "SEED-Bench-image").mkdir()
    (seed / "SEED-Bench-video-image").mkdir()
    assert len(SEED.load(seed)) == 130
    assert not caplog.records


@pytest.mark.parametrize(("split", "number"), [("image", 110), ("video", 20), ("all", 130)])
def test_a_split_says_what_is_asked_whatever_is_there(seed: Path, split: str, number: int) -> None:
    (seed / "SEED-Bench-image").mkdir()
    assert len(SEED.with_split(split).load(seed)) == number


def test_the_video_split_is_named_in_its_line(seed: Path, expected: dict) -> None:
    videos = [row for row in read_answers(seed / "answers.jsonl") if isinstance(row["question_id"], str)]
    write_jsonl(seed / "videos.jsonl", videos)
    result = score(seed, "video", "videos.jsonl")
    assert result.row == "SEEDBench (Video)"
    assert result.headline == pytest.approx(expected["main"]["video_accuracy"])
    assert SEED.row == "SEEDBench (Image)"


def test_an_unknown_split_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="seed has no split 'test'; known: image, video, all"):
        SEED.with_split("test")


def test_a_question_without_annotation_is_named(seed: Path) -> None:
    path = seed / "SEED-Bench.json"
    path.write_text(path.read_text().replace('"100007"', '"100008"'))
    with pytest.raises(InputError, match=r"SEED-Bench.json lacks question 100007; take it and llava-seed-bench.jsonl"):
        score(seed)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"data_type": "image"', '"data_type": "sound"', r'question 1: "data_type" must be image or video'),
        ('"answer"', '"reply"', r'question 1: "answer" must be a string'),
        ('"questions"', '"items"', r'SEED-Bench.json: "questions" must be a list'),
    ],
)
def test_a_broken_annotation_is_named(seed: Path, old: str, new: str, words: str) -> None:
    path = seed / "SEED-Bench.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=words):
        score(seed)


def test_the_released_converter_prints_scores_and_writes_the_upload(
    seed: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec = importlib.util.spec_from_file_location(
        "converter", repository / "scripts" / "convert_seed_for_submission.py"
    )
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    arguments = ["--annotation-file", seed / "SEED-Bench.json", "--result-file", seed / "answers.jsonl"]
    arguments += ["--result-upload-file", seed / "up.jsonl", "--path_to_all_results", seed / "all.tsv"]
    monkeypatch.setattr("sys.argv", ["convert_seed_for_submission", *map(str, arguments)])
    converter.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Scene Understanding: 36.36%"
    assert printed[12:15] == ["Total accuracy: 42.31%", "image accuracy: 44.55%", "video accuracy: 30.00%"]
    assert printed[15] == "9 of 130 questions have no answer: wrong above, empty in the upload"
    assert (seed / "up.jsonl").read_bytes() == (seed / "expected_upload.jsonl").read_bytes()
    assert (seed / "all.tsv").read_text() == "SEEDBench (Image) [9 answers missing]\t44.55\n"
