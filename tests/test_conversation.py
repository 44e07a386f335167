"""The templates render exactly the prompts the checkpoints were trained with."""

import base64
import copy
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from llava.conversation import SeparatorStyle, conv_templates, conversation_name_for, default_conversation, to_jinja

GOLDEN = Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "conv_prompts.json").read_text(encoding="utf-8"))
DIALOGUES = {
    "prompt_one": ["<image>\nHello?", None],
    "prompt_two": ["<image>\nHello?", "Hi.", "More?", None],
    "prompt_done": ["<image>\nHello?", "Hi.", "More?", "Yes."],
}


def start(name, texts):
    conversation = conv_templates[name].copy()
    for number, text in enumerate(texts):
        conversation.append_message(conversation.roles[number % 2], text)
    return conversation


def test_the_template_table_has_exactly_llavas_names_and_those_of_qwen():
    assert set(conv_templates) == set(RECORDED) | {"qwen_1_5", "qwen_2"}


def test_qwens_chatml_ends_each_turn_with_a_line():
    prompt = start("qwen_1_5", ["<image>\nHello?", "Hi.", "More?", None]).get_prompt()
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", sorted(conv_templates))
@pytest.mark.parametrize("turns", [1, 3])
def test_a_jinja_template_renders_what_the_template_does(name, turns):
    source = to_jinja(conv_templates[name])
    if source is None:
        assert conv_templates[name].offset or "mmtag" in name or "plain" in name
        return
    texts = ['What\'s <b> & "that"?', "Hi.", "More?"][:turns]
    conversation = start(name, [f"<image>\n{texts[0]}", *texts[1:], None])
    parts = [{"type": "text", "text": texts[0]}, {"type": "image"}]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text if number else parts}
        for number, text in enumerate(texts)
    ]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    assert template.render(messages=messages, add_generation_prompt=True) == conversation.get_prompt()


def test_another_system_message_keeps_chatmls_markup_in_jinja_too():
    conversation = conv_templates["qwen_2"].with_system("Be brief.")
    conversation.append_message(conversation.roles[0], "Hello?")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    rendered = ImmutableSandboxedEnvironment().from_string(to_jinja(conv_templates["qwen_2"])).render(messages=messages)
    assert rendered == conversation.get_prompt()
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("name", RECORDED)
def test_template_fields_are_llavas(name):
    template, recorded = conv_templates[name], RECORDED[name]
    assert template.system == recorded["system"]
    assert list(template.roles) == recorded["roles"]
    assert (template.sep, template.sep2) == (recorded["sep"], recorded["sep2"])
    assert template.sep_style.name == recorded["sep_style"]
    assert template.version == recorded["version"]
    assert len(template.messages) == template.offset == recorded["n_preset_messages"]


CASES = [(name, dialogue, RECORDED[name][dialogue]) for name in RECORDED for dialogue in DIALOGUES]
# The released code crashed where a dictionary with the error was recorded.
CRASHED = [case for case in CASES if isinstance(case[2], dict)]


@pytest.mark.parametrize(("name", "dialogue", "recorded"), [case for case in CASES if case not in CRASHED])
def test_prompts_are_the_recorded_ones(name, dialogue, recorded):
    assert start(name, DIALOGUES[dialogue]).get_prompt() == recorded


def test_plain_template_renders_answers_where_the_released_code_crashed():
    assert {name for name, _, _ in CRASHED} == {"plain", "v0_plain"}
    assert start("plain", DIALOGUES["prompt_done"]).get_prompt() == "<image>\nHello?\nHi.\nMore?\nYes.\n"


def test_copies_share_no_turns_with_the_template():
    for duplicate in (conv_templates["vicuna_v1"].copy(), copy.deepcopy(conv_templates["vicuna_v1"])):
        duplicate.append_message("USER", "Hi")
        duplicate.messages[0][1] = "changed"
        assert conv_templates["vicuna_v1"].messages == []


def test_a_copied_turn_can_be_changed_alone():
    original = start("v1", ["one", None])
    duplicate = original.copy()
    duplicate.messages[1][1] = "two"
    assert original.messages[1][1] is None


def test_the_default_is_vicuna_v1():
    assert default_conversation is conv_templates["vicuna_v1"]
    assert default_conversation.sep_style is SeparatorStyle.TWO


def test_an_image_in_the_first_message_puts_the_placeholder_first():
    image = Image.new("RGB", (4, 4))
    conversation = start("vicuna_v1", [("What? <image>", image, "Default"), None])
    assert conversation.get_prompt().endswith(" USER: <image>\nWhat? ASSISTANT:")
    tagged = start("v1_mmtag", [("What? <image>", image, "Default"), None]).get_prompt()
    assert tagged.endswith(" USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What? ASSISTANT:")


def test_llama_2_refuses_a_dialogue_without_a_first_question():
    with pytest.raises(ValueError, match="starts with a text of USER"):
        start("llama_2", [None]).get_prompt()


@pytest.mark.parametrize(
    ("mode", "size"), [("Default", (1344, 504)), ("Crop", (1344, 504)), ("Resize", (336, 336)), ("Pad", (672, 672))]
)
def test_shown_images_fit_a_web_page(mode, size):
    conversation = start("vicuna_v1", [("Hi", Image.new("RGB", (1600, 600)), mode), "Yes."])
    (shown,) = conversation.get_images(return_pil=True)
    assert shown.size == size
    decoded = Image.open(BytesIO(base64.b64decode(conversation.get_images()[0])))
    assert decoded.size == size


def test_an_unknown_image_mode_is_refused():
    with pytest.raises(ValueError, match="Default, Crop, Pad or Resize"):
        start("vicuna_v1", [("Hi", Image.new("RGB", (4, 4)), "Tile"), None]).get_images()


def test_gradio_pairs_escape_the_question_and_leave_the_open_answer_empty():
    conversation = start("vicuna_v1", [("<image>\na < b?", Image.new("RGB", (4, 4)), "Default"), "Yes.", "Why?", None])
    first, second = conversation.to_gradio_chatbot()
    assert first[0].startswith('<img src="data:image/png;base64,') and first[0].endswith("a &lt; b?")
    assert first[1] == "Yes." and second == ["Why?", None]


def test_preset_turns_are_not_shown():
    assert start("v0", ["Hi", None]).to_gradio_chatbot() == [["Hi", None]]


def test_dict_is_plain_data():
    conversation = start("vicuna_v1", [("Hi", Image.new("RGB", (4, 4)), "Default"), "Yes."])
    fields = conversation.dict()
    assert json.loads(json.dumps(fields))["messages"] == [["USER", "Hi"], ["ASSISTANT", "Yes."]]
    assert set(fields) == {"system", "roles", "messages", "offset", "sep", "sep2"}


@pytest.mark.parametrize(
    ("model_name", "template"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-Llama-2-13b-chat", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ("LLaVA-7b-delta-v0", "llava_v0"),
        ("llava-shapes-TRIM", "vicuna_v1"),
        ("attempt3", "vicuna_v1"),
        ("run-v0.2-shapes", "vicuna_v1"),
    ],
)
def test_the_template_follows_the_checkpoint_name(model_name, template):
    assert conversation_name_for(model_name) == template


def test_constants_and_conversation_load_no_torch():
    code = "import sys, llava, llava.constants, llava.conversation, llava.image; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=GOLDEN.parents[1]).returncode == 0
