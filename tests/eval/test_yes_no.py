import pytest

from llava.eval.metrics.yes_no import count_yes_no, parse_yes_no


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No", "no"),
        ("no, not at all", "no"),
        ("Yes, but not clearly", "no"),
        ("There is no dog", "no"),
        ("Yes", "yes"),
        ("", "yes"),
        ("NO", "yes"),
        ("None", "yes"),
        ("no-one", "yes"),
        ("don't", "yes"),
        ("Yes\nno", "yes"),
        ("Yes\tno", "yes"),
        ("Yes. No", "yes"),
        ("Sure. No", "yes"),
        (".no", "yes"),
        ("n,o", "no"),
    ],
)
def test_answers_are_read_as_the_official_script_reads_them(text: str, read: str) -> None:
    assert parse_yes_no(text) == read


def test_counts_take_every_label_but_no_as_yes() -> None:
    counts = count_yes_no([("yes", "yes"), ("yes", "No"), ("yes", "no"), ("no", "no"), ("no", "maybe")])
    assert (counts.true_positive, counts.false_positive, counts.true_negative, counts.false_negative) == (2, 1, 1, 1)
    assert counts.num_questions == 5
    assert counts.yes_ratio == pytest.approx(3 / 5)
    assert counts.f1 == pytest.approx(2 / 3)


def test_ratios_of_nothing_are_zero() -> None:
    nothing_yes = count_yes_no([("no", "no"), ("no", "yes")])
    assert (nothing_yes.precision, nothing_yes.recall, nothing_yes.f1) == (0, 0, 0)
    empty = count_yes_no([])
    assert (empty.accuracy, empty.yes_ratio) == (0, 0)
