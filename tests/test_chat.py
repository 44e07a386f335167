"""A dialogue answers as recorded from the published code, keeps its images, and refuses what does not fit."""

import io
import json
import sys

import pytest
import torch
from transformers import TextStreamer

from llava.chat import ChatSession, describe_tokens
from llava.errors import InputError
from llava.image import load_image
from llava.model.builder import load_pretrained_model
from llava.prompt import place_images
from llava.sampling import Sampling
from llava.serve import cli

TRIM = "llava-v1.5-tiny84-TRIM"
NOISE, SIGN, TALL = (f"../data/images/{name}.png" for name in ("noise", "sign", "tall_shapes"))
BUS = "What is the color of the bus?"


@pytest.fixture(scope="module")
def loaded(golden):
    """The tiny TRIM model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(TRIM, device="cpu")


@pytest.fixture
def session(loaded, checkpoints):
    """A dialogue about the noise image."""
    tokenizer, model, image_processor, _ = loaded
    session = ChatSession(model, tokenizer, image_processor, "vicuna_v1")
    session.show([load_image(NOISE)])
    return session


def test_answers_are_the_recorded_ones(loaded, golden, checkpoints):
    tokenizer, model, image_processor, _ = loaded
    recorded = json.loads((golden / "core.json").read_text())
    texts = {name: text for name, text in recorded["texts"].items() if text.strip()}  # commands refuse empty questions
    cases = [case for case in recorded["cases"] if (case["tower"], case["cfg"]) == ("84", "auto")]
    cases = [case for case in cases if case["text"] in texts]
    assert len(cases) > 10
    session = ChatSession(model, tokenizer, image_processor, "vicuna_v1")
    for case in cases:
        session.show([load_image(f"../data/images/{case['image']}.png")])
        answer = session.ask(texts[case["text"]], Sampling(max_new_tokens=16))
        assert answer.text == tokenizer.decode(case["generated"], skip_special_tokens=True).strip()
        assert (answer.num_tokens, answer.num_patches) == (case["k"] + 1, 36)


def test_the_image_stays_and_each_turn_keeps_what_its_own_question_asks_for(session):
    questions = [BUS, "And the sign?", "Is there text?"]
    asked = [session.ask(question, Sampling(max_new_tokens=3)) for question in questions]
    assert [answer.prompt.count("<image>") for answer in asked] == [1, 1, 1]
    assert f"{asked[0].text}</s>USER: {questions[1]} ASSISTANT:" in asked[1].prompt
    for question, answer in zip(questions, asked, strict=True):
        session.show([load_image(NOISE)])
        assert session.ask(question, Sampling(max_new_tokens=3)).num_tokens == answer.num_tokens
    assert len({answer.num_tokens for answer in asked}) > 1


def test_the_vision_tower_runs_once_per_image_not_per_question(session, monkeypatch):
    monkeypatch.setattr(session.model, "encode_patches", lambda images: pytest.fail("encoded again"))
    assert session.ask(BUS, Sampling(max_new_tokens=1)).num_patches == 36


def test_streamed_text_is_the_answer(session, capsys):
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = session.ask(BUS, Sampling(max_new_tokens=8), streamer)
    assert capsys.readouterr().out.strip() == answer.text != ""


def test_several_images_each_get_a_placeholder_and_their_tokens_add_up(session):
    session.show([load_image(NOISE), load_image(SIGN), load_image(TALL)])
    answer = session.ask(BUS, Sampling(max_new_tokens=2))
    assert "USER: <image>\n<image>\n<image>\nWhat" in answer.prompt
    assert answer.num_patches == 3 * 36 and 3 <= answer.num_tokens < 3 * 36


def test_placeholders_written_by_the_user_stay_where_they_are(session):
    session.show([load_image(NOISE), load_image(SIGN)])
    answer = session.ask("Compare <image-placeholder> and <image>.", Sampling(max_new_tokens=1))
    assert "USER: Compare <image> and <image>. ASSISTANT:" in answer.prompt


def test_placeholders_do_not_reach_the_text_tower(session, monkeypatch):
    queries = []
    original = session.model.make_image_tokens

    def record(patches, texts, sizes):
        queries.extend(texts)
        return original(patches, texts, sizes)

    monkeypatch.setattr(session.model, "make_image_tokens", record)
    session.ask(f"<image>\n{BUS}", Sampling(max_new_tokens=1))
    assert queries == [BUS]


def test_start_and_end_tokens_frame_the_placeholder_where_the_checkpoint_wants_them(session, monkeypatch):
    monkeypatch.setattr(session.model.config, "mm_use_im_start_end", True)
    assert "USER: <im_start><image><im_end>\nWhat" in session.ask(BUS, Sampling(max_new_tokens=1)).prompt


def test_without_images_the_model_talks(session):
    session.show([])
    answer = session.ask("Hello?", Sampling(max_new_tokens=2))
    assert "<image>" not in answer.prompt and answer.describe_tokens() == "visual tokens: none (no image)"


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (" \n", "empty"),
        ("<image>", "empty"),
        ("<image> or <image>?", "2 <image> placeholders for 0 new images"),
        ("word " * 5000, "positions"),
        ("word " * 300_000, "a text of 1,500,000 characters"),
        ("half \ud83d", "character 6 of the text, '.ud83d', is half of a surrogate pair"),
    ],
)
def test_a_refused_question_leaves_the_dialogue_as_it_was(session, question, reason):
    session.ask(BUS, Sampling(max_new_tokens=1))
    before = session.conversation.get_prompt()
    with pytest.raises(InputError, match=reason):
        session.ask(question, Sampling(max_new_tokens=1))
    assert session.conversation.get_prompt() == before
    assert session.ask("And now?", Sampling(max_new_tokens=1)).prompt.startswith(before)


@pytest.mark.parametrize("question", ["这张图片里有什么？", "\udce9t\udce9", "a\0b", "word " * 2000, "🙂"])
def test_questions_of_every_kind_are_answered(session, question):
    answer = session.ask(question, Sampling(max_new_tokens=2))
    assert 1 <= answer.num_tokens <= 36


def test_the_templates_end_of_turn_ends_the_answer_and_is_not_part_of_it(loaded, checkpoints, monkeypatch):
    tokenizer, model, image_processor, _ = loaded
    spoken = tokenizer("It is red.###", add_special_tokens=False).input_ids

    def generate(input_ids, stopping_criteria, **options):
        for length in range(1, len(spoken) + 1):
            output_ids = torch.tensor([spoken[:length]])
            if stopping_criteria(output_ids, None).all():
                return output_ids
        pytest.fail("the end of turn did not stop the answer")

    monkeypatch.setattr(model, "generate", generate)
    assert ChatSession(model, tokenizer, image_processor, "llava_v0").ask("What color?").text == "It is red."


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-320},
        {"temperature": 1e300},
        {"top_p": 0},
        {"top_p": 1.5},
        {"num_beams": 0},
        {"num_beams": 100_000},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_sampling_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        Sampling(**setting)


def test_sampling_and_beams_reach_generate(session):
    assert Sampling(temperature=0.5, top_p=0.9).as_arguments()["do_sample"] is True
    assert "temperature" not in Sampling().as_arguments()
    torch.manual_seed(0)
    drawn = {session.ask(BUS, Sampling(temperature=5.0, max_new_tokens=4)).text for _ in range(3)}
    assert len(drawn) > 1
    session.show([load_image(NOISE)])
    assert session.ask(BUS, Sampling(num_beams=3, max_new_tokens=4)).text


def test_a_seed_repeats_the_draw(session):
    def draw(seed):
        session.show([load_image(NOISE)])
        return session.ask(BUS, Sampling(temperature=5.0, max_new_tokens=4, seed=seed)).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_unknown_templates_are_refused_with_the_closest_name(loaded):
    tokenizer, model, image_processor, _ = loaded
    with pytest.raises(InputError, match='did you mean "vicuna_v1"'):
        ChatSession(model, tokenizer, image_processor, "vicuna1")


def test_place_images_counts_before_it_writes():
    assert place_images("Hi", 2) == "<image>\n<image>\nHi" and place_images("a <image>", 1) == "a <image>"
    with pytest.raises(InputError, match="1 <image> placeholders for 0 new images"):
        place_images("a <image>", 0)


def test_tokens_are_described_with_their_share():
    assert describe_tokens(29, 576) == "visual tokens: 29 of 576 kept (5.0 %)"


def test_at_the_terminal_a_refused_question_does_not_end_the_chat(session, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{'word ' * 5000}\n{BUS}\n"))
    cli.chat(session, Sampling(max_new_tokens=1))
    out = capsys.readouterr().out
    assert "positions" in out and out.count("[visual tokens: 7 of 36") == 1
