"""Questions as people put them: they ask the same, are answered truly, and reach the model in the clients' spacing."""

import random
from pathlib import Path

import pytest

from llava.cli import ModelSpec
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.train.records import parse_record
from llava.train.targets import build_targets, render
from playground.shapes import conversation, measure_wordings, sentence, wording
from playground.shapes.base_llm import write_base_llm
from playground.shapes.world import draw_scene


def ask_all(kind: str, number: int = 200):
    """Questions of a kind about many scenes, each as it is and varied."""
    chooser = random.Random(0)
    for index in range(number):
        _, scene = draw_scene(0, 0, index)
        for question in sentence.KINDS[kind](scene, chooser):
            yield scene, question, wording.vary(question, chooser)


@pytest.mark.parametrize("kind", wording.WORDINGS)
def test_a_question_in_other_words_names_its_object_and_has_its_answer(kind: str) -> None:
    for _, question, varied in ask_all(kind):
        assert "{" not in varied.text and "  " not in varied.text
        assert question.name in varied.text and varied.about == question.about
        if varied.suffix or kind == "description":
            assert varied.answer == question.answer
        elif kind == "presence":
            assert varied.answer.startswith(f"{question.answer}, there is ") and question.name in varied.answer
        else:
            assert varied.answer.endswith(".") and question.answer in varied.answer


def test_all_other_words_instructions_and_spellings_come_up() -> None:
    asked = [varied for kind in wording.WORDINGS for _, _, varied in ask_all(kind, 400)]
    suffixes = {varied.suffix for varied in asked}
    assert suffixes == {sentence.SUFFIX, "", *wording.INSTRUCTIONS}
    texts = " ".join(varied.text for varied in asked)
    assert "colour" in texts and "color" in texts and "photo" in texts
    assert any(varied.text.islower() and "?" not in varied.text for varied in asked)
    for words in wording.WORDINGS.values():
        for text in words.texts:
            start = text.split("{", maxsplit=1)[0].removesuffix("a ")
            assert any(varied.text.startswith(start) for varied in asked), text


def test_a_question_without_other_words_stays_as_it_is() -> None:
    chooser = random.Random(0)
    _, scene = draw_scene(0, 0, 0)
    for kind in ("check", "two", "blind", "ocr", "sentence"):
        for question in sentence.KINDS[kind](scene, chooser):
            assert wording.vary(question, chooser) == question


def test_a_spaced_sample_is_learned_behind_the_prompt_of_a_client_that_sets_spaces(tmp_path) -> None:
    from transformers import AutoTokenizer

    write_base_llm(tmp_path, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = conv_templates["v1"]
    turns = conversation.make_turns([("<image>\nWhat colour is the cross?", "red")])
    record = parse_record(wording.space_out({"id": 0, "image": "a.png", "conversations": turns}), 0)
    targets = build_targets(render(record.turns, template), tokenizer)
    # VLMEvalKit's class LLaVA puts ` <image> ` before the text and a space behind `ASSISTANT:`.
    prompt = tokenizer_image_token(f"{template.system} USER:  <image> What colour is the cross? ASSISTANT: ", tokenizer)
    assert IMAGE_TOKEN_INDEX in prompt
    assert targets.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(targets.input_ids[len(prompt) :]) == "red</s>"
    assert targets.labels[len(prompt) :] == targets.input_ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-shapes", "llava-shapes-trim"])
def test_pocket_models_answer_people_and_clients_as_they_answer_benchmarks(name: str) -> None:
    checkpoint = Path("playground/shapes/checkpoints", name)
    measured = measure_wordings.measure(ModelSpec(str(checkpoint), device="cpu").load(quiet=True), 30)
    shares = {form: by_kind["all"] for form, by_kind in measured.items()}
    assert min(shares.values()) >= 60, shares
    assert min(shares.values()) >= max(shares.values()) - 12, shares


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("Yes, there is a red circle.", "Yes", True), ("No", "Yes", False), ("The circle is red.", "red", True),
     ("There are 2 objects.", "2", True), ("", "Yes", False), ("The circle is blue.", "red", False)],
)  # fmt: skip
def test_a_right_answer_is_a_word_or_a_sentence_that_holds_it(answer: str, expected: str, right: bool) -> None:
    assert measure_wordings.is_right(answer, sentence.Question("?", expected)) is right
