"""Prompts of transformers' processors taken apart and put together again."""

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.hf.placeholders import collapse_images, write_ids
from llava.model.tokenizer import load_tokenizer
from llava.prompt import recover_query

IMAGE = 9
BATCH = torch.tensor([[0, 0, 1, 9, 9, 9, 5], [1, 9, 9, 6, 9, 9, 9], [0, 0, 0, 0, 1, 7, 8]])
REAL = BATCH != 0


def test_each_image_gets_one_placeholder_and_each_id_keeps_its_place():
    prompts = collapse_images(BATCH, REAL, IMAGE, [3, 2, 3])
    assert [prompt.ids.tolist() for prompt in prompts] == [[1, -200, 5], [1, -200, 6, -200], [1, 7, 8]]
    assert [list(prompt.images) for prompt in prompts] == [[0], [1, 2], []]
    for prompt, row in zip(prompts, BATCH, strict=True):
        is_text = prompt.ids != IMAGE_TOKEN_INDEX
        assert torch.equal(row[prompt.places][is_text], prompt.ids[is_text])


def test_images_side_by_side_are_told_apart_by_their_lengths():
    [prompt] = collapse_images(torch.tensor([[9] * 5]), torch.ones(1, 5, dtype=torch.bool), IMAGE, [2, 3])
    assert prompt.ids.tolist() == [-200, -200] and prompt.places.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([3, 2], "prompt 2 has 5 image placeholders, which do not fit images of 2 tokens"),
        ([4, 2, 2], "prompt 1 has 3 .* 4, 2, 2 tokens"),
        ([3, 2, 3, 3], "4 images for placeholders of 3"),
        ([], "prompt 1 has 3 .* images of no tokens"),
    ],
)
def test_placeholders_and_images_that_do_not_fit_are_refused(counts, says):
    with pytest.raises(InputError, match=says):
        collapse_images(BATCH, REAL, IMAGE, counts)


def test_whole_images_give_the_batch_again_and_shorter_ones_a_shorter_batch():
    prompts = collapse_images(BATCH, REAL, IMAGE, [3, 2, 3])
    assert torch.equal(write_ids(prompts, [3, 2, 3], IMAGE, 0, side="left"), BATCH)
    shorter = write_ids(prompts, [1, 2, 1], IMAGE, 0, side="left")
    assert shorter.tolist() == [[0, 0, 1, 9, 5], [1, 9, 9, 6, 9], [0, 0, 1, 7, 8]]
    right = write_ids(prompts, [1, 2, 1], IMAGE, 0, side="right")
    assert right.tolist() == [[1, 9, 5, 0, 0], [1, 9, 9, 6, 9], [1, 7, 8, 0, 0]]


TEMPLATES = {
    "llava-1.5": "USER: <image>\n{} ASSISTANT:",
    "vicuna": "A chat. USER: <image>\n{} ASSISTANT:",
    "mistral": "[INST] <image>\n{} [/INST]",
    "chatml": "<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\n<image>\n{}<|im_end|><|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n<image>\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "two turns": "USER: <image>\nis it red? ASSISTANT: yes</s>USER: {} ASSISTANT:",
    "no roles": "<image>\n{}",
}
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    """One whose marks of roles are special tokens, as chat models have them."""
    tokenizer = load_tokenizer(str(folder / "llava-v1.5-tiny84-TRIM"))
    tokenizer.add_tokens(MARKS, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_question_is_found_in_the_templates_of_llava_hf(tokenizer, template):
    question = "what is the color of the circle?"
    before, _, after = TEMPLATES[template].format(question).partition("<image>")
    ids = [*tokenizer(before).input_ids, IMAGE_TOKEN_INDEX, *tokenizer(after, add_special_tokens=False).input_ids]
    assert recover_query(torch.tensor(ids), tokenizer) == question


def test_the_question_is_found_whatever_the_number_of_images(samples, pair):
    for sample in samples[:16]:
        assert recover_query(sample.ids, pair[2]) == sample.question
