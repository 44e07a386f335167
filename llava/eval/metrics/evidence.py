"""What a benchmark's number is worth: intervals, paired differences, p-values. Images are the units of everything.

Questions about one image are right or wrong together more often than chance has it, so that an image is drawn, left out
or exchanged with all of its questions. A run is a `Sample`: per image the sums that its headline is computed from. A
weighted sum over images and the benchmark's own `combine` give the headline of any resample, whatever the headline is.

Intervals are BCa bootstrap intervals (Efron 1987, "Better bootstrap confidence intervals"), expanded for few images
with Student's t (Hesterberg 2015, "What teachers should know about the bootstrap"); where hardly an image differs from
the others, they reach as far as images not drawn could move the number (`unseen_share`). P-values exchange the two runs
image by image.
`docs/evidence.md` has the simulation that says how often they are right.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from llava.errors import InputError
from llava.eval.metrics.flips import Flips
from llava.eval.metrics.means import COUNT, POINTS

NUM_RESAMPLES = 2000
NUM_EXCHANGES = 9999
SEED = 20240917
TAIL = 0.025
"""On each side of a 95 % interval."""
LOWEST_P = 1e-10
"""Smaller p-values are given as this: the Fourier transform that they come from is no more exact."""
LATTICE_STEPS = (1, 10)
"""Points that are whole in one of these units (right or wrong; tenths) have an exact p-value."""
FEW_IMAGES = 10
"""So few images that differ from the others are too few for a bootstrap alone."""
CHUNK_ELEMENTS = 8_000_000
"""Weights that are in memory at once."""
NORMAL = NormalDist()

Combine = Callable[[Mapping[str, float]], float]
"""Computes a headline from the sums of a benchmark's tallies, by name (`Benchmark.combine`)."""


# ------------------------------------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Sample:
    """What one run scored, image by image.

    Attributes:
        images: name of each image.
        names: of the sums.
        sums: float64 [images, names], what the questions about an image add up to.
        strata: indices of the images that count towards the same names; each int64 [images of the stratum].
        combine: headline of summed-up rows.
        full_marks: the headline of a run without a mistake; of one without a right answer it is 0.
    """

    images: tuple[str, ...]
    names: tuple[str, ...]
    sums: Tensor
    strata: tuple[Tensor, ...]
    combine: Combine
    full_marks: float = 100.0

    @classmethod
    def of(cls, tallies: Mapping[str, Mapping[str, float]], combine: Combine, full_marks: float = 100.0) -> "Sample":
        """Make a sample of the sums of each image, by name (`Benchmark.tally_images`).

        Images that count towards different parts of a headline, such as MME's subtasks, are drawn apart: how many
        there are of each is a choice of the benchmark, not chance.

        Raises:
            InputError: there is no image.
        """
        if not tallies:
            raise InputError("no question counts towards the headline, so there is nothing to draw from")
        names = tuple(dict.fromkeys(name for tally in tallies.values() for name in tally))
        rows = [[float(tally.get(name, 0)) for name in names] for tally in tallies.values()]
        strata: dict[frozenset[str], list[int]] = {}
        for number, tally in enumerate(tallies.values()):
            strata.setdefault(frozenset(tally), []).append(number)
        return cls(
            images=tuple(tallies),
            names=names,
            sums=torch.tensor(rows, dtype=torch.float64),
            strata=tuple(map(torch.tensor, strata.values())),
            combine=combine,
            full_marks=full_marks,
        )

    @property
    def headline(self) -> float:
        return self.compute(self.sums.sum(0))

    def compute(self, sums: Tensor) -> float:
        """Return the headline of one row of sums, float64 [names]."""
        return self.combine(dict(zip(self.names, sums.tolist(), strict=True)))

    def compute_all(self, sums: Tensor) -> list[float]:
        """Return the headline of each row of sums, float64 [rows, names]."""
        return [self.combine(dict(zip(self.names, row, strict=True))) for row in sums.tolist()]


def check_paired(here: Sample, there: Sample) -> None:
    """Refuse two samples that are not of the same questions.

    Raises:
        InputError: they differ in images or in names.
    """
    if here.images != there.images or here.names != there.names:
        raise InputError("the two runs were not asked about the same images: compare what both answered")


# ----------------------------------------------------------------------------------------------------------- intervals
@dataclass(frozen=True)
class Interval:
    """A 95 % interval, in the unit of what it is about; both ends are finite, and `low` is at most `high`."""

    low: float
    high: float


def headline_interval(sample: Sample, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Interval:
    """Return the interval of a headline, within 0 and full marks."""

    def bound(share: float) -> tuple[float, float]:
        rest = (1 - share) * value
        return rest, rest + share * sample.full_marks

    value = sample.headline
    return find_interval([sample], lambda headlines: headlines[0], bound, num_resamples, seed)


def retained_interval(
    sample: Sample, full: Sample, num_resamples: int = NUM_RESAMPLES, seed: int = SEED
) -> Interval | None:
    """Return the interval of a run's headline in percent of the full model's; both are drawn together.

    A resample in which the full model has no point says nothing of a ratio and is left out.

    Returns:
        None where the full model's headline is not positive.

    Raises:
        InputError: the runs are not of the same questions.
    """
    check_paired(sample, full)
    here, there = sample.headline, full.headline
    if there <= 0:
        return None

    def divide(headlines: Sequence[float]) -> float | None:
        return 100 * headlines[0] / headlines[1] if headlines[1] > 0 else None

    def bound(share: float) -> tuple[float, float]:
        most, rest, reference = share * sample.full_marks, (1 - share) * here, (1 - share) * there
        return 100 * rest / (reference + most), 100 * (rest + most) / reference

    return find_interval([sample, full], divide, bound, num_resamples, seed)


def find_interval(
    samples: Sequence[Sample],
    statistic: Callable[[Sequence[float]], float | None],
    bound: Callable[[float], tuple[float, float]],
    num_resamples: int,
    seed: int,
) -> Interval:
    """Return the interval of a number that follows from the headlines of runs on the same images.

    Args:
        samples: the runs; each resample is the same images of all of them.
        statistic: the number, from the headline of each run; None where it is not defined.
        bound: the lowest and highest number if a share (0 to 1) of all images were of a kind that was not drawn.
        num_resamples, seed: of the bootstrap.
    """
    value = statistic([sample.headline for sample in samples])
    numbers = _apply(statistic, samples, draw_sums(samples, num_resamples, seed))
    drawn = [number for number in numbers if number is not None]
    num_images = len(samples[0].images)
    influences = leave_out(samples, statistic, value)
    ends = [value]
    if any(influences) and drawn:
        ends += bca_ends(value, drawn, influences, count_freedom(samples[0].strata, influences))
    # Where hardly an image differs from the others, the resamples know next to nothing of those that would.
    most_common = Counter(round(each, 9) for each in influences).most_common(1)[0][1]
    if num_images - most_common < FEW_IMAGES:
        ends += bound(unseen_share(num_images))
    return Interval(min(ends), max(ends))


def unseen_share(num_images: int) -> float:
    """Return how large a share of all images can be of a kind that none of those drawn is, a fraction below 1.

    The Clopper-Pearson limit of a share of which nothing was seen: more would have been seen in 97.5 % of cases.
    """
    return 1 - TAIL ** (1 / num_images)


def draw_sums(samples: Sequence[Sample], num_resamples: int, seed: int) -> list[Tensor]:
    """Draw images with replacement, the same ones for all runs, and sum up.

    In each stratum one image fewer is drawn than there are, and counts for more accordingly: the spread of a mean of m
    out of m is too small by the share 1 / m, which tells where a part of the headline has few images (Rao and Wu 1988,
    "Resampling inference with complex survey data").

    Returns:
        For each run float64 [resamples, names].
    """
    strata = tuple(tuple(stratum.tolist()) for stratum in samples[0].strata)
    rows = max(1, CHUNK_ELEMENTS // len(samples[0].images))
    parts: list[list[Tensor]] = [[] for _ in samples]
    for start in range(0, num_resamples, rows):
        weights = _draw_weights(strata, min(rows, num_resamples - start), seed + start)
        for part, sample in zip(parts, samples, strict=True):
            part.append(weights @ sample.sums)
    return [torch.cat(part) for part in parts]


# Runs of one benchmark, one after another, have the same images: drawing takes most of the time.
@lru_cache(maxsize=1)
def _draw_weights(strata: tuple[tuple[int, ...], ...], num_resamples: int, seed: int) -> Tensor:
    """Draw images in each stratum; the weight of each in each resample, float64 [resamples, images]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(num_resamples, sum(map(len, strata)), dtype=torch.float64)
    for stratum in map(torch.tensor, strata):
        size = max(1, len(stratum) - 1)
        chosen = stratum[torch.randint(len(stratum), (num_resamples, size), generator=generator)]
        weights.scatter_add_(1, chosen, torch.full(chosen.shape, len(stratum) / size, dtype=torch.float64))
    return weights


def leave_out(
    samples: Sequence[Sample], statistic: Callable[[Sequence[float]], float | None], value: float
) -> list[float]:
    """Return how far the number falls when each image is left out, less the mean of its stratum (jackknife).

    An image that is alone in its stratum has no spread to learn from: its influence is 0.
    """
    influences = torch.zeros(len(samples[0].images), dtype=torch.float64)
    for stratum in samples[0].strata:
        if len(stratum) == 1:
            continue
        rest = [sample.sums.sum(0) - sample.sums[stratum] for sample in samples]
        falls = [value - (value if number is None else number) for number in _apply(statistic, samples, rest)]
        fall = torch.tensor(falls, dtype=torch.float64)
        influences[stratum] = fall - fall.mean()
    # What is left of equal numbers is rounding.
    return influences.where(influences.abs() > 1e-12 * max(abs(value), 1.0), torch.zeros(())).tolist()


def count_freedom(strata: Sequence[Tensor], influences: Sequence[float]) -> int:
    """Return the degrees of freedom of the spread, at least 1; of a single stratum the images less one.

    Strata of few images can make up most of the spread (Satterthwaite 1946).
    """
    squares = torch.tensor(influences, dtype=torch.float64) ** 2
    spreads = [(float(squares[stratum].sum()), len(stratum) - 1) for stratum in strata if len(stratum) > 1]
    total = sum(spread for spread, _ in spreads)
    return max(1, round(total**2 / sum(spread**2 / freedom for spread, freedom in spreads)))


def bca_ends(value: float, drawn: Sequence[float], influences: Sequence[float], freedom: int) -> tuple[float, float]:
    """Return the ends of the BCa interval.

    Args:
        value: the number itself.
        drawn: of each resample, at least one.
        influences: of each image (`leave_out`), not all 0.
        freedom: degrees of freedom of the spread, at least 1: the normal quantile gives way to Student's t.
    """
    ordered = sorted(drawn)
    # 1. Bias: where the number lies among the resamples; of equal ones half count.
    tolerance = 1e-9 * max(abs(value), 1.0)
    below = sum(number < value - tolerance for number in ordered)
    equal = sum(number <= value + tolerance for number in ordered) - below
    bias = NORMAL.inv_cdf(min(max((below + equal / 2) / len(ordered), 1 / len(ordered)), 1 - 1 / len(ordered)) or 0.5)
    # 2. Acceleration: skewness of the influences.
    squares = math.fsum(each**2 for each in influences)
    skew = math.fsum(each**3 for each in influences) / (6 * squares**1.5)
    # 3. The two quantiles.
    reach = student_quantile(freedom)
    ends = []
    for side in (-reach, reach):
        shifted = bias + side
        # Beyond its pole the correction has no meaning; the end is then the extreme resample.
        stretch = 1 - skew * shifted
        level = NORMAL.cdf(bias + shifted / stretch) if stretch > 0 else float(shifted > 0)
        ends.append(_quantile(ordered, level))
    return min(ends), max(ends)


@cache
def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by its distribution function in closed form and bisection."""
    low, high = NORMAL.inv_cdf(1 - TAIL), 13.0  # that of one degree of freedom is 12.7
    if freedom > 1000:
        return low * (1 + (low**2 + 1) / (4 * freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < 1 - TAIL else (low, middle)
    return low


def _student_cdf(value: float, freedom: int) -> float:
    """Return the distribution function of Student's t at a positive value (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = math.cos(angle) if freedom % 2 else 1.0
    total = 0.0 if freedom == 1 else term
    for step in range(2 + freedom % 2, freedom - 1, 2):
        term *= square * (step - 1) / step
        total += term
    inner = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return 0.5 + inner / 2


def _quantile(ordered: Sequence[float], level: float) -> float:
    place = min(max(level * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    first = math.floor(place)
    second = min(first + 1, len(ordered) - 1)
    return ordered[first] + (place - first) * (ordered[second] - ordered[first])


def _apply(
    statistic: Callable[[Sequence[float]], float | None], samples: Sequence[Sample], sums: Sequence[Tensor]
) -> list[float | None]:
    """Compute the number for each row of the runs' sums, float64 [rows, names] each."""
    columns = [sample.compute_all(rows) for sample, rows in zip(samples, sums, strict=True)]
    return [statistic(headlines) for headlines in zip(*columns, strict=True)]


# --------------------------------------------------------------------------------------------------------- differences
@dataclass(frozen=True)
class PairedDifference:
    """One run less another one on the same questions.

    Attributes:
        value: difference of the headlines, in their unit.
        interval: of `value`.
        p_value: how likely so large a difference is, either way, if it makes no difference which run answered; above
            0 and at most 1.
        num_gained, num_lost: questions (groups) that only this run has right, or only the other one.
        agreement: percent of questions on which both are right or both are wrong.
    """

    value: float
    interval: Interval
    p_value: float
    num_gained: int
    num_lost: int
    agreement: float


def paired_difference(
    sample: Sample,
    other: Sample,
    flips: Flips,
    num_resamples: int = NUM_RESAMPLES,
    num_exchanges: int = NUM_EXCHANGES,
    seed: int = SEED,
) -> PairedDifference:
    """Compare two runs on the same questions.

    Args:
        sample, other: the runs.
        flips: of their questions.
        num_resamples: of the interval.
        num_exchanges: of the p-value, where it is not exact.
        seed: of both.

    Raises:
        InputError: the runs are not of the same questions.
    """
    check_paired(sample, other)
    value = sample.headline - other.headline

    def bound(share: float) -> tuple[float, float]:
        rest, most = (1 - share) * value, share * sample.full_marks
        return rest - most, rest + most

    def subtract(headlines: Sequence[float]) -> float:
        return headlines[0] - headlines[1]

    return PairedDifference(
        value=value,
        interval=find_interval([sample, other], subtract, bound, num_resamples, seed),
        p_value=exchange_p(sample, other, num_exchanges, seed),
        num_gained=flips.num_gained,
        num_lost=flips.num_lost,
        agreement=flips.agreement,
    )


def exchange_p(sample: Sample, other: Sample, num_exchanges: int = NUM_EXCHANGES, seed: int = SEED) -> float:
    """Return the two-sided p-value of a difference of headlines, by exchanging the two runs image by image.

    If it makes no difference which run answered, the two may be exchanged on any set of images, each with all of its
    questions. A mean of points has an exact value (`sign_flip_p`), which with one right-or-wrong question per image is
    McNemar's exact test (1947). For other headlines `num_exchanges` random sets are tried.
    """
    if set(sample.names) == {POINTS, COUNT}:
        place = sample.names.index(POINTS)
        differences = sample.sums[:, place] - other.sums[:, place]
        for step in LATTICE_STEPS:
            whole = (differences * step).round()
            if (differences * step - whole).abs().max() < 1e-6:
                return sign_flip_p([int(each) for each in whole.tolist()])
    observed = abs(sample.headline - other.headline)
    generator, gap = torch.Generator().manual_seed(seed), sample.sums - other.sums
    # Images on which the runs agree change nothing, whichever way.
    gap = gap[gap.abs().sum(1) > 0]
    if not len(gap):
        return 1.0
    num_extreme, rows = 0, max(1, CHUNK_ELEMENTS // len(gap))
    for start in range(0, num_exchanges, rows):
        size = min(rows, num_exchanges - start)
        moved = torch.randint(2, (size, len(gap)), generator=generator).double() @ gap
        here = sample.compute_all(sample.sums.sum(0) - moved)
        there = other.compute_all(other.sums.sum(0) + moved)
        limit = observed - 1e-9 * max(observed, 1.0)
        num_extreme += sum(abs(first - second) >= limit for first, second in zip(here, there, strict=True))
    return (1 + num_extreme) / (1 + num_exchanges)


def sign_flip_p(differences: Sequence[int]) -> float:
    """Return the exact share of all choices of signs that give at least as large a sum, either way.

    Of d images with one flip each this is the binomial test of McNemar (1947). The distribution of the sum comes from
    its characteristic function, the product of the cosines, by a Fourier transform.

    Args:
        differences: whole numbers, one per image.
    """
    sizes = Counter(abs(each) for each in differences if each)
    total, observed = sum(size * number for size, number in sizes.items()), abs(sum(differences))
    if observed == 0:
        return 1.0
    length = 2 * total + 1
    angles = 2 * math.pi * torch.arange(total + 1, dtype=torch.float64) / length
    curve = torch.ones_like(angles)
    for size, number in sizes.items():
        curve *= torch.cos(angles * size) ** number
    shares = torch.fft.irfft(torch.complex(curve, torch.zeros_like(curve)), n=length)
    # The sum is symmetric: each positive value stands for its negative, too.
    return min(1.0, max(LOWEST_P, 2 * float(shares[observed : total + 1].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of a family of tests by Holm's step-down rule (1979); each stays in its place.

    Of those at most 0.05 after it, the chance of any false one is at most 5 %, however the tests depend on one another.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
