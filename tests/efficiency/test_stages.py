"""Measuring: stages give generate's own answers, turns are fair, memory and tokens are told as they are."""

import pytest
import torch

from llava.clock import StageClock
from llava.efficiency.estimate import count_left, fix_kept
from llava.efficiency.memory import measure_peak, release_memory
from llava.efficiency.stages import Runner, make_batch, measure_reductions
from llava.efficiency.timing import Spread, ratio_by_round, time_in_turns
from llava.model.token_reduction import Reduction, parse_reducer

CPU = torch.device("cpu")


def make_questions(batch_size: int = 3, new_tokens: int = 5, **settings):
    return make_batch(batch_size, 12, new_tokens, vocab_size=120, image_size=(60, 40), **settings)


@pytest.mark.parametrize("spec", ["TRIM:-1", "TRIM:0.3", "Random:0.2", "FasterVLM:9", "CDPruner:9", "none"])
def test_stage_by_stage_gives_the_ids_of_generate(random_parts, spec):
    model, image_processor = random_parts
    model.set_token_reduction(spec)
    runner, batch = Runner(model, image_processor), make_questions()
    ids, _ = runner.run(batch, StageClock(CPU))
    assert ids.tolist() == runner.answer(batch).tolist()
    assert ids.shape == (3, 5)


@pytest.mark.parametrize("spec", ["TRIM:-1", "none"])
def test_a_static_cache_gives_the_same_ids(random_parts, spec, monkeypatch):
    model, image_processor = random_parts
    model.set_token_reduction(spec)
    batch = make_questions()
    ids, _ = Runner(model, image_processor).run(batch, StageClock(CPU))
    monkeypatch.setattr(
        torch, "compile", lambda step, **settings: step
    )  # compiling takes minutes, the cache is the point
    runner = Runner(model, image_processor, compile_decode=True)
    for _ in range(2):  # the second time the cache holds the first run's keys
        static, _ = runner.run(batch, StageClock(CPU))
        assert static.tolist() == ids.tolist()


def test_reductions_are_measured_side_by_side(random_parts):
    reducers = {"TRIM:0.25": parse_reducer("TRIM:0.25"), "none": None}
    reductions = {label: Reduction(reducer) for label, reducer in reducers.items()}
    measured = measure_reductions(Runner(*random_parts), make_questions(), reductions, repeats=3, warmup=1)
    trim, none = measured["TRIM:0.25"], measured["none"]
    assert (trim.num_kept, trim.num_tokens) == (9, 10)
    assert (none.num_kept, none.num_tokens) == (36, 36)
    assert set(trim.stages) - set(none.stages) == {"text tower", "selection"}
    assert len(trim.rounds) == len(none.rounds) == 3
    assert all(spread.q1 <= spread.median <= spread.q3 for spread in trim.stages.values())


def test_one_query_for_all_rows_or_another_for_each():
    assert len(set(make_questions().queries)) == 3
    assert make_questions(query="a bus?").queries == ["a bus?"] * 3


@pytest.mark.parametrize(
    ("spec", "kept", "tokens"),
    [
        ("TRIM:0.25", 144, 145),
        ("TextSim:0.25", 144, 144),
        ("TRIM:1.0", 576, 576),
        ("Random:0.5", 288, 288),
        ("FasterVLM:64", 64, 64),
        ("VisPruner:64", 64, 64),
        ("SCOPE:64", 64, 64),
        ("DivPrune:0.098", 56, 56),
        ("CDPruner:64", 64, 64),
        ("Pool:0.25", 144, 144),
        ("TRIM:-1", 121, 122),
        ("TextSim:-1", 121, 121),
        (None, 576, 576),
    ],
)
def test_the_reducer_itself_says_how_many_tokens_are_left(spec, kept, tokens):
    left = count_left(fix_kept(parse_reducer(spec), 576, 0.21), (24, 24))
    assert (left.num_kept, left.num_tokens) == (kept, tokens)


def test_turns_alternate_and_warm_rounds_do_not_count():
    order = []
    candidates = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = time_in_turns(candidates, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round():
    assert ratio_by_round([2.0, 20.0, 9.0], [1.0, 10.0, 3.0]).median == 2.0


def test_spread_holds_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(0.001, 0.0005, 0.002).format(1e3) == "1.0 [0.5, 2.0]"


def test_peak_memory_sees_what_is_gone_again():
    if not release_memory():
        pytest.skip("this system does not tell")
    peak = measure_peak(lambda: torch.ones(2**25).sum(), CPU)
    assert 0.9 * 2**27 < peak < 1.3 * 2**27
