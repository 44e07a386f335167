"""Targets of FLOPs and milliseconds become the largest budget within them, or one line that says what is in reach."""

from types import SimpleNamespace

import pytest

from llava.efficiency import stages
from llava.efficiency.cost import Precision, Workload, stage_costs, total_flops
from llava.efficiency.estimate import count_reduction, fix_kept
from llava.efficiency.runs import find_by_time
from llava.efficiency.shapes import read_source
from llava.efficiency.targets import at_count, find_count, find_largest
from llava.efficiency.timing import Spread
from llava.errors import InputError
from llava.model.token_reduction import Reduction, parse_reducer, parse_reduction, read_target

WORK = Workload()


@pytest.fixture(scope="module")
def source():
    return read_source("llava-v1.5-7b")


def flops_of(reduction, shape) -> int:
    return total_flops(stage_costs(shape, count_reduction(reduction, shape), WORK, Precision()), WORK)


@pytest.mark.parametrize("method", ["TRIM", "FasterVLM", "Pool", "FastV", "DART", "SparseVLM"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_count_found_is_the_largest_within_the_share(source, method, share):
    target, shape = read_target(f"{method}:flops={share}"), source.shape
    found = find_count(target, shape, WORK)
    full = flops_of(Reduction(), shape)
    reduction = parse_reduction(found.spec)
    assert flops_of(reduction, shape) / full == pytest.approx(found.share) and found.share <= share
    count = int((reduction.before or reduction.inside).budget.value)
    assert flops_of(at_count(target, count + 1, 576), shape) / full > share


def test_options_of_a_target_are_kept(source):
    found = find_count(read_target("TRIM:flops=0.35,similarity=direct"), source.shape, WORK)
    assert found.spec == "TRIM:134,similarity=direct"


def test_the_whole_share_keeps_everything(source):
    assert find_count(read_target("FastV:flops=1"), source.shape, WORK).spec == "FastV:576"


@pytest.mark.parametrize("spec", ["TRIM:flops=0.05", "PyramidDrop:flops=0.1"])
def test_a_share_out_of_reach_says_what_the_method_takes(source, spec):
    with pytest.raises(InputError, match=r"takes 0\.\d{3} to \d\.\d{3} of the FLOPs.*64 prompt tokens") as caught:
        find_count(read_target(spec), source.shape, WORK)
    assert "\n" not in str(caught.value)


def test_bisection_finds_the_last_number_that_fits():
    for most in (1, 2, 7, 64):
        for last in range(most + 1):
            assert find_largest(lambda number, last=last: number <= last, most) == last


@pytest.mark.parametrize(
    ("spec", "kept", "tokens"),
    [
        ("FasterVLM:avg=120.7", 121, 121),
        ("Pool:avg=110.5", 110, 110),  # 100 and 121
        ("PruMerge:-1", 121, 122),
        ("TRIM:-1,max_keep=50", 50, 51),
        ("TRIM:-1,min_keep=64,max_keep=64", 64, 65),
    ],
)
def test_mixtures_and_automatic_rules_are_counted(source, spec, kept, tokens):
    left = count_reduction(parse_reduction(spec), source.shape)
    assert left.num_tokens == tokens
    assert left.num_kept in (kept, tokens)  # PruMerge synthesises all of its tokens


def test_a_mean_budget_is_left_as_it_is():
    reducer = parse_reducer("Random:avg=9.5")
    assert fix_kept(reducer, 36, 0.21) is reducer


@pytest.fixture
def clock(monkeypatch):
    """A batch takes 100 ms, and one more for every image token that a budget keeps."""

    def measure(runner, batch, reductions, *, repeats, warmup):
        return {
            label: SimpleNamespace(end_to_end=Spread.of([0.1 + int(label) / 1000])) for label, _ in reductions.items()
        }

    monkeypatch.setattr(stages, "measure_reductions", measure)
    args = SimpleNamespace(repeats=1, warmup=0)
    runner = SimpleNamespace(model=SimpleNamespace(device=SimpleNamespace(type="cpu")))
    return lambda spec, source: find_by_time(read_target(spec), runner, None, source, WORK, args)


def test_milliseconds_become_the_count_between_the_measured_ones(source, clock):
    found = clock("TRIM:ms=310,similarity=direct", source)
    assert (found.asked, found.spec) == ("TRIM:ms=310,similarity=direct", "TRIM:210,similarity=direct")
    assert "cpu" in str(found) and "676.0 with 576" in str(found)
    assert found.record["milliseconds"][144] == pytest.approx(244)


@pytest.mark.parametrize("time", [90, 700])
def test_milliseconds_out_of_reach_say_what_was_measured(source, clock, time):
    with pytest.raises(InputError, match=r"takes 101\.0 ms with 1 patch and 676\.0 ms with 576 .*give a time between"):
        clock(f"DivPrune:ms={time}", source)
