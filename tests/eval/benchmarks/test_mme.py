import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Verdict, row_key
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.mme import parse_answer
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, format_line, score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

MME = find_benchmark("mme")


@pytest.fixture
def mme(golden: Path, tmp_path: Path) -> Path:
    """Made-up MME answers with the numbers of the official tool; a test may spoil them."""
    folder = tmp_path / "MME"
    shutil.copytree(golden / "oracle" / "mme", folder)
    return folder


@pytest.fixture
def expected(mme: Path) -> dict:
    return json.loads((mme / "expected.json").read_text())


def test_every_number_of_the_official_tool_is_reproduced(mme: Path, expected: dict) -> None:
    result = score_answers(MME, mme / "answers.jsonl", mme)
    main = expected["main"]
    assert set(result.scores["subtasks"]) == set(main["subtasks"])
    for name, numbers in main["subtasks"].items():
        assert result.scores["subtasks"][name] == pytest.approx(numbers, abs=1e-6)
    for name in ("perception", "cognition"):
        assert result.scores[name] == pytest.approx(main[name], abs=1e-6)
    assert result.headline == result.scores["perception"]
    assert result.count == expected["n_questions"]
    assert format_line(result) == "MME (Perception)\t952.50"


def test_every_answer_is_read_as_the_official_tool_reads_it(mme: Path, expected: dict) -> None:
    rows = read_answers(mme / "answers.jsonl")
    read = {f"{row['question_id']} | {row['prompt']}": parse_answer(row["text"]) for row in rows}
    assert read == expected["parsed_answers"]


@pytest.mark.parametrize("num_left_out", [0, 1, 31])
def test_the_headline_follows_from_the_verdicts(mme: Path, num_left_out: int) -> None:
    rows = read_answers(mme / "answers.jsonl")[num_left_out:]
    scores = MME.score({row_key(row, MME.key_fields): row for row in rows}, mme)
    assert MME.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    units = [verdict.unit for verdict in scores.verdicts]
    assert units.count("question") == scores.count == 2 * units.count("pair") == 134 - num_left_out - num_left_out % 2


def test_questions_have_verdicts_and_pairs_besides(mme: Path) -> None:
    rows = read_answers(mme / "answers.jsonl")
    scores = MME.score({row_key(row, MME.key_fields): row for row in rows}, mme)
    keys = [row_key(row, MME.key_fields) for row in rows[2:4]]
    assert scores.verdicts[3:6] == [
        Verdict(keys[0], "unknown", "yes", 0.0, parsed="other", category="code_reasoning"),
        Verdict(keys[1], "No", "no", 1.0, parsed="no", category="code_reasoning"),
        Verdict(
            key="code_reasoning/5947.jpg",
            prediction="unknown | No",
            reference="yes | no",
            points=0.0,
            parsed="other | no",
            category="code_reasoning",
            unit="pair",
            details={"question_keys": keys},
        ),
    ]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("Not sure", "no"),
        ("None", "no"),
        ("Know it", "no"),
        ("Eyes", "yes"),
        (" yes", "yes"),
        ("  no", "no"),
        ("   no", "other"),
        ("It is yes", "other"),
        ("unknown", "other"),
        ("", "other"),
    ],
)
def test_only_the_first_four_characters_count(text: str, answer: str) -> None:
    assert parse_answer(text) == answer


def test_answers_go_where_the_script_puts_them(tmp_path: Path) -> None:
    assert MME.place_answers(tmp_path, "run") == tmp_path / "answers/run.jsonl"
    assert MME.place_upload(tmp_path, "run") == tmp_path / "eval_tool/answers/run"


def test_prompts_and_queries_are_the_released_ones(mme: Path) -> None:
    recorded = [json.loads(line) for line in (mme / "expected_prompts.jsonl").read_text().splitlines()]
    for question, row in zip(MME.load(mme), recorded, strict=True):
        assert question.head() == {"question_id": row["question_id"], "prompt": row["answers_file_prompt"]}
        assert question.query == row["trim_text"]
        assert wrap_prompt(question.prompt, len(question.images), "vicuna_v1") == row["prompt_sent_to_llm"]
        assert MME.max_new_tokens == row["max_new_tokens"]


def test_answers_are_paired_by_id_not_by_position(mme: Path) -> None:
    write_jsonl(mme / "turned.jsonl", reversed(read_answers(mme / "answers.jsonl")))
    turned = score_answers(MME, mme / "turned.jsonl", mme)
    assert turned.scores == score_answers(MME, mme / "answers.jsonl", mme).scores


def test_the_tools_files_hold_label_and_answer_of_each_question(mme: Path, tmp_path: Path) -> None:
    files = export_answers(MME, mme / "answers.jsonl", mme, tmp_path / "out")
    assert sorted(file.stem for file in files) == sorted(
        json.loads((mme / "expected.json").read_text())["main"]["subtasks"]
    )
    lines = (tmp_path / "out" / "code_reasoning.txt").read_text().splitlines()
    assert len(lines) == 8
    question = "Is there a pillow in this code_reasoning image 3124? Please answer yes or no."
    assert lines[0] == f"3124.txt\t{question}\tYes\tYes"


def test_a_label_with_two_spaces_is_found_and_kept(mme: Path, tmp_path: Path) -> None:
    labels = mme / "MME_Benchmark_release_version" / "code_reasoning" / "3124.txt"
    labels.write_text(labels.read_text().replace("? Please", "?  Please"))
    assert score_answers(MME, mme / "answers.jsonl", mme).headline == pytest.approx(952.5)
    export_answers(MME, mme / "answers.jsonl", mme, tmp_path / "out")
    assert "3124?  Please answer yes or no.\tYes" in (tmp_path / "out" / "code_reasoning.txt").read_text()


def test_newlines_and_tabs_do_not_break_the_tools_files(mme: Path, tmp_path: Path) -> None:
    rows = read_answers(mme / "answers.jsonl")
    rows[0]["text"] = "Yes\nbecause\tit is"
    write_jsonl(mme / "odd.jsonl", rows)
    export_answers(MME, mme / "odd.jsonl", mme, tmp_path / "out")
    first = (tmp_path / "out" / "code_reasoning.txt").read_text().splitlines()[0]
    assert first.endswith("\tYes\tYes because it is")


def test_a_image_with_one_answer_takes_no_part(mme: Path) -> None:
    rows = read_answers(mme / "answers.jsonl")
    write_jsonl(mme / "some.jsonl", rows[1:])
    partial = score_answers(MME, mme / "some.jsonl", mme, allow_partial=True)
    assert partial.scores["subtasks"]["code_reasoning"]["n_images"] == 3
    assert (partial.count, partial.missing) == (132, 1)
    write_jsonl(mme / "some.jsonl", rows[:1])
    with pytest.raises(InputError, match="no image of the perception subtasks has answers to both"):
        score_answers(MME, mme / "some.jsonl", mme, allow_partial=True)


def test_a_image_without_two_questions_is_refused(mme: Path) -> None:
    path = mme / "llava_mme.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    rows = read_answers(mme / "answers.jsonl")[1:]
    write_jsonl(mme / "some.jsonl", rows)
    with pytest.raises(InputError, match=r"code_reasoning/3124.jpg has 1 questions, each image needs two"):
        score_answers(MME, mme / "some.jsonl", mme)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pillow", "pillar", 'asks "Is there a pillow .* which its label file does not have'),
        ("\tYes", " Yes", r"3124.txt line \d: a question, a tab and Yes or No are needed"),
        ("\tYes", "\tPerhaps", r"3124.txt line \d: a question, a tab and Yes or No are needed"),
    ],
)
def test_labels_that_do_not_fit_are_named(mme: Path, old: str, new: str, words: str) -> None:
    labels = mme / "MME_Benchmark_release_version" / "code_reasoning" / "3124.txt"
    labels.write_text(labels.read_text().replace(old, new))
    with pytest.raises(InputError, match=words):
        score_answers(MME, mme / "answers.jsonl", mme)


def test_an_unknown_subtask_is_named(mme: Path) -> None:
    for name in ("llava_mme.jsonl", "answers.jsonl"):
        path = mme / name
        path.write_text(path.read_text().replace("OCR/", "ocr/"))
    with pytest.raises(InputError, match="belongs to no subtask; known: existence"):
        score_answers(MME, mme / "answers.jsonl", mme)


def test_the_released_converter_writes_where_the_tool_looks(
    mme: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (mme / "answers").mkdir()
    shutil.copy(mme / "answers.jsonl", mme / "answers" / "run.jsonl")
    spec = importlib.util.spec_from_file_location("converter", repository / "scripts" / "convert_answer_to_mme.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    monkeypatch.chdir(mme)
    monkeypatch.setattr("sys.argv", ["convert_answer_to_mme", "--experiment", "run"])
    converter.main()
    assert capsys.readouterr().out == "14 files in eval_tool/answers/run\n"
    assert len(list((mme / "eval_tool" / "answers" / "run").glob("*.txt"))) == 14
