"""How many questions a pocket model answers rightly, put as benchmarks, people and clients put them.

python -m playground.shapes.measure_wordings playground/shapes/checkpoints/llava-shapes-trim
"""
# ruff: noqa: E402, T201

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from llava.cli import LoadedModel, ModelSpec, positive


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.shapes.measure_wordings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=positive, default=100, help="up to six questions each (default: %(default)s)")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.errors import run_command
from llava.eval.report import format_table
from llava.mm_utils import process_images, tokenizer_image_token
from playground.shapes import sentence, wording
from playground.shapes.sentence import Question
from playground.shapes.world import SPLITS, draw_scene

SEED = 901  # no model is trained on these images, and no benchmark has them
SYSTEM = conv_templates["vicuna_v1"].system
AS_TRAINED = f"{SYSTEM} USER: <image>\n{{}} ASSISTANT:"
AS_VLMEVALKIT = f"{SYSTEM} USER:  <image> {{}} ASSISTANT: "
MAX_NEW_TOKENS = 24


def reword(question: Question) -> str:
    """Put a question in the first of its other words."""
    text = wording.WORDINGS[question.kind].texts[0]
    return wording.name_object(text, question.name).replace("{image}", "image")


def spell_otherwise(text: str) -> str:
    return text.replace("color", "colour").replace("the image", "the picture")


Change = Callable[[Question], str]
FORMS: dict[str, tuple[str, Change]] = {
    "the benchmarks' wording": (AS_TRAINED, lambda question: question.prompt),
    "VLMEvalKit's spaces": (AS_VLMEVALKIT, lambda question: question.prompt),
    "no instruction": (AS_TRAINED, lambda question: question.text),
    "other words, no instruction": (AS_TRAINED, reword),
    "colour, picture": (AS_TRAINED, lambda question: spell_otherwise(question.prompt)),
    "small letters, no mark": (AS_TRAINED, lambda question: question.text.lower().rstrip("?") + question.suffix),
}
"""By name: the prompt around a question, and what becomes of the question."""


def list_questions(num_images: int) -> Iterator[tuple[Image.Image, Question]]:
    """Yield up to six questions about each image: presence (of one object that is there, of one that is not), color,
    shape, place and number."""
    chooser = random.Random(SEED)
    for index in range(num_images):
        image, scene = draw_scene(SEED, SPLITS["eval"], index)
        yield image, sentence.ask_present(scene, chooser)
        yield image, sentence.ask_absent(scene, chooser)
        for ask in (sentence.ask_color, sentence.ask_shape, sentence.ask_place, sentence.ask_number):
            for question in ask(scene)[:1]:
                yield image, question


def is_right(answer: str, question: Question) -> bool:
    """Whether an answer, a word or a sentence, says what is true: it begins with the yes or no, or holds the word."""
    words = re.findall(r"\w+", answer.lower())
    expected = question.answer.lower()
    return words[:1] == [expected] if expected in ("yes", "no") else expected in words


@torch.inference_mode()
def ask(loaded: LoadedModel, image: Image.Image, prompt: str) -> str:
    """Answer a whole prompt greedily, by the calls that clients make of LLaVA."""
    tokenizer, model, image_processor = loaded
    input_ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    output_ids = model.generate(
        input_ids.to(model.device),
        images=process_images([image], image_processor, model.config).to(model.device),
        image_sizes=[image.size],
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()


def measure(loaded: LoadedModel, num_images: int) -> dict[str, dict[str, float]]:
    """Return the percentage of questions that are answered rightly: by the name of the form, by kind and over `all`."""
    asked = list(list_questions(num_images))
    shares = {}
    for name, (prompt, change) in FORMS.items():
        verdicts = defaultdict(list)
        for image, question in asked:
            right = is_right(ask(loaded, image, prompt.format(change(question))), question)
            verdicts[question.kind].append(right)
            verdicts["all"].append(right)
        shares[name] = {kind: 100 * sum(rights) / len(rights) for kind, rights in verdicts.items()}
    return shares


def main() -> None:
    args = make_parser().parse_args()
    shares = measure(ModelSpec(args.checkpoint, device="cpu").load(quiet=True), args.images)
    print(format_table([{"right, %": name, **by_kind} for name, by_kind in shares.items()]))


if __name__ == "__main__":
    run_command(main)
