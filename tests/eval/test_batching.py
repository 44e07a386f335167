import random
from pathlib import Path

import pytest

from llava.eval.batching import batch_by_length, plan_units, take_chunk
from llava.eval.benchmark import Question


def ask(identity: int, *images: str) -> Question:
    return Question(id=identity, prompt="Is it?", images=tuple(map(Path, images)))


def shuffled_questions(num_questions: int, num_images: int) -> list[Question]:
    numbers = list(range(num_questions))
    random.Random(5).shuffle(numbers)
    return [ask(number, f"{number % num_images}.jpg") for number in numbers]


@pytest.mark.parametrize("num_workers", [1, 8])
@pytest.mark.parametrize("limit", [1, 8, 32, 512])
@pytest.mark.parametrize(("num_questions", "num_images"), [(1, 1), (50, 7), (500, 3), (2000, 90)])
def test_units_hold_every_question_once_and_stay_within_their_limit(
    limit: int, num_questions: int, num_images: int, num_workers: int
) -> None:
    questions = shuffled_questions(num_questions, num_images)
    units = plan_units(questions, limit, num_workers)
    assert sorted(question.id for unit in units for question in unit) == list(range(num_questions))
    assert all(1 <= len(unit) <= limit for unit in units)


def test_equal_images_meet_in_one_unit_where_they_fit() -> None:
    units = plan_units(shuffled_questions(9 * 400, 400), 32)
    places = {}
    for number, unit in enumerate(units):
        for question in unit:
            places.setdefault(question.images, set()).add(number)
    assert all(len(units_of_image) == 1 for units_of_image in places.values())


def test_a_small_benchmark_is_still_cut_for_many_workers() -> None:
    questions = [ask(number, f"{number}.jpg") for number in range(218)]
    assert len(plan_units(questions, 64, num_workers=8)) >= 24
    assert len(plan_units(questions, 64)) == 4


def test_text_alone_and_several_images_are_groups_of_their_own() -> None:
    questions = [ask(1, "a", "b"), ask(2), ask(3, "a"), ask(4), ask(5, "a", "b")]
    units = plan_units(questions, 64)
    assert [question.id for unit in units for question in unit] == [1, 5, 2, 4, 3]


def test_no_question_makes_no_unit() -> None:
    assert plan_units([], 8) == []


def test_batches_hold_neighbours_in_length_and_ties_keep_their_order() -> None:
    batches = batch_by_length(["ccc", "a", "bb", "b", "aa"], len, lambda number, longest: number <= 2)
    assert batches == [["a", "b"], ["bb", "aa"], ["ccc"]]


def test_long_items_stand_in_smaller_batches_where_space_is_limited_and_no_item_is_refused() -> None:
    def allow(number: int, longest: int) -> bool:
        return number == 1 or number * longest <= 6

    items = ["dddd", "a", "cc", "b", "eeeeeeeee", "bb"]
    assert batch_by_length(items, len, allow) == [["a", "b", "cc"], ["bb"], ["dddd"], ["eeeeeeeee"]]


def test_groups_stay_together_and_the_longest_so_far_counts() -> None:
    def allow(number: int, longest: int) -> bool:
        return number * longest <= 6

    items = ["aaa", "b", "a", "bb", "c", "cc"]
    assert batch_by_length(items, len, allow, lambda item: "abc".index(item[0])) == [
        ["a", "aaa"],
        ["b", "bb", "c"],
        ["cc"],
    ]


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 9, 12])
def test_chunks_are_consecutive_slices_that_make_the_whole(num_chunks: int) -> None:
    chunks = [take_chunk(range(9), num_chunks, index) for index in range(num_chunks)]
    assert [item for chunk in chunks for item in chunk] == list(range(9))
    assert len(chunks[0]) == -(-9 // num_chunks)


def test_a_chunk_past_the_end_is_empty() -> None:
    assert take_chunk(range(9), 4, 3) == []
