"""A tokenizer's chat template as a conversation template: what it reads as, writes, and refuses."""

from pathlib import Path

import jinja2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.chat_template import CHAT_TEMPLATE, adds_start, find_end_token, read_chat_template
from llava.conversation import SeparatorStyle, take_parts, to_jinja
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.prompt import end_of_turn, find_template, recover_query, wrap_prompt

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|' + message.role + '|>\n\n' "
    "+ message.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
WORDS = (
    "{% for message in messages %}{{ 'User: ' if message.role == 'user' else 'Bot: ' }}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)
USABLE = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "words": WORDS}
DIALOGUE = ["<image>\nWhat is red?", "A circle.", "And blue?", "A box: yes.", "Is it 一?"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and ChatML's tokens, of which one is the sequence start that no text gets (as SmolLM2's)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    return made


def to_messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize("name", USABLE)
def test_every_dialogue_is_written_as_by_the_chat_template(name: str, tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = USABLE[name]
    template = read_chat_template(tokenizer)
    for count in range(1, len(DIALOGUE) + 1):
        conversation = template.copy()
        for number, text in enumerate(DIALOGUE[:count]):
            conversation.append_message(conversation.roles[number % 2], text)
        messages = to_messages(DIALOGUE[:count])
        assert conversation.get_prompt() == tokenizer.apply_chat_template(messages, tokenize=False)
        if count % 2:
            conversation.append_message(conversation.roles[1], None)
            opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert conversation.get_prompt() == opened
    assert end_of_turn(template) == "<|im_end|>"
    assert find_end_token(end_of_turn(template), tokenizer) == tokenizer.eos_token_id


def test_the_blank_before_an_answer_is_the_answers(tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = INSTRUCT
    assert wrap_prompt("Who?", 0, CHAT_TEMPLATE, tokenizer=tokenizer) == "<|im_start|>[INST] Who? [/INST]"


def test_a_sequence_start_that_the_tokenizer_adds_is_not_written_twice(golden: Path):
    from llava.model.tokenizer import load_tokenizer

    vicuna = load_tokenizer(str(golden / "checkpoints/lmsys/vicuna-tiny-v1.5"))
    vicuna.chat_template = INSTRUCT
    assert adds_start(vicuna)
    assert wrap_prompt("Who?", 0, CHAT_TEMPLATE, tokenizer=vicuna) == "[INST] Who? [/INST]"
    ids = tokenizer_image_token(wrap_prompt("Who?", 1, CHAT_TEMPLATE, tokenizer=vicuna), vicuna)
    assert ids.count(vicuna.bos_token_id) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('parts only') }}", r"takes no dialogue of texts \(parts only\)"),
        (WORDS.replace("else '\n'", "else loop.index"), "does not put every turn between the same two texts"),
        (CHATML.replace("'<|im_end|>' + '\n'", "('<|im_end|>' if loop.last else '')"), "does not put every turn"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "ends an answer with ''"),
        (CHATML.replace("<|im_end|>", "</s>"), r"ends an answer with '</s>\\n', not with one special token"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_one_line(
    source: str | None, reason: str, tokenizer: PreTrainedTokenizerFast
):
    tokenizer.chat_template = source
    with pytest.raises(InputError, match=rf"^tokenizer of .*{reason}.*: name a conversation template, such as") as told:
        read_chat_template(tokenizer)
    assert "\n" not in str(told.value)


def test_without_a_tokenizer_there_is_no_such_template():
    with pytest.raises(InputError, match="chat_template is a tokenizer's own"):
        find_template(CHAT_TEMPLATE)


@pytest.mark.parametrize("name", USABLE)
def test_the_question_is_recovered_from_ids(name: str, tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = USABLE[name]
    conversation = find_template(CHAT_TEMPLATE, tokenizer).copy()
    for number, text in enumerate([*DIALOGUE, None]):
        conversation.append_message(conversation.roles[number % 2], text)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")
    assert recover_query(ids, tokenizer, CHAT_TEMPLATE) == "Is it 一?"
    first = tokenizer_image_token(wrap_prompt("What is red?", 1, CHAT_TEMPLATE, tokenizer=tokenizer), tokenizer)
    assert recover_query(torch.tensor(first), tokenizer, CHAT_TEMPLATE) == "What is red?"


def test_text_behind_an_image_loses_no_token_where_prompts_begin_with_the_sequence_start_as_text(
    tokenizer: PreTrainedTokenizerFast,
):
    prompt = "<|im_start|>user\n<image>\nWhat?"
    ids = tokenizer_image_token(prompt, tokenizer)
    first, second = prompt.split("<image>")
    assert ids == [*tokenizer(first).input_ids, -200, *tokenizer(second).input_ids]


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_another_system_message_is_written_as_by_the_chat_template(name: str, tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = USABLE[name]
    conversation = read_chat_template(tokenizer).with_system("Be brief.")
    for number, text in enumerate(DIALOGUE):
        conversation.append_message(conversation.roles[number % 2], text)
    messages = [{"role": "system", "content": "Be brief."}, *to_messages(DIALOGUE)]
    assert conversation.get_prompt() == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "refusal", ["", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"]
)
def test_a_system_message_that_the_chat_template_leaves_out_or_refuses_is_refused(
    refusal: str, tokenizer: PreTrainedTokenizerFast
):
    source = "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}"
    tokenizer.chat_template = (
        f"{refusal}{source}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
    )
    template = read_chat_template(tokenizer)
    with pytest.raises(InputError, match="takes no system message"):
        template.with_system("Be brief.")


def test_a_processor_gets_it_with_parts(tokenizer: PreTrainedTokenizerFast):
    source = jinja2.Environment().from_string(take_parts(CHATML))
    parts = [{"type": "text", "text": "What is red?"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}, *to_messages(DIALOGUE)[1:]]
    expected = tokenizer.apply_chat_template(to_messages(DIALOGUE), tokenize=False)
    assert source.render(messages=messages) == expected
    assert read_chat_template(tokenizer).sep_style is SeparatorStyle.CHAT
    assert to_jinja(read_chat_template(tokenizer)) is None
