from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llava.eval.benchmark import Question, Row, row_key
from llava.eval.benchmarks.pope import Pope
from llava.eval.runner import Fault, Settings, answer_questions, claim_units
from llava.model.builder import load_pretrained_model


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
    faults = answer_questions(*parts, questions, sink, Settings(model_id="llava", **settings))
    return sink, faults


def mixed_questions(folder: Path) -> list[Question]:
    """One, two and no pictures, prompts of many lengths."""
    questions = Pope().load(folder)
    pictures = sorted(folder.glob("val2014/*"))
    more = [
        Question(
            id=f"pair {number}", prompt="Same? " * number, query="Same?", images=(pictures[0], pictures[number % 3])
        )
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


def test_a_picture_is_encoded_once_however_many_questions_it_gets(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    questions = Pope().load(make_pope(7))
    for batch_size in (1, 4):
        fake_parts[0].encoded.clear()
        run(fake_parts, questions, batch_size=batch_size)
        assert sum(fake_parts[0].encoded) == 7


def test_without_a_reduction_a_picture_is_projected_once_for_all_its_questions_and_answers_stay(
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


def test_the_cache_is_bounded_and_an_evicted_picture_is_encoded_again(
    make_pope: Callable[..., Path], fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.runner.choose_unit_size", lambda model: 2)
    folder = make_pope(4)
    pictures = sorted(folder.glob("val2014/*"))
    questions = [
        Question(id=number, prompt="?", query="?", images=(pictures[number % 4], pictures[number // 4 % 4]))
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


def test_unreadable_pictures_are_reported_by_id_and_the_rest_goes_on(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    folder = make_pope(4)
    pictures = sorted(folder.glob("val2014/*"))
    pictures[0].write_bytes(b"no picture")
    pictures[1].unlink()
    pictures[2].write_bytes(pictures[3].read_bytes()[:300])
    questions = Pope().load(folder)
    sink, faults = run(fake_parts, questions, batch_size=4)
    assert len(sink.done) == 6
    assert len(faults) == 18
    reasons = {fault.question.images[0]: fault.reason for fault in faults}
    assert "not an image" in reasons[pictures[0]]
    assert str(pictures[1]) in reasons[pictures[1]]
    assert "truncated" in reasons[pictures[2]]


def test_a_picture_that_the_processor_refuses_costs_its_questions_only(
    make_pope: Callable[..., Path], fake_parts: tuple
) -> None:
    from PIL import Image

    folder = make_pope()
    picture = sorted(folder.glob("val2014/*"))[1]
    Image.new("RGB", (1, 1)).save(picture)
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
