"""How often the intervals and p-values of `llava.eval.metrics.evidence` are right, on benchmarks with a known truth.

Simulated benchmarks have images with several questions, which are right or wrong together. Printed are the share of
95 % intervals that hold the truth, the share of comparisons of equal methods with a false win, and how large a true
difference the real benchmarks can see.

    python -m scripts.bench.evidence
"""
# ruff: noqa: T201

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist, fmean, stdev

from scripts.bench import side_by_side

PARTS = ("coverage", "paired", "wins", "power")


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    parser.add_argument("--runs", type=int, default=1000, help="simulated benchmarks per line")
    parser.add_argument("--flips", type=float, nargs="+", default=[0.05, 0.10], help="shares of questions that flip")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch
from torch import Tensor
from torch.distributions import Beta

from llava.errors import run_command
from llava.eval.benchmark import Verdict
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.mme import PERCEPTION
from llava.eval.metrics.evidence import (
    Interval,
    Sample,
    exchange_p,
    headline_interval,
    holm,
    paired_difference,
    retained_interval,
)
from llava.eval.metrics.flips import Flips

LEVEL, POWER = 0.05, 0.8
NUM_METHODS = 13
NEAR = 0.01
"""How far the true accuracy of a run is from the design's, at most."""
CORRELATION = 0.3
"""Of two questions about an image: how far the image decides whether they are right, 0 to 1."""
FLIP_CORRELATION = 0.1
"""The same for flips: how far the image decides which questions a method gains and loses."""
GRADES = (0.3, 0.6, 0.9, 1.0)
"""What a right answer of a VQA-like benchmark is worth; all are as frequent."""
MME_IMAGES = dict(zip(PERCEPTION, (30, 30, 30, 30, 147, 170, 200, 200, 200, 20), strict=True))
POPE_CATEGORIES = ("adversarial", "popular", "random")
EXCHANGES = 999
"""Of p-values that are not exact; the smallest, 0.001, is below what 13 methods need."""


@dataclass(frozen=True)
class Design:
    """A simulated benchmark.

    Attributes:
        name: in the table.
        task: whose headline it has: `gqa` (mean of right or wrong), `textvqa` (mean of grades), `pope`, `mme`.
        num_images, num_questions: spread as evenly as can be; MME has two questions per image, POPE a multiple of six.
        accuracy: of a question, 0 to 1.
    """

    name: str
    task: str
    num_images: int
    num_questions: int
    accuracy: float

    @cached_property
    def counts(self) -> Tensor:
        """Questions of each image, int64 [images]."""
        share, rest = divmod(self.num_questions, self.num_images)
        return torch.full((self.num_images,), share) + (torch.arange(self.num_images) < rest)

    @cached_property
    def asked(self) -> Tensor:
        """Whether an image has a question of a number, bool [images, most questions of an image]."""
        return torch.arange(int(self.counts.max())) < self.counts[:, None]

    @cached_property
    def template(self) -> Sample:
        """A sample of the right names and strata."""
        task = BENCHMARKS[self.task]
        tallies = [self._tally(number) for number in range(self.num_images)]
        return Sample.of(
            dict(zip(map(str, range(self.num_images)), tallies, strict=True)), task.combine, task.full_marks
        )

    def _tally(self, number: int) -> dict[str, float]:
        task, verdicts = BENCHMARKS[self.task], [Verdict("", "", "yes", 1.0, parsed="yes")]
        if self.task == "mme":
            verdicts = [
                Verdict("", "", "", 1.0, category=self.subtasks[number], unit=unit) for unit in ("question", "pair")
            ]
        if self.task == "pope":
            verdicts = [Verdict("", "", "yes", 1.0, parsed="yes", category=name) for name in POPE_CATEGORIES]
        return {name: 0.0 for verdict in verdicts for name in task.tally(verdict)}

    @cached_property
    def subtasks(self) -> list[str]:
        """MME's subtask of each image, in the real proportions."""
        total, names = sum(MME_IMAGES.values()), []
        for name, count in MME_IMAGES.items():
            names += [name] * max(2, round(count * self.num_images / total))
        return (names + [PERCEPTION[4]] * self.num_images)[: self.num_images]

    @cached_property
    def membership(self) -> Tensor:
        """Which sums an image of MME adds to, bool [images, names]."""
        names = [name.partition(" ")[0] for name in self.template.names]
        return torch.tensor([[subtask == name for name in names] for subtask in self.subtasks])

    def draw_grades(self, generator: torch.Generator) -> Tensor:
        """Draw what each question is worth if it is right, float64 [images, questions]; the same for all runs."""
        if self.task != "textvqa":
            return torch.ones(self.asked.shape, dtype=torch.float64)
        return torch.tensor(GRADES, dtype=torch.float64)[
            torch.randint(len(GRADES), self.asked.shape, generator=generator)
        ]

    def score(self, right: Tensor, grades: Tensor) -> Sample:
        """Make a sample of which questions are right, bool [images, questions], and what each is worth."""
        template, points = self.template, (right & self.asked) * grades
        columns: dict[str, Tensor] = {}
        if self.task == "mme":
            amounts = {
                "question points": points.sum(1),
                "question count": self.counts.double(),
                "pair points": (points.sum(1) == 2).double(),
                "pair count": torch.ones(self.num_images, dtype=torch.float64),
            }
            everywhere = torch.stack([amounts[name.partition(" ")[2]] for name in template.names], 1)
            return self._fill(everywhere * self.membership)
        if self.task == "pope":
            # Questions of a category, half of them about things that are there.
            for number, name in enumerate(POPE_CATEGORIES):
                part = points[:, number :: len(POPE_CATEGORIES)]
                there, absent = part[:, ::2], part[:, 1::2]
                columns[f"{name} true_positive"] = there.sum(1)
                columns[f"{name} false_negative"] = there.shape[1] - there.sum(1)
                columns[f"{name} true_negative"] = absent.sum(1)
                columns[f"{name} false_positive"] = absent.shape[1] - absent.sum(1)
        else:
            columns = {"points": points.sum(1), "count": self.counts.double()}
        return self._fill(torch.stack([columns[name] for name in template.names], 1))

    def _fill(self, sums: Tensor) -> Sample:
        template = self.template
        return Sample(template.images, template.names, sums, template.strata, template.combine, template.full_marks)

    def split(self, sample: Sample) -> Sample:
        """Take every question of a mean for an image of its own, as a bootstrap over questions does."""
        points, counts = sample.sums[:, 0].tolist(), self.counts.tolist()
        ones = [
            float(number < right) for right, count in zip(points, counts, strict=True) for number in range(int(count))
        ]
        tallies = {str(number): {"points": each, "count": 1.0} for number, each in enumerate(ones)}
        return Sample.of(tallies, sample.combine)

    def find_truth(self, accuracy: float) -> float:
        """Return the headline of infinitely many images."""
        if self.task == "mme":
            both = accuracy**2 + CORRELATION * accuracy * (1 - accuracy)
            return 100 * len(set(self.subtasks)) * (accuracy + both)
        if self.task == "pope":  # as many wrong yes as wrong no
            return 100 * accuracy
        return 100 * accuracy * (fmean(GRADES) if self.task == "textvqa" else 1.0)


def draw_chances(mean: Tensor, correlation: float, generator: torch.Generator) -> Tensor:
    """Draw a chance for each image, float64 [images], whose mean is given and that makes questions correlate."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))  # distributions take no generator
    scale = (1 - correlation) / correlation
    return Beta(mean * scale, (1 - mean) * scale).sample()


def draw_right(design: Design, accuracy: float, generator: torch.Generator) -> Tensor:
    """Draw which questions one run has right, bool [images, questions]."""
    mean = torch.full((design.num_images,), accuracy, dtype=torch.float64)
    chances = draw_chances(mean, CORRELATION, generator)
    return torch.rand(design.asked.shape, generator=generator, dtype=torch.float64) < chances[:, None]


def draw_other(design: Design, right: Tensor, flips: float, gain: float, generator: torch.Generator) -> Tensor:
    """Draw which questions another run has right.

    Args:
        design: the benchmark.
        right: of the first run.
        flips: share of all questions that flip, either way.
        gain: how much higher the other run's true accuracy is, at most `flips` either way.
        generator: of the draw.
    """
    lost, gained = (flips - gain) / 2 / design.accuracy, (flips + gain) / 2 / (1 - design.accuracy)
    # An image that loses much gains little.
    ease = draw_chances(torch.full((design.num_images,), 0.5, dtype=torch.float64), FLIP_CORRELATION, generator)[
        :, None
    ]
    chance = torch.where(right, 2 * lost * ease, 2 * gained * (1 - ease)).clamp(max=1)
    return right ^ (torch.rand(right.shape, generator=generator, dtype=torch.float64) < chance)


# ------------------------------------------------------------------------------------------------------------ coverage
def measure_coverage(design: Design, runs: int, compute: Callable[[Sample], Interval]) -> float:
    """Return the share of runs, in percent, whose interval of the headline holds the truth.

    The truth of each run is drawn close to the design's accuracy: the number of right answers is whole, so that with
    few wrong ones the coverage of any interval jumps by percents from one truth to the next.
    """
    generator, hits = torch.Generator().manual_seed(1), 0
    for _ in range(runs):
        accuracy = design.accuracy + NEAR * (2 * float(torch.rand((), generator=generator)) - 1)
        interval = compute(design.score(draw_right(design, accuracy, generator), design.draw_grades(generator)))
        hits += interval.low <= design.find_truth(accuracy) <= interval.high
    return 100 * hits / runs


def measure_paired(design: Design, runs: int, flips: float, gain: float) -> dict[str, float]:
    """Return the coverage of paired differences and of retained percentages, in percent."""
    generator, hits = torch.Generator().manual_seed(2), {"difference": 0, "retained": 0}
    worth = fmean(GRADES) if design.task == "textvqa" else 1.0
    for _ in range(runs):
        grades, right = design.draw_grades(generator), draw_right(design, design.accuracy, generator)
        full, run = (design.score(each, grades) for each in (right, draw_other(design, right, flips, gain, generator)))
        difference = paired_difference(run, full, Flips(0, 0, 0, 0), num_exchanges=1).interval
        retained = retained_interval(run, full)
        hits["difference"] += difference.low <= 100 * gain * worth <= difference.high
        hits["retained"] += retained.low <= 100 * (1 + gain / design.accuracy) <= retained.high
    return {name: 100 * count / runs for name, count in hits.items()}


# ---------------------------------------------------------------------------------------------------------- false wins
def measure_false_wins(design: Design, runs: int, flips: float, by_question: bool = False) -> tuple[float, float]:
    """Return the share of tables, in percent, in which any of equal methods differs: by Holm, uncorrected."""
    generator, wins = torch.Generator().manual_seed(3), [0, 0]
    for _ in range(runs):
        grades, right = design.draw_grades(generator), draw_right(design, design.accuracy, generator)
        # All of them, the first one too, are reductions of one full model: none of them is special.
        first = draw_other(design, right, flips / 2, 0.0, generator)
        base, p_values = design.score(first, grades), []
        for _ in range(NUM_METHODS):
            other = draw_other(design, right, flips / 2, 0.0, generator)
            if by_question:
                gained, lost = (int((one & ~two & design.asked).sum()) for one, two in ((other, first), (first, other)))
                ones = {str(each): {"points": float(each < gained), "count": 1.0} for each in range(gained + lost)}
                zeros = {name: {"points": 1 - each["points"], "count": 1.0} for name, each in ones.items()}
                p_values.append(exchange_p(*(Sample.of(each, base.combine) for each in (ones, zeros))))
            else:
                p_values.append(exchange_p(design.score(other, grades), base, EXCHANGES))
        wins[0] += min(holm(p_values)) <= LEVEL
        wins[1] += min(p_values) <= LEVEL
    return 100 * wins[0] / runs, 100 * wins[1] / runs


# --------------------------------------------------------------------------------------------------------------- power
def measure_power(design: Design, runs: int, flips: float) -> dict[str, float | None]:
    """Find the smallest true difference that is seen in 80 % of cases.

    Returns:
        `sd`: of the difference of headlines of two equal methods; `alone`, `corrected`: the difference for one
        comparison, and for the first of 13 by Holm; `power`: share of runs, in percent, that see `alone`; None where
        so few flips cannot make so large a difference.
    """
    generator = torch.Generator().manual_seed(4)

    def compare(gain: float) -> tuple[Sample, Sample]:
        grades, right = design.draw_grades(generator), draw_right(design, design.accuracy, generator)
        better, first = (draw_other(design, right, flips / 2, each, generator) for each in (gain, 0.0))
        return design.score(better, grades), design.score(first, grades)

    def difference(pair: tuple[Sample, Sample]) -> float:
        return pair[0].headline - pair[1].headline

    # 1. From the spread of equal methods.
    sd = stdev(difference(compare(0.0)) for _ in range(runs))
    normal = NormalDist()
    alone, corrected = (
        sd * (normal.inv_cdf(1 - LEVEL / 2 / count) + normal.inv_cdf(POWER)) for count in (1, NUM_METHODS)
    )
    # 2. Which gain of accuracy gives that, and how often it is seen then. The flips bound the gain.
    most = flips / 2
    gain = alone * most / fmean(difference(compare(most)) for _ in range(runs))
    if gain > most:
        return {"sd": sd, "alone": alone, "corrected": corrected, "power": None}
    seen = sum(exchange_p(*compare(gain), EXCHANGES) <= LEVEL for _ in range(runs))
    return {"sd": sd, "alone": alone, "corrected": corrected, "power": 100 * seen / runs}


# ------------------------------------------------------------------------------------------------------------- designs
SIZES = ((60, 60), (200, 200), (200, 1000), (400, 12_000), (2000, 2000))
ACCURACIES = (0.5, 0.8, 0.97)
MEANS = [
    Design(f"{images} images, {asked} questions", "gqa", images, asked, p)
    for images, asked in SIZES
    for p in ACCURACIES
]
OTHERS = [
    Design("VQA-like grades, 300 images, 900 questions", "textvqa", 300, 900, 0.8),
    Design("POPE-like F1, 200 images, 3,600 questions", "pope", 200, 3600, 0.86),
    Design("MME-like sum, 1,057 images", "mme", 1057, 2114, 0.85),
    Design("MME-like sum, 200 images", "mme", 200, 400, 0.85),
]
PAIRS = [
    (Design("200 images, 1,000 questions", "gqa", 200, 1000, 0.8), 0.10, -0.02),
    (Design("60 images, 60 questions", "gqa", 60, 60, 0.6), 0.15, -0.05),
    (Design("2,000 images, 2,000 questions", "gqa", 2000, 2000, 0.7), 0.02, 0.0),
    (Design("300 images, 900 questions, VQA-like grades", "textvqa", 300, 900, 0.8), 0.10, -0.03),
]
NULLS = [
    Design("200 images, 200 questions", "gqa", 200, 200, 0.8),
    Design("200 images, 1,000 questions", "gqa", 200, 1000, 0.8),
    Design("400 images, 12,000 questions", "gqa", 400, 12_000, 0.6),
    Design("VQA-like grades, 300 images, 900 questions", "textvqa", 300, 900, 0.8),
]
SLOW_NULLS = [
    Design("POPE-like F1, 200 images, 3,600 questions", "pope", 200, 3600, 0.86),
    Design("MME-like sum, 200 images", "mme", 200, 400, 0.85),
]
"""Their p-values are from random exchanges."""
REAL = [
    Design("VQAv2 val", "textvqa", 40_504, 214_354, 0.9),
    Design("GQA", "gqa", 398, 12_578, 0.62),
    Design("VizWiz val", "textvqa", 4319, 4319, 0.7),
    Design("ScienceQA-IMG", "gqa", 2017, 2017, 0.668),
    Design("TextVQA", "textvqa", 3166, 5000, 0.83),
    Design("POPE", "pope", 500, 9000, 0.86),
    Design("MME perception", "mme", 1057, 2114, 0.85),
    Design("MMBench dev (questions)", "gqa", 1176, 1176, 0.643),
    Design("MMBench-CN dev (questions)", "gqa", 1164, 1164, 0.583),
    Design("SEED-Bench image", "gqa", 14_233, 14_233, 0.66),
    Design("LLaVA-Bench", "textvqa", 24, 60, 0.9),
    Design("MM-Vet", "textvqa", 200, 218, 0.45),
]
"""Sizes of the real ones, accuracies near LLaVA-1.5-7B's. POPE has 8,910 questions. Nobody counted SEED's images: each
question has its own here. What judges grade (LLaVA-Bench, MM-Vet) is taken for grades like VQA's."""


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    figures = {name: TELL[name](args.runs, args.flips) for name in args.parts}
    side_by_side.write_figures({"runs": args.runs, "flips": args.flips, **figures}, args.json)


def tell_coverage(runs: int, flips: Sequence[float]) -> list[dict[str, object]]:
    print(f"95 % intervals of headlines that hold the truth, percent of {runs} runs")
    lines = []
    for design in [*MEANS, *OTHERS]:
        share = measure_coverage(design, runs, headline_interval)
        lines.append({"design": design.name, "accuracy": design.accuracy, "coverage": share})
        print(f"  {design.name:<45} accuracy {design.accuracy:.2f}  {share:5.1f}", flush=True)
    clustered, few = MEANS[7], max(1, runs // 5)
    share = measure_coverage(clustered, few, lambda sample: headline_interval(clustered.split(sample)))
    lines.append(
        {"design": f"{clustered.name}, questions drawn one by one", "accuracy": clustered.accuracy, "coverage": share}
    )
    print(f"  the same over single questions, {clustered.name}, {few} runs: {share:.1f}")
    return lines


def tell_paired(runs: int, flips: Sequence[float]) -> list[dict[str, object]]:
    print(f"paired 95 % intervals that hold the truth, percent of {runs} runs: difference, retained percentage")
    lines = []
    for design, share, gain in PAIRS:
        found = measure_paired(design, runs, share, gain)
        lines.append({"design": design.name, "flips": share, "gain": gain, **found})
        print(
            f"  {design.name:<45} {share:.0%} flip, {gain:+.0%}  {found['difference']:5.1f} {found['retained']:5.1f}",
            flush=True,
        )
    return lines


def tell_false_wins(runs: int, flips: Sequence[float]) -> list[dict[str, object]]:
    print(f"tables of {NUM_METHODS} equal methods with a false difference, percent: Holm, uncorrected")
    lines = []
    jobs = [(design, runs, False) for design in NULLS] + [(design, max(1, runs // 5), False) for design in SLOW_NULLS]
    for design, count, by_question in [*jobs, (NULLS[2], max(1, runs // 5), True)]:
        corrected, plain = measure_false_wins(design, count, flips[-1], by_question)
        name = design.name + ", McNemar by question" * by_question
        lines.append({"design": name, "runs": count, "holm": corrected, "uncorrected": plain})
        print(f"  {name:<52} {count:5} runs  {corrected:5.1f} {plain:5.1f}", flush=True)
    return lines


def tell_power(runs: int, flips: Sequence[float]) -> list[dict[str, object]]:
    count, lines = max(2, math.ceil(runs / 5)), []
    print(f"smallest difference seen in 80 % of cases: alone, first of {NUM_METHODS} by Holm; seen, % of {count}")
    for design in REAL:
        for share in flips:
            found = measure_power(design, count, share)
            lines.append({"design": design.name, "flips": share, **found})
            seen = "too few flips" if found["power"] is None else f"{found['power']:5.1f}"
            numbers = f"{found['alone']:7.2f} {found['corrected']:7.2f}  {seen}"
            print(f"  {design.name:<30} {share:.0%} flip  {numbers}", flush=True)
    return lines


TELL: dict[str, Callable[[int, Sequence[float]], list[dict[str, object]]]] = dict(
    zip(PARTS, (tell_coverage, tell_paired, tell_false_wins, tell_power), strict=True)
)

if __name__ == "__main__":
    run_command(main)
