"""Intervals, paired differences and p-values of headlines."""

import dataclasses
import math
import random
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Verdict
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.judge import ExactJudge
from llava.eval.metrics.evidence import (
    NUM_EXCHANGES,
    Sample,
    draw_sums,
    exchange_p,
    headline_interval,
    holm,
    paired_difference,
    retained_interval,
    sign_flip_p,
    student_quantile,
)
from llava.eval.metrics.flips import Flips, count_flips
from llava.eval.results import Result, score_answers
from llava.eval.samples import make_sample, pair_samples
from tests.eval.test_promises import FOLDERS

GQA, POPE, MME = BENCHMARKS["gqa"], BENCHMARKS["pope"], BENCHMARKS["mme"]
NO_FLIPS = Flips(0, 0, 0, 0)


@pytest.fixture(params=BENCHMARKS)
def scored(request: pytest.FixtureRequest, golden: Path) -> tuple[Benchmark, Result]:
    """The made-up answers to each benchmark."""
    task = BENCHMARKS[request.param]
    root = golden / "oracle" / FOLDERS.get(task.name, task.name)
    judge = None if task.uses_judge == "never" else ExactJudge(task)
    return task, score_answers(task, root / "answers.jsonl", root, allow_partial=True, judge=judge)


def verdicts_of(points: list[float], per_image: int = 1) -> list[Verdict]:
    return [Verdict(f"[{n}]", "", "", each, image=f"{n // per_image}.png") for n, each in enumerate(points)]


def sample_of(points: list[float], per_image: int = 1) -> Sample:
    return make_sample(GQA, verdicts_of(points, per_image))


# ------------------------------------------------------------------------------------------------- weighted headlines
def test_a_headline_of_sums_over_images_is_the_headline_of_the_verdicts(scored: tuple[Benchmark, Result]) -> None:
    task, result = scored
    assert task.headline(result.verdicts) == result.headline  # to the bit
    assert make_sample(task, result.verdicts).headline == pytest.approx(result.headline, abs=1e-9)


def test_an_image_that_is_drawn_twice_counts_like_two_images(scored: tuple[Benchmark, Result]) -> None:
    task, result = scored
    sample = make_sample(task, result.verdicts)
    name = sample.images[0]
    twice = [*result.verdicts]
    for verdict in result.verdicts:
        if (verdict.image or verdict.key) == name:
            twice.append(dataclasses.replace(verdict, key=f"again {verdict.key}", image="again"))
    assert sample.compute(sample.sums.sum(0) + sample.sums[0]) == pytest.approx(task.headline(twice), abs=1e-9)


def test_every_benchmark_has_an_interval_around_its_headline(scored: tuple[Benchmark, Result]) -> None:
    task, result = scored
    sample = make_sample(task, result.verdicts)
    interval = headline_interval(sample, num_resamples=500)
    assert interval.low <= result.headline <= interval.high
    # LLaVA-Bench relates ratings: an answer can be better than the reference.
    assert 0 <= interval.low < interval.high <= task.full_marks
    assert retained_interval(sample, sample, num_resamples=500).low <= 100


def test_resampling_draws_whole_images_and_keeps_the_size_of_each_stratum() -> None:
    verdicts = [
        Verdict(f"{image} {number}", "", "yes", 1.0, category=name, image=image, unit=unit)
        for name, count in (("count", 3), ("color", 5))
        for image in (f"{name}{number}" for number in range(count))
        for number, unit in enumerate(("question", "question", "pair"))
    ]
    sample = make_sample(MME, verdicts)
    (sums,) = draw_sums([sample], 50, seed=1)
    totals = dict(zip(sample.names, sums.T, strict=True))
    for name, count in (("count", 3), ("color", 5)):
        assert totals[f"{name} question count"].tolist() == pytest.approx([2 * count] * 50)
        assert totals[f"{name} pair count"].tolist() == pytest.approx([count] * 50)
    assert sample.headline == 400


def test_five_thousand_questions_take_well_under_a_second() -> None:
    generator = random.Random(0)
    sample, other = (sample_of([float(generator.random() < 0.6) for _ in range(5000)], 2) for _ in range(2))
    start = time.process_time()
    headline_interval(sample)
    assert time.process_time() - start < 1.0
    start = time.process_time()
    paired_difference(sample, other, NO_FLIPS)
    assert time.process_time() - start < 1.5


def test_the_same_call_gives_the_same_interval_and_another_seed_another_one() -> None:
    sample = sample_of([1.0, 0.0, 1.0] * 30)
    assert headline_interval(sample) == headline_interval(sample)
    points = [number % 10 / 9 for number in range(200)]
    assert headline_interval(sample_of(points)) != headline_interval(sample_of(points), seed=2)


# ------------------------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("points", [[1.0], [0.0], [1.0] * 40, [0.0] * 40, [0.5] * 40, [1.0, 0.0], [1.0] + [0.0] * 99])
def test_poor_data_have_a_finite_interval_that_holds_the_value(points: list[float]) -> None:
    sample, full = sample_of(points), sample_of([1.0] * len(points))
    for value, interval in (
        (sample.headline, headline_interval(sample)),
        (sample.headline, retained_interval(sample, full)),
        (sample.headline - 100, paired_difference(sample, full, NO_FLIPS).interval),
    ):
        assert all(map(math.isfinite, (interval.low, interval.high)))
        assert interval.low - 1e-9 <= value <= interval.high + 1e-9
        assert interval.low < interval.high


def test_all_right_has_the_clopper_pearson_limit() -> None:
    interval = headline_interval(sample_of([1.0] * 60))
    assert interval.high == 100
    assert interval.low == pytest.approx(100 * 0.025 ** (1 / 60))


def test_questions_about_one_image_make_the_interval_wider_than_as_many_images() -> None:
    points = [float(number // 5 % 2) for number in range(500)]  # images are all right or all wrong
    together, apart = headline_interval(sample_of(points, 5)), headline_interval(sample_of(points))
    assert together.high - together.low == pytest.approx(math.sqrt(5) * (apart.high - apart.low), rel=0.1)


def test_a_single_image_tells_nothing_however_many_questions_it_has() -> None:
    interval = headline_interval(sample_of([1.0, 0.0] * 500, 1000))
    assert interval.high - interval.low > 90


def test_nothing_is_retained_of_a_model_that_has_no_point() -> None:
    assert retained_interval(sample_of([1.0, 0.0]), sample_of([0.0, 0.0])) is None


def test_a_run_against_itself_retains_all_within_what_was_not_drawn() -> None:
    sample = sample_of([1.0, 0.0] * 200)
    retained, difference = retained_interval(sample, sample), paired_difference(sample, sample, NO_FLIPS)
    assert 97 < retained.low < 100 < retained.high < 103
    assert difference.p_value == 1.0
    assert -1 < difference.interval.low < 0 < difference.interval.high < 1


def test_runs_that_share_their_mistakes_have_a_narrow_difference() -> None:
    generator = random.Random(5)
    points = [float(generator.random() < 0.6) for _ in range(1000)]
    near = [each if generator.random() < 0.98 else 1 - each for each in points]
    far = generator.sample(points, 1000)
    narrow, wide = (paired_difference(sample_of(points), sample_of(each), NO_FLIPS).interval for each in (near, far))
    assert narrow.high - narrow.low < 0.4 * (wide.high - wide.low)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (10, 2.2281), (29, 2.0452), (5000, 1.9604)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


# ---------------------------------------------------------------------------------------------------------- p-values
@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (12, 3), (40, 61), (0, 30)])
def test_one_right_or_wrong_question_per_image_gives_mcnemars_exact_p(gained: int, lost: int) -> None:
    total = gained + lost
    tail = sum(math.comb(total, number) for number in range(max(gained, lost), total + 1)) / 2**total
    exact = min(1.0, 2 * tail)
    first, second = [1.0] * gained + [0.0] * lost + [1.0] * 50, [0.0] * gained + [1.0] * lost + [1.0] * 50
    assert exchange_p(sample_of(first), sample_of(second)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("differences", [[3, -1, 2, 2], [1, 1, 1, -4], [5], [2, 2, 2, 2, 2, -1, -3]])
def test_the_p_of_several_questions_per_image_counts_all_choices_of_signs(differences: list[int]) -> None:
    sums = [
        abs(sum(map(math.prod, zip(signs, differences, strict=True))))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_flips_that_come_by_images_are_weaker_evidence_than_as_many_alone() -> None:
    better, worse = [1.0] * 40 + [0.0] * 60, [0.0] * 40 + [0.0] * 60
    assert exchange_p(sample_of(better), sample_of(worse)) < 1e-9
    assert exchange_p(sample_of(better, 20), sample_of(worse, 20)) == pytest.approx(0.5)


def test_random_exchanges_agree_with_the_exact_p() -> None:
    generator = random.Random(3)
    first, second = ([generator.choice([0.0, 0.3, 0.6, 0.9, 1.0]) for _ in range(80)] for _ in range(2))
    exact = exchange_p(sample_of(first), sample_of(second))
    third = [each / 7 for each in first], [each / 7 for each in second]  # on no lattice
    assert exchange_p(*map(sample_of, third)) == pytest.approx(exact, abs=0.02)


def test_no_p_value_is_zero_or_above_one() -> None:
    assert sign_flip_p([1] * 5000) > 0
    yes = [Verdict(f"{n}", "", "yes", 1.0, parsed="yes", category="random", image=f"{n}") for n in range(100)]
    no = [dataclasses.replace(verdict, points=0.0, parsed="no") for verdict in yes]
    here, there, flips = pair_samples(POPE, yes, no)
    difference = paired_difference(here, there, flips)
    assert (difference.value, difference.num_gained, difference.agreement) == (100.0, 100, 0.0)
    assert difference.p_value == 1 / (1 + NUM_EXCHANGES)


def test_holms_correction_is_that_of_his_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# -------------------------------------------------------------------------------------------------------------- pairs
def test_two_runs_are_compared_on_what_both_answered() -> None:
    here, there = verdicts_of([1.0, 1.0, 0.0, 0.0]), verdicts_of([1.0, 0.0, 1.0, 0.0, 1.0])
    mine, other, flips = pair_samples(GQA, here, there)
    assert mine.images == other.images == ("0.png", "1.png", "2.png", "3.png")
    assert (flips, flips.agreement) == (Flips(1, 1, 1, 1), 50.0)


def test_runs_of_different_images_are_refused() -> None:
    with pytest.raises(InputError, match="no answered question in common"):
        pair_samples(GQA, verdicts_of([1.0])[:1], [])
    with pytest.raises(InputError, match="were not asked about the same images"):
        paired_difference(sample_of([1.0]), sample_of([1.0, 0.0]), NO_FLIPS)
    with pytest.raises(InputError, match="no question counts towards the headline"):
        Sample.of({}, GQA.combine)


def test_a_headline_of_ones_own_needs_sums() -> None:
    class Own(type(GQA)):
        def headline(self, verdicts: list[Verdict]) -> float:
            return 1.0

    with pytest.raises(InputError, match=r"defines headline\(\): its intervals need tally\(\) and combine\(\)"):
        make_sample(Own(), verdicts_of([1.0]))


def test_no_question_agrees_in_full() -> None:
    assert count_flips([]).agreement == 100.0


# --------------------------------------------------------------------------------------------------------- simulation
def test_intervals_cover_the_truth_where_questions_share_images_and_single_questions_do_not() -> None:
    """200 benchmarks of 80 images with 10 questions each: a bootstrap over questions would hold the truth far less."""
    generator = torch.Generator().manual_seed(11)
    covered = {"images": 0, "questions": 0}
    for _ in range(200):
        # An image's own accuracy is 0.5 or 0.9, so that its questions go together; the truth is 0.7.
        chance = 0.5 + 0.4 * torch.randint(2, (80, 1), generator=generator)
        points = (torch.rand(80, 10, generator=generator) < chance).double()
        for unit, per_image in (("images", 10), ("questions", 1)):
            interval = headline_interval(sample_of(points.flatten().tolist(), per_image), num_resamples=400)
            covered[unit] += interval.low <= 70 <= interval.high
    assert 0.92 <= covered["images"] / 200 <= 0.985
    assert covered["questions"] / 200 < 0.90
