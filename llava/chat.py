"""One dialogue with a model about images: its turns, its images, and how many tokens each question keeps.

`llava.Llava`, `llava.eval.run_llava` and `llava.serve.cli` are thin layers over this. The vision tower runs once per
image, the token reduction once per question: with TRIM the patches kept for a turn are those that this turn's question
asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from llava.clock import StageClock
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import Conversation
from llava.errors import InputError
from llava.generation import Generator
from llava.mm_utils import process_images, tokenizer_image_token
from llava.picture import Picture
from llava.prompt import end_of_turn, find_template, place_images, query_of, recover_text
from llava.protocols import ImageProcessor, ImageTokens, Tokenizer, VisionLanguageModel
from llava.sampling import Sampling


@dataclass(frozen=True)
class Turn:
    """A question of a dialogue, answered.

    Attributes:
        text: without surrounding white space and without the template's end of turn.
        num_tokens: visual tokens that the language model read for this question, over all images.
        num_patches: visual tokens before reduction, over all images.
        prompt: the whole dialogue as the language model read it.
        image_tokens: what each image became for this question.
        seconds: by stage, what was done since the answer before: "read" (pixel values), "encode" (the vision tower),
            "reduce" (text tower, selection and projector) and "generate"; the first two where images were shown.
    """

    text: str
    num_tokens: int
    num_patches: int
    prompt: str
    image_tokens: Sequence[ImageTokens] = field(default=(), repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)

    def describe_tokens(self) -> str:
        return describe_tokens(self.num_tokens, self.num_patches)


def describe_tokens(num_tokens: int, num_patches: int) -> str:
    """Describe for a person how many of the visual tokens are read."""
    if not num_patches:
        return "visual tokens: none (no image)"
    return f"visual tokens: {num_tokens} of {num_patches} kept ({100 * num_tokens / num_patches:.1f} %)"


def read_question(question: str) -> tuple[str, str]:
    """Return a user's turn with LLaVA's `<image>` placeholders, and the query that the CLIP text tower reads.

    Text from a terminal may hold bytes of another encoding: these are read as far as possible.

    Raises:
        InputError: not a text, or nothing is asked.
    """
    if not isinstance(question, str):
        raise InputError(f"a question is a text, not {type(question).__name__}")
    text = recover_text(question).replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    query = query_of(text).strip()
    if not query:
        raise InputError("the question is empty: write what you want to know about the image")
    return text, query


class ChatSession:
    """One dialogue with a model. The images stay in view over all turns.

    Attributes:
        images: those in view.
        conversation: the turns so far.
    """

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, image_processor: ImageProcessor, conv_mode: str
    ):
        """Start without images.

        Args:
            model: a `LlavaCausalLM`.
            tokenizer: its tokenizer.
            image_processor: its vision tower's image processor.
            conv_mode: name of the conversation template; see `llava.prompt.find_template`.

        Raises:
            InputError: there is no such template.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = find_template(conv_mode, tokenizer)
        self._generator = Generator(model, tokenizer)
        self.show([])

    def show(self, images: Sequence[Image.Image | Picture]) -> None:
        """Replace the images in view, and begin a new dialogue.

        Args:
            images: Pillow images are seen as they are; pictures are read, and turned upright.

        Raises:
            InputError: an image cannot be read; the dialogue is as it was before.
        """
        clock = StageClock(self.model.device)
        with clock.stage("read"):
            opened = [image.load() if isinstance(image, Picture) else image for image in images]
            values = process_images(opened, self.image_processor, self.model.config)
        with clock.stage("encode"):
            encoded = self.model.encode_patches(values) if opened else []
        self.images = opened
        self.conversation = self.template.copy()
        self._image_sizes = [image.size for image in opened]
        self._encoded = encoded
        self._showing = clock.take() if opened else {}

    @torch.inference_mode()
    def ask(self, question: str, sampling: Sampling | None = None, streamer: BaseStreamer | None = None) -> Turn:
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
        text, query = read_question(question)
        # 1. The prompt is the whole dialogue; the token reduction reads this turn's question alone.
        conversation = self._with_question(text)
        prompt = conversation.get_prompt()
        clock = StageClock(self.model.device)
        with clock.stage("reduce"):
            tokens = self.model.make_image_tokens(self._encoded, [query] * len(self._encoded), self._image_sizes)
        input_ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")
        # 2. Answer, and remember the turn.
        end = end_of_turn(conversation)
        with clock.stage("generate"):
            (text,) = self._generator.answer([input_ids], [tokens], sampling or Sampling(), end=end, streamer=streamer)
        conversation.messages[-1][1] = text
        self.conversation = conversation
        seconds, self._showing = self._showing | clock.take(), {}
        num_tokens, num_patches = sum(t.num_tokens for t in tokens), sum(t.num_patches for t in tokens)
        return Turn(text, num_tokens, num_patches, prompt, tuple(tokens), seconds)

    def _with_question(self, text: str) -> Conversation:
        """Return the dialogue with one more question and its open answer."""
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == len(self.template.messages)
        use_im_start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        turn = place_images(text, len(self._image_sizes) if is_first else 0, use_im_start_end)
        conversation.append_message(conversation.roles[0], turn)
        conversation.append_message(conversation.roles[1], None)
        return conversation
