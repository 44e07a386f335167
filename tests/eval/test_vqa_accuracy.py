import pytest

from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.metrics.vqa_accuracy import (
    average_precision,
    f1_score,
    grade_textvqa,
    grade_vizwiz,
    grade_vqa,
    grade_vqa_before_2021,
    leave_one_out,
    rank_references,
    round_half_even,
    round_half_up,
    summarize_grades,
)


@pytest.mark.parametrize(("num_equal", "expected"), enumerate([0, 0.3, 0.6, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
def test_k_of_ten_references_give_the_official_accuracy(num_equal: int, expected: float) -> None:
    references = ["red"] * num_equal + [f"other {number}" for number in range(10 - num_equal)]
    assert leave_one_out("red", references) == pytest.approx(expected, abs=1e-12)
    assert leave_one_out("red", references[::-1]) == pytest.approx(expected, abs=1e-12)


def test_fewer_references_are_left_out_one_at_a_time_too() -> None:
    assert leave_one_out("red", ["red", "red", "blue"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


def test_unanimous_references_of_vqav2_are_compared_as_they_are() -> None:
    assert grade_vqa("Yes", ["yes"] * 10) == 0
    assert grade_vqa("yes.", ["yes"] * 10) == 0
    assert grade_vqa(" yes\n", ["yes"] * 10) == 1
    assert grade_vqa("Yes.", ["yes"] * 9 + ["no"]) == 1


def test_references_of_vqav2_that_differ_in_white_space_alone_are_unanimous() -> None:
    assert grade_vqa("Yes", ["yes"] * 9 + [" yes\t"]) == 0
    assert grade_vqa("the", ["the"] * 9 + ["a"]) == 1


def test_vqav2_before_2021_rewrote_the_prediction_always_and_of_the_references_only_punctuation() -> None:
    assert grade_vqa_before_2021("Yes", ["yes"] * 10) == 1
    assert grade_vqa_before_2021("two", ["two"] * 10) == 0
    assert grade_vqa_before_2021("t-shirt", ["t-shirt"] * 9 + ["no"]) == 1
    assert grade_vqa_before_2021("two", ["two"] * 9 + ["no"]) == 0
    assert grade_vqa("two", ["two"] * 9 + ["no"]) == 1


def test_references_of_vizwiz_are_never_rewritten() -> None:
    assert grade_vizwiz("Mug", ["mug"] * 10) == 1
    assert grade_vizwiz("mug", ["Mug"] * 10) == 0
    assert grade_vizwiz("mug", [" mug"] * 10) == 0
    assert grade_vizwiz("two", ["two"] * 10) == 0
    assert grade_vizwiz("dont", ["don't"] * 10) == 0
    assert grade_vizwiz("cant", ["can't"] * 10) == 1


def test_both_sides_of_textvqa_are_always_rewritten() -> None:
    assert grade_textvqa("Two", ["2."] * 10) == 1
    assert grade_textvqa("Mcdonald's", ["MCDONALD'S"] * 10) == 1
    assert TextVQAAccuracyEvaluator().eval_pred_list(
        [{"pred_answer": "Two", "gt_answers": ["2."] * 10}, {"pred_answer": "x", "gt_answers": ["2"] * 10}]
    ) == pytest.approx(0.5)


def test_references_are_listed_by_how_many_people_gave_them() -> None:
    assert rank_references(["cat", "dog", "cow", "dog", "cow", "dog"]) == ("dog", "cow", "cat")
    assert rank_references(["b", "a", "b", "a"]) == ("b", "a")


def test_ties_are_rounded_as_the_python_of_each_scorer_does() -> None:
    assert (round_half_up(0.625), round_half_even(0.625)) == (0.63, 0.62)
    assert (round_half_up(2.675), round_half_even(2.675)) == (2.67, 2.67)


def test_grades_are_averaged_overall_and_per_group() -> None:
    table = summarize_grades([1.0, 0.0, 0.3], {"perAnswerType": ["a", "b", "a"]}, round_half_even)
    assert table["accuracy"] == {"overall": 43.33, "perAnswerType": {"a": 65.0, "b": 0.0}}
    assert table["accuracy_unrounded"]["overall"] == pytest.approx(130 / 3)


# Values of scikit-learn's average_precision_score and f1_score.
@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([True, False, True, False], [1.0, 1.0, 0.0, 0.0], 0.5),
        ([True, False, True, True], [0.9, 0.8, 0.7, 0.1], 0.8055555555555555),
        ([False, True, True, False, True], [1.0, 1.0, 0.0, 0.0, 0.0], 0.5666666666666667),
        ([True, True], [0.0, 0.0], 1.0),
        ([False, False], [1.0, 0.0], 0.0),
    ],
)
def test_average_precision_is_that_of_scikit_learn(labels: list[bool], scores: list[float], expected: float) -> None:
    assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_f1_is_zero_where_nothing_is_positive() -> None:
    assert f1_score([True, True, False], [True, False, True]) == 0.5
    assert f1_score([False], [False]) == 0.0
