"""Ids and labels: equal to those of the released code where it is right, exact where it is not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer
from llava.train.records import parse_record
from llava.train.targets import (
    TRAINABLE_STYLES,
    Targets,
    build_targets,
    choose_placeholder,
    choose_query,
    choose_template,
    render,
    settle_version,
)
from tests.families import write_checkpoint
from tests.test_chat_template import CHATML, INSTRUCT

RECORDED = json.loads((Path(__file__).parents[1] / "golden/train_data.json").read_text(encoding="utf-8"))
RECORDS = {raw["id"]: parse_record(raw, number) for number, raw in enumerate(RECORDED["conversations"])}
MISTAKEN = "c6_system"  # a separator inside the answer: the published code masks the whole sample
DIALOGUE = ("<image>\nWhat is red?", "The circle.", "And USER: blue?", "A box. ASSISTANT: no", "Is it 一?", "一个 🙂")
TEMPLATES = sorted(
    name
    for name, template in conv_templates.items()
    if template.sep_style in TRAINABLE_STYLES and template.sep_style is not SeparatorStyle.PLAIN
)


def build(turns: tuple[str, ...], version: str, tokenizer) -> Targets:
    return build_targets(render(turns, choose_template(version)), tokenizer)


def decode_answers(targets: Targets, tokenizer) -> str:
    """Decode all that has a label, end tokens included."""
    return tokenizer.decode([label for label in targets.labels if label != IGNORE_INDEX])


def squeeze(text: str) -> str:
    return "".join(text.split())


def expected_answers(turns: tuple[str, ...], version: str) -> str:
    template = choose_template(version)
    end = template.sep if template.sep2 is None else template.sep2
    return squeeze("".join(answer + end for answer in turns[1::2]))


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A GPT-2 style byte-level tokenizer: no sequence start, no `▁` before words, `</s>` in pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([render(DIALOGUE, choose_template("v1")).prompt] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("recording", ["preprocess_v1", "preprocess_v1_max64"])
@pytest.mark.parametrize("name", [name for name in RECORDS if name != MISTAKEN])
def test_v1_equals_the_published_ids_and_labels(recording: str, name: str, tokenizer: LlamaTokenizer):
    recorded = RECORDED[recording][name]
    targets = build(RECORDS[name].turns, "v1", tokenizer)
    length = len(recorded["input_ids"])  # the published code cuts text-only samples here, we cut in the collator
    assert targets.input_ids[:length] == recorded["input_ids"]
    assert targets.labels[:length] == recorded["labels"]
    assert len(targets.input_ids) == length or length == 64


@pytest.mark.parametrize("name", list(RECORDS))
def test_turns_and_conversation_query_equal_the_published(name: str):
    recorded = RECORDED["preprocess_v1"][name]
    turns = RECORDS[name].turns
    assert turns == tuple(turn["value"] for turn in recorded["after_preprocess_multimodal"])[-len(turns) :]
    assert choose_query(turns, render(turns, choose_template("v1")), "conversation") == recorded["texts"]


def test_a_separator_inside_an_answer_does_not_mask_the_sample(tokenizer: LlamaTokenizer):
    recorded = RECORDED["preprocess_v1"][MISTAKEN]
    targets = build(RECORDS[MISTAKEN].turns, "v1", tokenizer)
    assert set(recorded["labels"]) == {IGNORE_INDEX}
    assert targets.input_ids == recorded["input_ids"]
    assert decode_answers(targets, tokenizer) == "ok ASSISTANT: yes</s>"


@pytest.mark.parametrize("version", ["plain", "llava_llama_2", "v1"])
def test_other_styles_equal_the_published_ids_and_labels(version: str, tokenizer: LlamaTokenizer):
    recorded = RECORDED["other_versions"][version]
    targets = build(RECORDS["c2"].turns, version, tokenizer)
    assert targets == Targets(recorded["input_ids"], recorded["labels"])


def test_mpt_equals_the_published_ids_and_labels_the_answer_that_they_mask(tokenizer: LlamaTokenizer):
    recorded = RECORDED["other_versions"]["mpt"]
    targets = build(RECORDS["c2"].turns, "mpt", tokenizer)
    assert set(recorded["labels"]) == {IGNORE_INDEX}
    assert targets.input_ids == recorded["input_ids"]
    assert decode_answers(targets, tokenizer) == "STOP 7:45 EXIT<|im_end|>"


@pytest.mark.parametrize("version", TEMPLATES)
def test_every_template_labels_exactly_the_answers_of_a_long_dialogue(version: str, tokenizer: LlamaTokenizer):
    targets = build(DIALOGUE, version, tokenizer)
    assert squeeze(decode_answers(targets, tokenizer)) == expected_answers(DIALOGUE, version)


@pytest.mark.parametrize("version", TEMPLATES)
def test_masks_are_exact_where_a_role_has_other_pieces_after_the_end_token(version: str, golden: Path):
    tokenizer = LlamaTokenizer.from_pretrained(str(golden / "checkpoints/lmsys/vicuna-tiny-v1.5"))
    tokenizer.add_tokens(["USER", "[INST]"])  # the length arithmetic of the published code needs them split
    targets = build(DIALOGUE, version, tokenizer)
    assert squeeze(decode_answers(targets, tokenizer)) == expected_answers(DIALOGUE, version)


@pytest.mark.parametrize("version", TEMPLATES)
def test_masks_are_exact_with_a_byte_level_tokenizer(version: str, byte_tokenizer: PreTrainedTokenizerFast):
    targets = build(DIALOGUE, version, byte_tokenizer)
    assert squeeze(decode_answers(targets, byte_tokenizer)) == expected_answers(DIALOGUE, version)


@pytest.mark.parametrize("version", ["plain", *TEMPLATES])
def test_a_tokenizer_without_offsets_gives_the_same_labels(version: str, byte_tokenizer: PreTrainedTokenizerFast):
    turns = DIALOGUE[:2] if version == "plain" else DIALOGUE
    blind = SimpleNamespace(is_fast=False, bos_token_id=None)
    without_offsets = type(
        "Blind", (), {**vars(blind), "__call__": lambda self, text, **options: byte_tokenizer(text, **options)}
    )()
    assert build(turns, version, without_offsets) == build(turns, version, byte_tokenizer)


@pytest.mark.parametrize(
    "turns",
    [
        ("<image>\na <image> b<image>", "yes"),
        ("<image> and <image>", " leading space"),
        ("<image>\n", "▁odd"),
        ("no image", "right"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "llava_llama_2"])
def test_ids_are_those_of_the_prompt_read_at_inference(turns: tuple[str, str], version: str, tokenizer: LlamaTokenizer):
    rendered = render(turns, choose_template(version))
    targets = build_targets(rendered, tokenizer)
    assert targets.input_ids == tokenizer_image_token(rendered.prompt, tokenizer)
    assert targets.input_ids.count(IMAGE_TOKEN_INDEX) == turns[0].count("<image>")
    assert squeeze(decode_answers(targets, tokenizer)).startswith(squeeze(turns[1].replace("▁", " ")))


@pytest.mark.parametrize("caption", ["A cat.", " A cat.", "▁A cat.", "\nA cat."])
def test_plain_labels_everything_after_the_image(caption: str, tokenizer: LlamaTokenizer):
    targets = build(("<image>", caption), "plain", tokenizer)
    assert targets.input_ids == tokenizer_image_token(f"<image>{caption}\n", tokenizer)
    assert targets.labels == [IGNORE_INDEX, IGNORE_INDEX, *targets.input_ids[2:]]


def test_an_empty_answer_has_no_labels(tokenizer: LlamaTokenizer):
    targets = build(("Say nothing.", "", "Say a word.", "Word."), "v1", tokenizer)
    assert decode_answers(targets, tokenizer) == "Word.</s>"


def test_a_trailing_question_has_no_labels(tokenizer: LlamaTokenizer):
    targets = build(("One?", "Yes.", "Two?"), "v1", tokenizer)
    assert decode_answers(targets, tokenizer) == "Yes.</s>"


def test_questions_query_holds_the_users_turns_and_nothing_else():
    turns = RECORDS["c1"].turns
    query = choose_query(turns, render(turns, choose_template("v1")), "questions")
    assert query == (
        "What shape is red?\nAnswer the question using a single word or phrase.\nAnd the blue one?\nIs there text?"
    )


def test_placeholders_carry_the_tags_that_template_and_flags_ask_for():
    assert choose_placeholder(conv_templates["v1"], use_start_end=False) == "<image>"
    assert choose_placeholder(conv_templates["v1"], use_start_end=True) == "<im_start><image><im_end>"
    mark = choose_placeholder(conv_templates["v1_mmtag"], use_start_end=False)
    assert mark == "<Image><image></Image>"
    rendered = render(("<image>\nHi", "yes"), choose_template("v1_mmtag"), mark)
    assert "USER: <Image><image></Image>\nHi ASSISTANT:" in rendered.prompt


@pytest.fixture(scope="module")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """Qwen2's kind, without a chat template."""
    return load_tokenizer(str(write_checkpoint(tmp_path_factory.mktemp("llm") / "qwen", "qwen", is_llava=False)))


@pytest.fixture
def chat_tokenizer(chatml_tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The same with a chat template."""
    monkeypatch.setattr(chatml_tokenizer, "chat_template", CHATML)
    return chatml_tokenizer


@pytest.mark.parametrize("version", ["chat_template", "qwen_1_5", "qwen_2", "chatml_direct", "mistral_direct", "mpt"])
def test_what_is_learned_is_the_answer_and_the_end_token_and_nothing_behind(version: str, chat_tokenizer):
    targets = build_targets(render(DIALOGUE, choose_template(version, chat_tokenizer)), chat_tokenizer)
    learned = [label for label in targets.labels if label != IGNORE_INDEX]
    assert chat_tokenizer.decode(learned) == "".join(f"{answer}<|im_end|>" for answer in DIALOGUE[1::2])
    assert learned.count(chat_tokenizer.eos_token_id) == len(DIALOGUE[1::2])


def test_the_blank_of_an_opening_is_learned_with_the_answer(chat_tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", INSTRUCT)
    targets = build_targets(render(("Red?", "Yes."), choose_template("chat_template", chat_tokenizer)), chat_tokenizer)
    assert decode_answers(targets, chat_tokenizer) == " Yes.<|im_end|>"


def test_auto_follows_the_tokenizer(tokenizer: LlamaTokenizer, chat_tokenizer):
    assert settle_version("auto", chat_tokenizer) == "chat_template"
    assert settle_version("auto", tokenizer) == "v1"
    assert settle_version("v1", tokenizer) == "v1"
    assert settle_version("plain", chat_tokenizer) == "plain"


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mistral_instruct"])
def test_a_separator_that_is_no_token_is_refused_with_the_template_that_fits(
    version: str, chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match=f"--version {version} ends an answer with </s>, .* --version qwen_2 fits it"):
        settle_version(version, chatml_tokenizer)
    monkeypatch.setattr(chatml_tokenizer, "chat_template", CHATML)
    with pytest.raises(InputError, match=r"not one special token of the tokenizer of .*: --version chat_template fits"):
        settle_version(version, chatml_tokenizer)


def test_chatml_is_refused_with_llamas_tokenizer_and_v1_named(tokenizer: LlamaTokenizer):
    with pytest.raises(InputError, match=r"--version mpt ends an answer with <\|im_end\|>, .* --version v1 fits it"):
        settle_version("mpt", tokenizer)


def test_a_tokenizer_that_no_template_fits_is_told_to_get_one(byte_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(InputError, match=r"--version v1 .* no template that is known here fits it: give it a chat"):
        settle_version("auto", byte_tokenizer)


def test_a_chat_template_that_cannot_be_used_is_refused_under_the_flags_name(
    chat_tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(InputError, match=r"^--version chat_template: tokenizer of .* \(no\): name a conversation temp"):
        settle_version("auto", chat_tokenizer)


@pytest.mark.parametrize("version", ["v0", "llava_v0", "v9"])
def test_a_version_without_masks_is_refused_with_the_known_ones(version: str):
    with pytest.raises(InputError, match=rf"--version {version}: .*llava_llama_2.*plain.*v1"):
        choose_template(version)


def test_plain_refuses_conversations_that_are_no_captions():
    with pytest.raises(InputError, match="two turns with the image placeholder"):
        render(("What?", "Nothing."), choose_template("plain"))
