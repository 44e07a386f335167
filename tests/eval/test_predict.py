"""The prediction loop, and what decides which questions are asked together and how many at once."""

import ctypes
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.eval.__main__ import get_chunk
from llava.eval.benchmark import Question, Row, row_key
from llava.eval.benchmarks.pope import Pope
from llava.eval.predict import (
    MAX_UNIT,
    MIN_UNIT,
    BatchLimits,
    Fault,
    Settings,
    answer_questions,
    batch_by_length,
    choose_limits,
    choose_unit_size,
    claim_units,
    keep_freed_memory,
    plan_units,
)
from llava.model.builder import load_pretrained_model
from llava.sampling import Sampling


class MemorySink:
    """Keeps rows in memory; units in `held` belong to somebody else until the second look."""

    key_fields = ("question_id",)

    def __init__(self, held: Sequence[int] = ()) -> None:
        self.done: dict[str, Row] = {}
        self.appended: list[int] = []
        self.held = set(held)

    def claim(self, unit: int) -> bool:
        if unit in self.held:
            self.held.discard(unit)
            return False
        return True

    def refresh(self) -> None:
        pass

    def append(self, rows: Sequence[Row]) -> None:
        self.appended.append(len(rows))
        self.done.update((row_key(row, self.key_fields), row) for row in rows)


def run(parts: tuple, questions: list[Question], **settings: object) -> tuple[MemorySink, list[Fault]]:
    sink = MemorySink()
    search = {name: settings.pop(name) for name in ("max_new_tokens", "temperature", "top_p") if name in settings}
    asked = Settings("llava", Sampling(**({"max_new_tokens": 128} | search)), **settings)
    faults = answer_questions(*parts, questions, sink, asked)
    return sink, faults


def mixed_questions(folder: Path) -> list[Question]:
    """One, two and no images, prompts of many lengths."""
    questions = Pope().load(folder)
    images = sorted(folder.glob("val2014/*"))
    more = [
        Question(id=f"pair {number}", prompt="Same? " * number, query="Same?", images=(images[0], images[number % 3]))
        for number in range(5)
    ]
    alone = [Question(id=f"text {number}", prompt="Why? " * (1 + number), query="Why?") for number in range(4)]
    return [question for trio in zip(questions, more + alone, strict=False) for question in trio] + questions[9:]


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100])
def test_every_batch_size_gives_the_answers_of_one_at_a_time(
    make_pope: Callable[..., Path], fake_parts: tuple, batch_size: int
) -> None:
    questions = mixed_questions(make_pope())
    alone, _ = run(fake_parts, questions, batch_size=1)
    together, faults = run(fake_parts, questions, batch_size=batch_size)
    assert together.done == alone.done
    assert len(together.done) == len(questions)
    assert faults == []


def test_an_image_is_encoded_once_however_many_questions_it_gets(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    questions = Pope().load(make_pope(7))
    for batch_size in (1, 4):
        fake_parts[0].encoded.clear()
        run(fake_parts, questions, batch_size=batch_size)
        assert sum(fake_parts[0].encoded) == 7


def test_without_a_reduction_an_image_is_projected_once_for_all_its_questions_and_answers_stay(
    make_pope: Callable[..., Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model, processor, _ = load_pretrained_model(
        str(tiny_checkpoint), None, "llava-tiny", device="cpu", dtype="float32", reduce="none"
    )
    questions = [
        replace(question, id=f"{question.id}-{turn}", prompt=f"{question.prompt} {'really? ' * turn}")
        for question in Pope().load(make_pope(3))
        for turn in range(3)
    ]
    projected = []
    make = model.make_image_tokens

    def note(patches: list, *arguments: object, **options: object) -> list:
        projected.extend(patches)
        return make(patches, *arguments, **options)

    monkeypatch.setattr(model, "make_image_tokens", note)
    together, _ = run((model, tokenizer, processor), questions, batch_size=8, max_new_tokens=6)
    assert len(projected) == 3
    alone, _ = run((model, tokenizer, processor), questions, batch_size=1, max_new_tokens=6)
    assert together.done == alone.done
    assert len(together.done) == len(questions)


def test_a_reduction_that_looks_at_attention_goes_through_the_feature_cache(
    make_pope: Callable[..., Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model, processor, _ = load_pretrained_model(
        str(tiny_checkpoint), None, "llava-tiny", device="cpu", dtype="float32", reduce="FasterVLM:9"
    )
    questions = Pope().load(make_pope(3))
    encoded = []
    encode = model.encode_patches
    monkeypatch.setattr(model, "encode_patches", lambda images: encoded.extend(images) or encode(images))
    together, _ = run((model, tokenizer, processor), questions, batch_size=8, max_new_tokens=6)
    assert len(encoded) == 3
    assert {row["metadata"]["num_tokens"] for row in together.done.values()} == {9}
    alone, _ = run((model, tokenizer, processor), questions, batch_size=1, max_new_tokens=6)
    assert together.done == alone.done and len(together.done) == len(questions)


def test_the_cache_is_bounded_and_an_evicted_image_is_encoded_again(
    make_pope: Callable[..., Path], fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.predict.choose_unit_size", lambda model: 2)
    folder = make_pope(4)
    images = sorted(folder.glob("val2014/*"))
    questions = [
        Question(id=number, prompt="?", query="?", images=(images[number % 4], images[number // 4 % 4]))
        for number in range(16)
    ]
    sink, _ = run(fake_parts, questions, batch_size=1, cached_images=1)
    assert sum(fake_parts[0].encoded) > 4
    roomy, _ = run(fake_parts, questions, batch_size=1)
    assert roomy.done == sink.done


def test_rows_carry_the_visual_tokens_before_and_after_reduction(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    sink, _ = run(fake_parts, mixed_questions(make_pope()))
    by_id = {row["question_id"]: row["metadata"] for row in sink.done.values()}
    assert by_id["text 0"] == {"num_tokens": 0, "num_patches": 0}
    assert by_id["pair 0"] == {"num_tokens": 4, "num_patches": 8}
    assert by_id[1]["num_patches"] == 4


def test_answers_lose_their_surrounding_white_space(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    sink, _ = run(fake_parts, Pope().load(make_pope()))
    assert all(row["text"] == row["text"].strip() != "" for row in sink.done.values())


def test_batches_hold_sequences_of_like_length(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    questions = [Question(id=number, prompt="x" * (1 + number * 7 % 40), query="") for number in range(40)]
    run(fake_parts, questions, batch_size=5)
    spreads = [max(batch) - min(batch) for batch in fake_parts[0].batches]
    assert len(fake_parts[0].batches) == 8
    assert max(spreads) == 4


def test_decoding_is_greedy_unless_a_temperature_is_given(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    model = fake_parts[0]
    questions = Pope().load(make_pope())
    run(fake_parts, questions, max_new_tokens=9)
    assert model.arguments == {"do_sample": False, "num_beams": 1, "max_new_tokens": 9, "use_cache": True}
    run(fake_parts, questions, temperature=0.2, top_p=0.9)
    assert model.arguments["do_sample"] is True
    assert (model.arguments["temperature"], model.arguments["top_p"]) == (0.2, 0.9)


def test_unreadable_images_are_reported_by_id_and_the_rest_goes_on(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    folder = make_pope(4)
    images = sorted(folder.glob("val2014/*"))
    images[0].write_bytes(b"no image")
    images[1].unlink()
    images[2].write_bytes(images[3].read_bytes()[:300])
    questions = Pope().load(folder)
    sink, faults = run(fake_parts, questions, batch_size=4)
    assert len(sink.done) == 6
    assert len(faults) == 18
    reasons = {fault.question.images[0]: fault.reason for fault in faults}
    assert "not an image" in reasons[images[0]]
    assert str(images[1]) in reasons[images[1]]
    assert "truncated" in reasons[images[2]]


def test_an_image_that_the_processor_refuses_costs_its_questions_only(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    from PIL import Image

    folder = make_pope()
    image = sorted(folder.glob("val2014/*"))[1]
    Image.new("RGB", (1, 1)).save(image)
    sink, faults = run(fake_parts, Pope().load(folder), batch_size=8)
    assert len(sink.done) == 12
    assert {fault.reason for fault in faults} == {"impossible shape"}


def test_a_broken_record_and_stray_marks_are_faults(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    questions = [
        *Pope().load(make_pope()),
        Question(id="line 9", fault="not JSON"),
        Question(id="marks", prompt="<image> or <image>", query="or"),
    ]
    sink, faults = run(fake_parts, questions)
    assert len(sink.done) == 18
    assert [(fault.question.id, fault.reason) for fault in faults] == [
        ("line 9", "not JSON"),
        ("marks", "the question has 2 <image> placeholders for 0 new images: write one per image, or none"),
    ]


def test_one_refused_question_does_not_cost_its_batch(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    questions = [Question(id=number, prompt="x" * number, query="") for number in range(20)]
    model = fake_parts[0]
    run(fake_parts, questions)
    longest = max(max(batch) for batch in model.batches)
    model.refuses = lambda prompt: len(prompt) == longest
    sink, faults = run(fake_parts, questions, batch_size=8)
    assert len(sink.done) == 19
    assert [(fault.question.id, fault.reason) for fault in faults] == [(19, "the prompt is too long")]


def test_answered_questions_are_not_asked_again(make_pope: Callable[..., Path], fake_parts: tuple) -> None:
    questions = Pope().load(make_pope())
    first, _ = run(fake_parts, questions[:7])
    sink = MemorySink()
    sink.done = dict(first.done)
    answer_questions(*fake_parts, questions, sink, Settings(model_id="llava"))
    assert sum(sink.appended) == 11
    assert sink.done == run(fake_parts, questions)[0].done


def test_units_that_others_hold_get_a_second_look() -> None:
    units = [[Question(id=number)] for number in range(4)]
    taken = [unit[0].id for unit in claim_units(units, MemorySink(held=[1, 2]))]
    assert taken == [0, 3, 1, 2]


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
    chunks = [get_chunk(range(9), num_chunks, index) for index in range(num_chunks)]
    assert [item for chunk in chunks for item in chunk] == list(range(9))
    assert len(chunks[0]) == -(-9 // num_chunks)


def test_a_chunk_past_the_end_is_empty() -> None:
    assert get_chunk(range(9), 4, 3) == []


def make_shapes(**config: Any) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float16,
        get_vision_tower=lambda: SimpleNamespace(num_patches=576),
        config=SimpleNamespace(
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
            | {"mm_hidden_size": 1024} | config
        ),
    )  # fmt: skip


def test_automatic_batches_shrink_with_length_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.eval.predict.usable_bytes", lambda device: 10 * 2**30)
    limits = choose_limits(make_shapes(), None)
    assert limits.positions == 10 * 2**30 // (2 * (2 * 32 * 4096 + 6 * 4096 + 3 * 11008))
    assert limits.allow(16, 768)
    assert not limits.allow(32, 768)
    assert limits.allow(1, 10**9)
    small = choose_limits(make_shapes(hidden_size=192, intermediate_size=512, num_hidden_layers=4), None)
    assert small.allow(small.rows, 500)
    assert not small.allow(small.rows + 1, 1)


def test_a_given_batch_size_is_taken_as_it_is() -> None:
    assert choose_limits(make_shapes(), 7) == BatchLimits(7)
    assert BatchLimits(7).allow(7, 10**9)
    assert not BatchLimits(7).allow(8, 1)


def test_units_follow_from_the_shapes_alone() -> None:
    assert MIN_UNIT < choose_unit_size(make_shapes()) < MAX_UNIT
    assert choose_unit_size(make_shapes(image_aspect_ratio="anyres")) == MIN_UNIT
    assert choose_unit_size(make_shapes(hidden_size=192, mm_hidden_size=128)) == MAX_UNIT


COUNT_FAULTS = """
import resource, sys
import torch
from llava.eval.predict import keep_freed_memory

torch.set_num_threads(1)
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(40, 2**18)  # 40 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_tensors_are_used_again_without_a_page_fault() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 100
    assert after < before / 20


def test_a_c_library_without_the_setting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
