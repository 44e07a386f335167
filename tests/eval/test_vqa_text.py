import json
from pathlib import Path

import pytest

from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.metrics.contractions import VIZWIZ_CONTRACTIONS, VQA_CONTRACTIONS
from llava.eval.metrics.vqa_accuracy import normalize_vizwiz
from llava.eval.metrics.vqa_text import flatten_lines, normalize_m4c, normalize_punctuation, normalize_vqa


@pytest.mark.parametrize(
    ("table", "file"),
    [(VQA_CONTRACTIONS, "vqav2/contractions.json"), (VIZWIZ_CONTRACTIONS, "vizwiz/contractions.json")],
)
def test_contractions_are_the_official_ones(golden: Path, table: dict[str, str], file: str) -> None:
    assert table == json.loads((golden / "oracle" / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("pepsi-cola 1,000", "pepsicola 1000"),
        ("a, b-c", "b c"),
        ("x - y-z", "x yz"),
        ("The", ""),
        ("2.5", "2.5"),
        ("2.50.", "2.50"),
        (".5", ".5"),
        ("no.7", "no.7"),
        ("u.s.a.", "usa"),
        ("a.b", "ab"),
        ("None", "0"),
        ("ten eleven", "10 eleven"),
        ("the man and a dog", "man and dog"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("Im", "im"),
        ("10:30 $5 50% #1 a*b &", "10:30 $5 50% #1 a*b &"),
        ("(red) [blue]", "red blue"),
        ("CAFÉ", "café"),
        ("a\u00a0b", "b"),
    ],
)
def test_the_vqa_recipe(text: str, expected: str) -> None:
    assert normalize_vqa(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("McDonald's", "mcdonald 's"),
        ("let's", "let 's"),
        ("red,blue", "redblue"),
        ("who?me", "whome"),
        ("1,000-2,000", "1000 2000"),
        ("t-\tshirt", "t shirt"),
        ("  The\nred  dog ", "red dog"),
        ("?", ""),
        ("two", "2"),
        ("wheres", "where's"),
    ],
)
def test_the_textvqa_recipe(text: str, expected: str) -> None:
    assert normalize_m4c(text) == expected
    assert EvalAIAnswerProcessor()(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dont", "don’t"),
        ("cant", "can't"),
        ("don't", "don't"),
        ("couldn'tve", "couldn’t’ve"),
        ("isnt\nred", "isn’t red"),
    ],
)
def test_the_vizwiz_recipe_repairs_contractions_with_curly_apostrophes(text: str, expected: str) -> None:
    assert normalize_vizwiz(text) == expected


@pytest.mark.parametrize("periods", [32, 33, 40])
def test_only_the_first_32_periods_are_deleted(periods: int) -> None:
    assert normalize_punctuation("x." * periods) == "x" * min(periods, 32) + "x." * (periods - 32)


def test_periods_before_a_digit_do_not_count_among_the_32() -> None:
    assert normalize_punctuation("." + "9.5" * 2 + "a." * 32) == ".9.59.5" + "a" * 32


def test_the_rules_of_punctuation_look_at_the_original_text() -> None:
    # Deleting `/` leaves a space beside `-`, which changes nothing: there was none at first.
    assert normalize_punctuation("a /-b") == "a  b"


def test_line_breaks_and_tabs_become_spaces() -> None:
    assert flatten_lines("\ta\nb\t") == "a b"


def test_every_recorded_answer_is_rewritten_as_by_the_official_evaluator(golden: Path) -> None:
    folder = golden / "oracle" / "textvqa"
    expected = json.loads((folder / "expected.json").read_text())["main"]["per_answer_line"]
    answers = [json.loads(line)["text"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [normalize_m4c(answer) for answer in answers] == [line["processed"] for line in expected]
