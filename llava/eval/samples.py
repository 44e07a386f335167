"""From verdicts to what `llava.eval.metrics.evidence` reads: one run by its images, or two on the same questions."""

from collections.abc import Sequence

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Verdict
from llava.eval.metrics.evidence import Sample
from llava.eval.metrics.flips import Flips, count_flips


def make_sample(task: Benchmark, verdicts: Sequence[Verdict]) -> Sample:
    """Put a run's verdicts together by image.

    Raises:
        InputError: none has a part in the headline, or the benchmark is one of a user's own whose headline cannot be
            computed from sums.
    """
    if type(task).headline is not Benchmark.headline:
        raise InputError(f"{task.name} defines headline(): its intervals need tally() and combine() in place of it")
    return Sample.of(task.tally_images(verdicts), task.combine, task.full_marks)


def pair_samples(task: Benchmark, here: Sequence[Verdict], there: Sequence[Verdict]) -> tuple[Sample, Sample, Flips]:
    """Put two runs' verdicts on the questions that both answered together by image, and count what flipped.

    Raises:
        InputError: as for `make_sample`; or no question is common.
    """
    first, second = ({(each.unit, each.key): each for each in verdicts} for verdicts in (here, there))
    both = [(verdict, second[key]) for key, verdict in first.items() if key in second]
    if not both:
        raise InputError(f"{task.name}: the two runs have no answered question in common")
    flips = count_flips((mine.correct, other.correct) for mine, other in both if mine.unit != "pair")
    mine, other = (make_sample(task, each) for each in zip(*both, strict=True))
    return mine, other, flips
