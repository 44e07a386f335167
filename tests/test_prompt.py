import json
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks._files import load_question_file
from llava.prompt import check_text, choose_conv_mode, query_of, recover_text, wrap_prompt


def test_pope_prompts_queries_and_limits_equal_the_published_scripts_in_every_record(golden: Path) -> None:
    oracle = golden / "oracle" / "pope"
    task = find_benchmark("pope")
    questions = task.load(oracle)
    expected = [json.loads(line) for line in (oracle / "expected_prompts.jsonl").read_text().splitlines()]
    assert len(questions) == len(expected) == 176
    for question, published in zip(questions, expected, strict=True):
        prompt = wrap_prompt(question.prompt, len(question.images), "vicuna_v1")
        assert prompt == published["prompt_sent_to_llm"]
        assert question.query == published["trim_text"]
        assert question.head() == {
            "question_id": published["question_id"],
            "prompt": published["answers_file_prompt"],
        }
        assert task.max_new_tokens == published["max_new_tokens"]


def test_a_question_of_text_alone_has_no_image_line() -> None:
    assert wrap_prompt("Why?", 0, "vicuna_v1").endswith("USER: Why? ASSISTANT:")


def test_every_image_gets_a_line_before_the_question() -> None:
    assert "USER: <image>\n<image>\nSame? ASSISTANT:" in wrap_prompt("Same?", 2, "vicuna_v1")


def test_marks_within_the_question_stay_where_they_are() -> None:
    assert "USER: Is <image> like <image>? ASSISTANT:" in wrap_prompt("Is <image> like <image>?", 2, "vicuna_v1")
    assert query_of("Is <image> like <image>?") == "Is   like  ?"


def test_marks_that_do_not_match_the_images_are_refused() -> None:
    with pytest.raises(InputError, match="1 <image> placeholders for 2 new images"):
        wrap_prompt("Is <image> it?", 2, "vicuna_v1")


def test_start_and_end_tokens_enclose_each_mark() -> None:
    prompt = wrap_prompt("Same?", 2, "vicuna_v1", use_im_start_end=True)
    assert prompt.count("<im_start><image><im_end>\n") == 2


def test_plain_models_get_the_mmtag_template_as_published() -> None:
    assert choose_conv_mode("v1", "llava-plain-pretrain") == "v1_mmtag"
    assert choose_conv_mode("v1_mmtag", "llava-plain-pretrain") == "v1_mmtag"
    assert choose_conv_mode("v1", "llava-plain-Finetune") == "v1"
    assert choose_conv_mode("vicuna_v1", "llava-v1.5-7b") == "vicuna_v1"


def test_an_unknown_template_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r'no conversation template "vicuna_v2"; known: .*vicuna_v1'):
        choose_conv_mode("vicuna_v2", "llava")


def test_the_wrapper_and_the_loader_agree_on_the_recorded_trace(golden: Path) -> None:
    questions = load_question_file(golden / "data" / "questions" / "vqa.jsonl", golden / "data" / "images")
    assert [question.id for question in questions[:3]] == ["q0", 1, "q2"]
    assert all(question.images[0].is_file() for question in questions)


def test_bytes_of_other_encodings_are_read_as_far_as_they_are_utf8() -> None:
    escaped = "caf\udcc3\udca9 caf\udce9 字"
    assert recover_text(escaped) == "café caf\ufffd 字"
    assert recover_text("half \ud83d") == "half \ud83d"


@pytest.mark.parametrize("text", ["half \ud83d", "\udcff", "\ude00\ud83d", "x" * (2**20 + 1)])
def test_a_text_that_no_tokenizer_takes_is_refused_in_one_line(text: str) -> None:
    for use in (check_text, lambda text: wrap_prompt(text, 1, "vicuna_v1")):
        with pytest.raises(InputError) as caught:
            use(text)
        assert len(str(caught.value)) < 100 and str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "a\0b", "a\u2028b", "🙂", "\x1b[31m", "\ufffe"])
def test_every_other_text_is_taken(text: str) -> None:
    check_text(text)
    assert text in wrap_prompt(text, 1, "vicuna_v1")
