"""The page's HTML: text is escaped, figures are written for a person, and the history follows one image."""

import numpy as np
import pytest
from PIL import Image

from llava.serve.page_model import Drawn, Result
from llava.serve.page_parts import (
    CARET,
    NUM_STEPS,
    Column,
    describe_move,
    extend_history,
    format_flops,
    show_answers,
    show_history,
    show_pictures,
    show_problem,
)

HARM = '<img src=x onerror="alert(1)">'
SAFE = "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;"


def make_result(text: str = "circle", spec: str = "TRIM:8", **changes) -> Result:
    kept = np.arange(16) < changes.pop("count", 8)
    picture = Drawn("Kept patches", "8 of 16", Image.new("RGB", (400, 400), "red"), True)
    given = {
        "tokens": "9", "num_tokens": 9, "num_patches": 16, "new_tokens": 2, "first_seconds": 0.02, "seconds": 0.05,
        "stages": {"encode": 0.01, "generate": 0.03}, "flops": 326_242_048, "kept": kept, "pictures": (picture,),
    }  # fmt: skip
    return Result(spec=spec, text=text, **(given | changes))


def test_text_of_a_user_or_a_model_is_never_html():
    drawn = Drawn(HARM, HARM, Image.new("RGB", (4, 4)), True)
    result = make_result(HARM, HARM, note=HARM)
    shown = [
        show_answers([Column(HARM, HARM), Column(HARM, "", result)]),
        show_pictures([drawn]),
        show_problem(HARM),
    ]
    assert all(HARM not in each and SAFE in each for each in shown)


def test_a_history_of_hostile_questions_is_never_html(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    steps = []
    for question in (HARM, f"{HARM}?"):
        steps = extend_history(steps, tmp_path / "a.png", question, make_result(HARM, HARM))
    shown = show_history(steps)
    assert HARM not in shown and shown.count(SAFE) >= 6


def test_an_answer_shows_tokens_time_and_flops_and_a_caret_until_it_is_complete():
    assert CARET in show_answers([Column("TRIM:8", "ci")])
    shown = show_answers([Column("TRIM:8", "", make_result())])
    for words in ("9 of 16 (56 %)", "50 ms, first token after 20 ms", "vision tower 10, language model 30 ms",
                  "326 MFLOPs", "2 tokens"):  # fmt: skip
        assert words in shown
    assert CARET not in shown and "answer</span>" not in shown


def test_a_second_answer_is_what_the_first_is_held_against():
    full = make_result("Circle.", "none", tokens="16", num_tokens=16, flops=652_484_096, seconds=0.1)
    shown = show_answers([Column("TRIM:8", "", make_result()), Column("none", "", full)])
    assert "same answer" in shown and "326 MFLOPs (50 %)" in shown and "no reduction" in shown
    assert 'width: 50.0%"></span></div><small>vision' in shown  # half of the full model's time
    assert "another answer" in show_answers([Column("TRIM:8", "", make_result("square")), Column("none", "", full)])


def test_what_is_not_known_is_left_out():
    bare = Result("none", "", "", None, None, None, 0.1, 0.2, note="A server's reply does not say it.")
    shown = show_answers([Column("none", "", bare)])
    assert "(empty)" in shown and "server&#x27;s reply" in shown
    assert not any(words in shown for words in ("image tokens", "FLOPs", "vision tower", "None"))
    staged = make_result(tokens="64, then 16", num_tokens=64, num_patches=64)
    assert "64, then 16 of 64<div" in show_answers([Column("FastV:16", "", staged)])


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (326_242_048, "326 MFLOPs"),
        (8_672_000_000_000, "8.67 TFLOPs"),
        (13_300_000_000, "13.3 GFLOPs"),
        (999_900_000, "1.00 GFLOPs"),
        (999_400_000, "999 MFLOPs"),
        (500_000, "0.500 MFLOPs"),
    ],
)
def test_flops_have_three_digits(flops, text):
    assert format_flops(flops) == text


def test_the_history_is_of_one_image_keeps_the_last_and_the_same_question_replaces_itself(tmp_path):
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image in images:
        image.write_bytes(image.name.encode())
    steps = []
    for number in range(NUM_STEPS + 2):
        steps = extend_history(steps, images[0], f"question {number}", make_result(count=number + 1))
    assert [step.question for step in steps] == [f"question {number}" for number in range(2, NUM_STEPS + 2)]
    again = extend_history(steps, images[0], steps[-1].question, make_result("other", count=3))
    assert [step.text for step in again] == ["circle"] * (NUM_STEPS - 1) + ["other"]
    assert extend_history(steps, images[0], "full", make_result(spec="none", kept=None, pictures=())) == steps
    (only,) = extend_history(steps, images[1], "new image", make_result())
    assert show_history([only]) == ""
    shown = show_history(steps)
    assert "7 of 8 patches as before" in shown and shown.count("<figure") == NUM_STEPS


def test_a_move_counts_patches_that_were_kept_before():
    before, kept = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 1], bool)
    assert describe_move(before, kept) == "1 of 3 patches as before"
