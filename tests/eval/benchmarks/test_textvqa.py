import json
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval import eval_textvqa
from llava.eval.benchmarks.textvqa import TextVqa, extract_question
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, pair_with_questions, score_answers
from llava.files import write_jsonl

TEXTVQA = TextVqa()
HOW = "Answer the question using a single word or phrase."


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "oracle" / "textvqa"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A TextVQA folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "textvqa"))


@pytest.mark.parametrize(
    "prompt",
    [
        f"What Brand is it?\n{HOW}",
        f"What Brand is it?\nReference OCR token: FOO, BAR\n{HOW}",
        f"What Brand is it?\nReference OCR token: \n{HOW}",
        f"Reference OCR token: FOO\nWhat Brand is it?\n{HOW}",
        "OCR tokens: FOO\n BAR Question: What Brand is it? Short answer:",
    ],
)
def test_the_question_is_found_in_every_form_of_the_prompt(prompt: str) -> None:
    assert extract_question(prompt, "00ab") == "what brand is it?"


@pytest.mark.parametrize(
    "prompt", ["What?", f"What?\nMore\n{HOW}", f"What?\nReference OCR token: A\nB\n{HOW}", "OCR tokens: A", None]
)
def test_a_prompt_of_another_form_is_refused_with_its_id(prompt: str | None) -> None:
    with pytest.raises(InputError, match="the prompt of answer 00ab is none of TextVQA's"):
        extract_question(prompt, "00ab")


def test_several_questions_about_one_image_keep_their_own_answers(folder: Path) -> None:
    questions = TEXTVQA.load(folder)
    assert len({question.id for question in questions}) < len(questions)
    lines = score_answers(TEXTVQA, folder / "answers.jsonl", folder).scores["per_answer_line"]
    assert len({line["question_id"] for line in lines}) == len(questions)


def test_verdicts_hold_the_ten_answers_and_what_the_answer_is_worth(folder: Path) -> None:
    _, answers = pair_with_questions(TEXTVQA, folder / "answers.jsonl", folder)
    verdicts = {json.loads(each.key)[1].split("?")[0]: each for each in TEXTVQA.score(answers, folder).verdicts}
    spots = {
        # Four of ten people say "redteal", and nobody "red,teal".
        "Which number is on the jersey in item 134": ("red,teal", "redteal", ("redteal", "red", "red teal"), 1.0),
        "How much is the item in item 34": ("lantern", "lantern", ("kettle", "lantern"), 0.3),  # one of ten people
        "What is written on the box in item 103": ("a few!", "few", ("dog", "maroon", "maroons"), 0.0),
    }
    for question, (prediction, parsed, reference, points) in spots.items():
        each = verdicts[question]
        assert (each.prediction, each.parsed, each.reference) == (prediction, parsed, reference)
        assert each.points == pytest.approx(points)


def test_other_than_ten_references_are_refused(copied: Path) -> None:
    file = copied / "TextVQA_0.5.1_val.json"
    document = json.loads(file.read_text())
    document["data"][5]["answers"].pop()
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r'val.json question 5: "answers" must be a list of 10 strings'):
        score_answers(TEXTVQA, copied / "answers.jsonl", copied)


def test_there_is_nothing_to_upload(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="textvqa has no upload file"):
        export_answers(TEXTVQA, folder / "answers.jsonl", folder, tmp_path)


def run_command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["eval_textvqa", *map(str, arguments)])
    eval_textvqa.main()


def test_llavas_command_prints_and_appends_the_lines_of_llava(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected = json.loads((folder / "expected.json").read_text())["llava_script_stdout"]
    arguments = ["--annotation-file", folder / "TextVQA_0.5.1_val.json"]
    results = tmp_path / "all.tsv"
    file = folder / "answers.jsonl"
    run_command_line(monkeypatch, *arguments, "--result-file", file, "--path_to_all_results", results)
    assert capsys.readouterr().out.split("\n") == [*expected, "", ""]
    assert results.read_text() == "TextVQA (Acc)\t71.42\n"


def test_llavas_command_scores_a_folder_of_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = read_answers(folder / "answers.jsonl")
    write_jsonl(tmp_path / "b.jsonl", rows)
    write_jsonl(tmp_path / "a.jsonl", rows[:10])
    (tmp_path / "notes.txt").write_text("no answers")
    arguments = ["--annotation-file", folder / "TextVQA_0.5.1_val.json"]
    run_command_line(monkeypatch, *arguments, "--result-dir", tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("a\nSamples: 10\n")
    assert printed.endswith("b\nSamples: 141\nAccuracy: 71.42%\n\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name what to score"),
        (["--result-dir", "."], r"no answers files \(\*.jsonl\) in \."),
        (["--result-file", "none.jsonl"], "no such file: none.jsonl"),
        (["--result-file", "empty"], "empty has no answers"),
    ],
)
def test_llavas_command_says_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    with pytest.raises(InputError, match=words):
        run_command_line(monkeypatch, "--annotation-file", folder / "TextVQA_0.5.1_val.json", *arguments)
