"""What the pocket language model starts from and practises: true answers, whole pieces, heads that look back."""

import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from playground.shapes import choice, conversation, practice, sentence
from playground.shapes.base_llm import LOOK_BACK, write_base_llm
from playground.shapes.world import draw_scene


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """An untrained model of the real width and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    write_base_llm(folder, num_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def check(question: str, answer: str, options: dict[str, str]) -> None:
    """Compare a practice answer with the options that the conversation shows."""
    names = {name: letter for letter, name in options.items()}
    if question.startswith("Which letter is "):
        assert answer == names[question.removeprefix("Which letter is ").removesuffix("?")]
    elif question.startswith("What is "):
        assert answer == options[question.removeprefix("What is ").removesuffix("?")]
    elif question == "Repeat.":
        assert answer == " ".join(f"{letter}. {name}" for letter, name in options.items())
    elif question.startswith("List "):
        assert answer == ", ".join(options[letter] for letter in question[len("List ") : -1].split())
    else:
        asked = question.removeprefix("Letters ").removesuffix(".").split(", ")
        assert answer == " ".join(names[name] for name in asked)


def test_every_practice_answer_is_true_of_the_options_shown() -> None:
    chooser = random.Random(0)
    kinds = set()
    for _ in range(200):
        pairs = practice.practise(chooser)
        opening, *shown, first = pairs[0][0].split("\n")
        assert opening == practice.OPENING
        options = dict(line.split(". ") for line in shown)
        for question, answer in [(first, pairs[0][1]), *pairs[1:]]:
            check(question, answer, options)
            kinds.add(question.split()[0])
    assert kinds == {"Which", "What", "Repeat.", "List", "Letters"}


def test_multiple_choice_told_in_words_asks_for_no_place_and_names_the_right_letter() -> None:
    chooser = random.Random(1)
    for index in range(200):
        _, scene = draw_scene(0, 0, index)
        *before, asked = conversation.choose_in_words(scene, chooser)
        if before:
            line = re.search(rf"\n([A-D])\. {re.escape(before[0].answer)}\n", asked.prompt)
            assert asked.answer == line[1]
        assert "Where" not in asked.text and "在哪里" not in asked.text


def test_a_text_sample_practises_letters_or_tells_a_picture() -> None:
    chooser = random.Random(2)
    _, scene = draw_scene(0, 0, 0)
    samples = [conversation.converse_in_words("x", scene, chooser, conversation.FIRST_WORDS) for _ in range(300)]
    practised = sum(sample["id"].startswith("letters-") for sample in samples)
    assert 180 <= practised <= 240  # seven in ten
    told = [sample for sample in samples if sample["id"].startswith("words-")]
    assert all(sample["conversations"][0]["value"].startswith("Picture: ") for sample in told)


def test_option_marks_and_the_lines_of_the_benchmarks_are_single_pieces(base) -> None:
    _, tokenizer = base
    text = "Which?\nA. red circle\nB. blue star" + choice.LETTER_LINE
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert {"\nA.", "\nB.", choice.LETTER_LINE.strip()} <= set(pieces)
    for line in (sentence.SUFFIX, sentence.UNANSWERABLE_HINT, choice.LETTER_LINE_CN):
        assert line.strip() in tokenizer.convert_ids_to_tokens(tokenizer("x" + line).input_ids)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_first_heads_of_an_untrained_model_look_at_the_tokens_before(base) -> None:
    model, tokenizer = base
    ids = tokenizer("Is there a red circle in the image? What color is the square?", return_tensors="pt").input_ids
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0][0]
    rows = torch.arange(4, ids.shape[1])
    for head, distance in enumerate(LOOK_BACK):
        assert attention[head, rows, rows - distance].mean() > 0.7
    assert attention[len(LOOK_BACK) :, rows, rows - 1].mean() < 0.4  # the other heads are random
