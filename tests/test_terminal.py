"""Tables of the terminal: within its width, with every cell, in blocks that each name their rows."""

import pytest

from llava.terminal import PIPES, SPACES, find_width, lay_out, make_bar

NUMBERS = [
    ["TRIM @64", *(f"84.{n} 80.1-88.3" for n in range(9))],
    ["Random @64", *(f"61.{n} 57.0-65.5" for n in range(9))],
]
TITLES = ["Method", *(f"column {number}" for number in range(9))]


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("100", 100), ("120", 100), ("20", 60)])
def test_a_table_is_as_wide_as_the_terminal_and_never_above_100_columns(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert find_width() == width


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("frame", [PIPES, SPACES])
def test_columns_that_do_not_fit_go_into_further_blocks_with_the_rows_names(width, frame):
    text = lay_out(TITLES, NUMBERS, range(1, 10), frame, width)
    blocks = text.split("\n\n")
    assert len(blocks) > 1 and max(map(len, text.splitlines())) <= width
    for block in blocks:
        assert [word in block for word in ("Method", "TRIM @64", "Random @64")] == [True] * 3
    assert all(text.count(cell) == 1 for row in NUMBERS for cell in row[1:])


def test_long_texts_are_broken_before_columns_are_moved():
    question = "What is the color of the bus on the left of the picture, behind the tree with the yellow leaves?"
    text = lay_out(None, [[question, "red", "17 tokens"], ["Is it?", "no", "9 tokens"]], width=80)
    assert "\n\n" not in text and max(map(len, text.splitlines())) <= 80
    assert (
        " ".join(line[:40].strip() for line in text.splitlines()[:-1])
        .replace("  ", " ")
        .startswith("What is the color")
    )
    assert all(word in text for word in (*question.split(), "17 tokens", "9 tokens"))


def test_a_word_without_end_is_broken_too():
    text = lay_out(["Run", "Score"], [["x" * 500, "1.00"]], [1], PIPES, 80)
    assert text.count("x") == 500 and max(map(len, text.splitlines())) <= 80


def test_a_table_of_any_width_keeps_its_titles_in_one_line():
    first, rule, *rows = lay_out(["a long title of a column", "n"], [["x", "1"]], [1], PIPES).splitlines()
    assert first == "| a long title of a column | n |" and len(rule) == len(first) and len(rows) == 1


def test_a_bar_is_shown_in_a_terminal_and_silent_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr("llava.terminal.PATIENCE_SECONDS", 0)
    with make_bar("measuring", 3, "run") as bar:
        assert bar.disable
        bar.update(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with make_bar("measuring", 3, "run") as bar:
        bar.update(3)
    assert "measuring" in capsys.readouterr().err
