"""One dialogue with a model about images: its turns, its images, and how many tokens each question keeps.

`llava.eval.run_llava` and `llava.serve.cli` are thin layers over this. The vision tower runs once per image, the token
reduction once per question: with TRIM the patches kept for a turn are those that this turn's question asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import Conversation
from llava.errors import InputError
from llava.generation import Generator
from llava.mm_utils import process_images, tokenizer_image_token
from llava.prompt import end_of_turn, find_template, place_images, query_of, recover_text
from llava.protocols import ImageProcessor, Tokenizer, VisionLanguageModel
from llava.sampling import Sampling


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: without surrounding white space and without the template's end of turn.
        num_tokens: visual tokens that the language model read for this question, over all images.
        num_patches: visual tokens before reduction, over all images.
        prompt: the whole dialogue as the language model read it.
    """

    text: str
    num_tokens: int
    num_patches: int
    prompt: str

    def describe_tokens(self) -> str:
        return describe_tokens(self.num_tokens, self.num_patches)


def describe_tokens(num_tokens: int, num_patches: int) -> str:
    """Describe for a person how many of the visual tokens are read."""
    if not num_patches:
        return "visual tokens: none (no image)"
    return f"visual tokens: {num_tokens} of {num_patches} kept ({100 * num_tokens / num_patches:.1f} %)"


class ChatSession:
    """One dialogue with a model. The images stay in view over all turns."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, image_processor: ImageProcessor, conv_mode: str
    ):
        """Start without images.

        Args:
            model: a `LlavaCausalLM`.
            tokenizer: its tokenizer.
            image_processor: its vision tower's image processor.
            conv_mode: name of the conversation template; see `llava.conversation.conversation_name_for`.

        Raises:
            InputError: there is no template of that name.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = find_template(conv_mode)
        self._generator = Generator(model, tokenizer)
        self.show([])

    def show(self, images: Sequence[Image.Image]) -> None:
        """Replace the images in view, and begin a new dialogue."""
        self.conversation = self.template.copy()
        self._image_sizes = [image.size for image in images]
        values = process_images(list(images), self.image_processor, self.model.config)
        self._encoded = self.model.encode_patches(values) if images else []

    @torch.inference_mode()
    def ask(self, question: str, sampling: Sampling | None = None, streamer: BaseStreamer | None = None) -> Answer:
        """Ask the next question of the dialogue.

        Args:
            question: the user's text; in the first turn one `<image>` (or `<image-placeholder>`) per image may show
                where each image goes, otherwise the images come first.
            sampling: how the answer is searched for; greedily by default.
            streamer: is handed the tokens as they come.

        Returns:
            The answer. After an error the dialogue is as it was before.

        Raises:
            InputError: an empty question, one that no tokenizer takes, placeholders that do not fit the images, or a
                dialogue too long for the model.
        """
        # 1. Text from a terminal may hold bytes of another encoding.
        text = recover_text(question).replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
        query = query_of(text).strip()
        if not query:
            raise InputError("the question is empty: write what you want to know about the image")
        # 2. The prompt is the whole dialogue; the token reduction reads this turn's question alone.
        conversation = self._with_question(text)
        prompt = conversation.get_prompt()
        tokens = self.model.make_image_tokens(self._encoded, [query] * len(self._encoded), self._image_sizes)
        input_ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")
        # 3. Answer, and remember the turn.
        end = end_of_turn(conversation)
        (answer,) = self._generator.answer([input_ids], [tokens], sampling or Sampling(), end=end, streamer=streamer)
        conversation.messages[-1][1] = answer
        self.conversation = conversation
        return Answer(answer, sum(t.num_tokens for t in tokens), sum(t.num_patches for t in tokens), prompt)

    def _with_question(self, text: str) -> Conversation:
        """Return the dialogue with one more question and its open answer."""
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == len(self.template.messages)
        use_im_start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        turn = place_images(text, len(self._image_sizes) if is_first else 0, use_im_start_end)
        conversation.append_message(conversation.roles[0], turn)
        conversation.append_message(conversation.roles[1], None)
        return conversation
