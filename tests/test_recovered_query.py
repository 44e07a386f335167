"""Recovering the question from a prompt, for clients that pass no query."""

from pathlib import Path

import pytest

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer
from llava.prompt import find_question, recover_query, wrap_prompt

QUESTION = "What is the color of the bus?\nAnswer the question using a single word or phrase."
CHAT_TEMPLATES = [name for name in conv_templates if "plain" not in name]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_question_is_found_in_every_chat_template(template):
    conversation = conv_templates[template].copy()
    conversation.messages = []
    conversation.append_message(conversation.roles[0], "<image>\n" + QUESTION)
    conversation.append_message(conversation.roles[1], None)
    assert find_question(conversation.get_prompt()) == QUESTION


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_last_turn_counts_in_a_chat(template):
    conversation = conv_templates[template].copy()
    conversation.messages = []
    conversation.append_message(conversation.roles[0], "<image>\nIs it red?")
    conversation.append_message(conversation.roles[1], "Yes.")
    conversation.append_message(conversation.roles[0], QUESTION)
    conversation.append_message(conversation.roles[1], None)
    assert find_question(conversation.get_prompt()) == QUESTION


def test_an_answer_behind_the_question_is_left_out():
    assert find_question("USER: <image>\nIs it red? ASSISTANT: Yes, it is") == "Is it red?"


def test_a_prompt_without_roles_is_the_question():
    assert find_question("<image>\nWhat is this?") == "What is this?"


def test_an_empty_question_stays_empty():
    assert find_question("A chat. USER: <image>\n ASSISTANT:") == ""


def test_a_sentence_that_the_tokenizer_keeps_as_a_special_token_stays_in_the_query():
    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "playground/shapes/checkpoints/llava-shapes-trim"))
    question = "What color is the circle?\nAnswer the question using a single word or phrase."
    assert question.rpartition("\n")[2] in tokenizer.all_special_tokens
    ids = tokenizer_image_token(wrap_prompt(question, 1, "vicuna_v1"), tokenizer, return_tensors="pt")
    assert recover_query(ids, tokenizer) == question
