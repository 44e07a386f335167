"""The calls of VLMEvalKit's class `LLaVA` (commit e8e78f05, `vlmeval/vlm/llava/llava.py`), in its order and forms.

VLMEvalKit cannot be installed beside lmms-eval, and asks for CUDA; written down here is what it asks of this package.
Its prompt has two spaces where ours has one, and no newline behind the image: other ids than ours, so other answers.
"""

from abc import abstractproperty
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from PIL import Image
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.generation import Generator
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.prompt import recover_query, wrap_prompt
from llava.sampling import Sampling
from playground.shapes.world import draw_scene

CHECKPOINT = Path(__file__).parents[1] / "playground/shapes/checkpoints/llava-shapes-trim"
SYSTEM = conv_templates["vicuna_v1"].system + " "
STOP = "</s>"
QUESTIONS = ("What color is the circle?", "Is there a red square in the image?", "How many objects are there?")
KEPT = 20  # new tokens; VLMEvalKit asks for 512


class Client(NamedTuple):
    tokenizer: object
    model: object
    image_processor: object

    def ask(self, prompt: str, images: Sequence[Image.Image]) -> tuple[str, Tensor]:
        """Answer as `generate_inner` and `chat_inner` do; the ids come back beside the answer."""
        arguments = abstractproperty()
        arguments.image_aspect_ratio = "pad"
        pixels = None
        if images:
            pixels = process_images(images, self.image_processor, arguments).to("cpu", dtype=torch.float16)
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        criteria = KeywordsStoppingCriteria([STOP], self.tokenizer, input_ids)
        with torch.inference_mode():
            output_ids = self.model.generate(
                input_ids,
                images=pixels,
                stopping_criteria=[criteria],
                do_sample=False,
                temperature=0,
                max_new_tokens=KEPT,
                top_p=None,
                num_beams=1,
                use_cache=True,
            )
        return self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip(), input_ids[0]


@pytest.fixture(scope="module")
def client() -> Client:
    name = get_model_name_from_path(str(CHECKPOINT))
    tokenizer, model, image_processor, context_length = load_pretrained_model(
        model_path=str(CHECKPOINT), model_base=None, model_name=name, device="cpu", device_map="cpu"
    )
    assert context_length >= 512
    return Client(tokenizer, model.cpu(), image_processor)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw_scene(5, 7, index)[0] for index in range(2)]


def spaced(text: str, num_images: int = 1) -> str:
    """The prompt of `generate_inner`: ` <image> ` for each image, then the text."""
    return f"{SYSTEM}USER: {f' {DEFAULT_IMAGE_TOKEN} ' * num_images}{text} ASSISTANT: "


@pytest.fixture
def answer_ours(client: Client) -> Callable[[Tensor, list[Image.Image], str], str]:
    """Answers of our own loop to given ids, with the image tokens of a query."""

    def answer(input_ids: Tensor, images: list[Image.Image], query: str) -> str:
        pixels = process_images(images, client.image_processor, client.model.config)
        tokens = client.model.encode_images(pixels, [query] * len(images))
        generator = Generator(client.model, client.tokenizer)
        return generator.answer([input_ids], [tuple(tokens)], Sampling(max_new_tokens=KEPT))[0]

    return answer


def test_ids_of_its_spacing_are_those_of_sentencepiece(client: Client) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    ids = tokenizer_image_token("USER:  <image> What is it? ASSISTANT: ", client.tokenizer)
    before, after = "USER:  ", " What is it? ASSISTANT: "
    assert ids == [1, *processor.encode(before), IMAGE_TOKEN_INDEX, *processor.encode(after)]


@pytest.mark.parametrize("text", QUESTIONS)
def test_its_calls_give_the_answer_of_our_loop_to_its_prompt(
    text: str, client: Client, pictures: list[Image.Image], answer_ours: Callable[..., str]
) -> None:
    said, input_ids = client.ask(spaced(text), pictures[:1])
    assert recover_query(input_ids, client.tokenizer) == text
    assert said == answer_ours(input_ids, pictures[:1], text) != ""


@pytest.mark.parametrize("text", QUESTIONS)
def test_with_our_template_in_its_place_the_answers_are_ours(
    text: str, client: Client, pictures: list[Image.Image], answer_ours: Callable[..., str]
) -> None:
    said, input_ids = client.ask(wrap_prompt(text, 1, "vicuna_v1"), pictures[1:])
    assert said == answer_ours(input_ids, pictures[1:], f" \n{text}") != ""
    assert input_ids.tolist() != tokenizer_image_token(spaced(text), client.tokenizer)


def test_two_images_and_none_are_answered(
    client: Client, pictures: list[Image.Image], answer_ours: Callable[..., str]
) -> None:
    said, input_ids = client.ask(spaced(QUESTIONS[2], num_images=2), pictures)
    assert said == answer_ours(input_ids, pictures, QUESTIONS[2]) != ""
    assert client.ask(spaced("Name a color.", num_images=0), [])[0] != ""
