"""A cache of earlier turns gives the tokens that no cache gives, or is refused in one line."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from playground.shapes.world import draw_scene

SHAPES = Path(__file__).parents[2] / "playground/shapes/checkpoints/llava-shapes"
GREEDY = {"do_sample": False, "max_new_tokens": 12}
READS_TEXT = ["TRIM:-1", "TextSim:0.25", "CDPruner:16", "TRIM:0.25,position_ids=original"]
READS_NO_TEXT = ["none", "FasterVLM:16", "Pool:0.25"]


@pytest.fixture(scope="module")
def parts():
    tokenizer, model, processor, _ = load_pretrained_model(str(SHAPES), device="cpu")
    return model, tokenizer, processor


class Dialogue:
    """Two turns about an image: ids of the first, and of both with the first answer between them."""

    def __init__(self, parts, number):
        model, tokenizer, processor = parts
        image, scene = draw_scene(9, 1, number)
        self.model, self.question = model, f"What color is the {scene.objects[0].shape}?"
        self.images = process_images([image], processor, model.config)
        self.first = self.encode(tokenizer, f"USER: <image>\n{self.question} ASSISTANT:")
        self.second = self.encode(tokenizer, "USER: Describe the image. ASSISTANT:")[:, 1:]

    @staticmethod
    def encode(tokenizer, text):
        return tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]

    def continue_cache(self, **images):
        """Answer the first turn; give what the second one needs, with the cache of the first."""
        cache = DynamicCache(config=self.model.config)
        answer = self.model.generate(self.first, past_key_values=cache, **GREEDY, **images)
        return torch.cat([self.first, answer, self.second], dim=1), cache

    def ask_twice(self, **images):
        """Answer the second turn with the cache of the first, and without one."""
        cache = DynamicCache(config=self.model.config)
        answer = self.model.generate(self.first, past_key_values=cache, **GREEDY, **images)
        both = torch.cat([self.first, answer, self.second], dim=1)
        kept = cache.get_seq_length()
        found = self.model.generate(both, past_key_values=cache, **GREEDY, **images).tolist()
        assert 0 < kept < cache.get_seq_length()  # it was read, and continued
        return found, self.model.generate(both, **GREEDY, **images).tolist()


@pytest.mark.parametrize("spec", READS_TEXT)
def test_images_are_refused_beside_a_cache_whose_tokens_an_earlier_question_chose(parts, spec):
    parts[0].set_token_reduction(spec)
    with pytest.raises(
        InputError, match=r"past_key_values holds image tokens that .* give the same ones as image_tokens="
    ):
        Dialogue(parts, 0).ask_twice(images=Dialogue(parts, 0).images)


@pytest.mark.parametrize("spec", READS_TEXT)
def test_image_tokens_that_are_given_again_fit_the_cache(parts, spec):
    parts[0].set_token_reduction(spec)
    for number in range(6):
        dialogue = Dialogue(parts, number)
        tokens = parts[0].encode_images(dialogue.images, [dialogue.question])
        with_cache, without = dialogue.ask_twice(image_tokens=tokens)
        assert with_cache == without


@pytest.mark.parametrize("spec", READS_NO_TEXT)
def test_where_no_question_is_read_images_fit_every_cache(parts, spec):
    parts[0].set_token_reduction(spec)
    for number in range(3):
        dialogue = Dialogue(parts, number)
        with_cache, without = dialogue.ask_twice(images=dialogue.images)
        assert with_cache == without


def test_a_cache_of_text_alone_takes_an_image_after_it(parts):
    model, tokenizer, _ = parts
    model.set_token_reduction("TRIM:-1")
    dialogue = Dialogue(parts, 0)
    cache = DynamicCache(config=model.config)
    opening = Dialogue.encode(tokenizer, "USER: Repeat. ASSISTANT:")
    answer = model.generate(opening, past_key_values=cache, **GREEDY)
    both = torch.cat([opening, answer, dialogue.first[:, 1:]], dim=1)
    with_cache = model.generate(both, images=dialogue.images, past_key_values=cache, **GREEDY)
    assert with_cache.tolist() == model.generate(both, images=dialogue.images, **GREEDY).tolist()


@pytest.mark.parametrize(
    "specs", [("FasterVLM:9", "FasterVLM:20"), ("FasterVLM:9", "Random:9"), ("none", "FasterVLM:9")]
)
@pytest.mark.parametrize("form", ["images", "image_tokens"])
def test_a_cache_is_refused_after_the_reduction_changed(parts, specs, form):
    dialogue, asked = Dialogue(parts, 0), []
    for spec in specs:
        parts[0].set_token_reduction(spec)
        images = dialogue.images
        asked.append({form: images if form == "images" else parts[0].encode_images(images, [dialogue.question])})
    parts[0].set_token_reduction(specs[0])
    both, cache = dialogue.continue_cache(**asked[0])
    parts[0].set_token_reduction(specs[1])
    length = cache.get_seq_length()
    with pytest.raises(InputError, match=r"past_key_values holds other image tokens .* another token reduction"):
        parts[0].generate(both, past_key_values=cache, **GREEDY, **asked[1])
    parts[0].set_token_reduction(specs[0])
    assert cache.get_seq_length() == length
    parts[0].generate(both, past_key_values=cache, **GREEDY, **asked[0])  # it is as good as before


@pytest.mark.parametrize("spec", ["none", "FasterVLM:9"])
def test_a_cache_is_refused_with_another_image_or_another_number_of_images(parts, spec):
    parts[0].set_token_reduction(spec)
    dialogue = Dialogue(parts, 0)
    for number in range(1, 6):
        both, cache = dialogue.continue_cache(images=dialogue.images)
        with pytest.raises(InputError, match="past_key_values holds other image tokens"):
            parts[0].generate(both, images=Dialogue(parts, number).images, past_key_values=cache, **GREEDY)
    ids = torch.cat([dialogue.first[:, :2], dialogue.first[dialogue.first < 0][None], both], dim=1)
    with pytest.raises(InputError, match="past_key_values holds other image tokens"):
        parts[0].generate(ids, images=dialogue.images.repeat(2, 1, 1, 1), past_key_values=cache, **GREEDY)


def test_a_second_image_goes_behind_a_cache_with_one(parts):
    model, tokenizer, _ = parts
    model.set_token_reduction("FasterVLM:16")
    dialogue = Dialogue(parts, 0)
    images = torch.cat([dialogue.images, Dialogue(parts, 1).images])
    both, cache = dialogue.continue_cache(images=dialogue.images)
    both = torch.cat([both, Dialogue.encode(tokenizer, "USER: <image>\nAnd here? ASSISTANT:")[:, 1:]], dim=1)
    found = model.generate(both, images=images, past_key_values=cache, **GREEDY)
    assert found.tolist() == model.generate(both, images=images, **GREEDY).tolist()


@pytest.mark.parametrize("change", ["repeated", "selected"])
def test_a_cache_whose_samples_were_repeated_or_selected_goes_on(parts, change):
    model = parts[0]
    model.set_token_reduction("FasterVLM:9")
    dialogue, count = Dialogue(parts, 0), 2
    cache = DynamicCache(config=model.config)
    first, images = dialogue.first, dialogue.images
    if change == "selected":
        first, images = first.repeat(count, 1), images.repeat(count, 1, 1, 1)
    answer = model.generate(first, images=images, past_key_values=cache, **GREEDY)
    if change == "selected":
        cache.batch_select_indices(torch.tensor([1]))
        first, images, answer = first[:1], images[:1], answer[:1]
    else:
        cache.batch_repeat_interleave(count)
        first, images, answer = first.repeat(count, 1), images.repeat(count, 1, 1, 1), answer.repeat(count, 1)
    both = torch.cat([first, answer, first[:, -4:]], dim=1)
    found = model.generate(both, images=images, past_key_values=cache, **GREEDY)
    assert found.tolist() == model.generate(both, images=images, **GREEDY).tolist()
