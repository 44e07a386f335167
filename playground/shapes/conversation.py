"""Training conversations about scenes, in LLaVA's JSON form.

Kinds: a caption (projector pretraining), one or more questions about an image, a question about one of two images, and
questions about a described image, which teach a new language model the answers before it sees any image.
"""

import random
from collections.abc import Mapping
from typing import Protocol

from playground.shapes import choice, practice, sentence, wording
from playground.shapes.world import Scene

# Weights of the kinds of questions; "choice" is `choice.ask_choice`, the others are `sentence.KINDS`.
QUESTION_KINDS = {
    "presence": 0.5, "color": 0.1, "shape": 0.08, "place": 0.06, "number": 0.06, "choice": 0.1, "description": 0.1,
}  # fmt: skip
# For described images; descriptions give no places.
WORDS_KINDS = {"presence": 0.45, "color": 0.2, "shape": 0.12, "number": 0.12, "description": 0.11}
# All forms of the twelve benchmarks. What is hardest to learn comes more often: shapes, and absent objects that differ
# from a present one in shape only. A model that starts with these learns neither; it must know colours first.
EXAM_KINDS = {
    "presence": 0.18, "lookalike": 0.26, "shape": 0.14, "color": 0.04, "place": 0.03, "number": 0.03, "check": 0.06,
    "two": 0.02, "blind": 0.04, "ocr": 0.03, "choice": 0.2, "description": 0.03, "sentence": 0.02,
}  # fmt: skip
# Samples without an image: the share of letter practice, and the share of multiple choice among the other questions.
FIRST_WORDS, WORDS = (0.7, 0.2), (0.2, 0.55)
CHINESE_SHARE = 0.15
ANSWERED_BEFORE = 0.6  # of multiple choice without an image: the same question comes first without options
SINGLE_TURN, SEVERAL_TURNS, TWO_IMAGES = 0.35, 0.9, 0.95  # cumulative shares; the rest is text only
MAX_TURNS = 6
VARIED_SHARE = 0.4  # of the questions that are put as people put them
SPACED_SHARE = 0.12  # of the samples with one question about one image: other spaces than LLaVA's

Sample = dict[str, object]


class ImageFile(Protocol):
    """An image on disk and its contents."""

    file: str
    scene: Scene


def make_turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Convert questions and answers to LLaVA's list of turns."""
    return [
        {"from": role, "value": value} for pair in pairs for role, value in zip(("human", "gpt"), pair, strict=True)
    ]


def describe(index: int, file: str, scene: Scene) -> Sample:
    """Make a caption sample: the human's turn is the image alone, as the `plain` template expects."""
    turns = make_turns([("<image>", sentence.describe(scene).answer)])
    return {"id": f"caption-{index}", "image": file, "conversations": turns}


def converse(identity: str, image: ImageFile, other: ImageFile, chooser: random.Random) -> Sample:
    """Make one finetuning sample of a random kind; `other` is the second image of a sample with two."""
    share = chooser.random()
    if share >= TWO_IMAGES:
        return converse_in_words(identity, image.scene, chooser)
    if share >= SEVERAL_TURNS:
        return compare(identity, (image, other), chooser)
    number = 1 if share < SINGLE_TURN else chooser.randint(2, MAX_TURNS)
    return ask(identity, image, [ask_any(image.scene, chooser, QUESTION_KINDS) for _ in range(number)])


def ask_any(scene: Scene, chooser: random.Random, kinds: Mapping[str, float]) -> sentence.Question:
    """Ask a question of a random kind, multiple choice included, some of them in other words."""
    share = kinds.get("choice", 0.0)
    if share and chooser.random() < share / sum(kinds.values()):
        return choice.ask_choice(scene, chooser)
    question = sentence.ask_any(scene, chooser, {kind: weight for kind, weight in kinds.items() if kind != "choice"})
    return wording.vary(question, chooser) if chooser.random() < VARIED_SHARE else question


def ask_once(
    identity: str, image: ImageFile, chooser: random.Random, kinds: Mapping[str, float] = EXAM_KINDS
) -> Sample:
    """Make a sample with one question about one image."""
    sample = ask(identity, image, [ask_any(image.scene, chooser, kinds)])
    return wording.space_out(sample) if chooser.random() < SPACED_SHARE else sample


def ask(identity: str, image: ImageFile, questions: list[sentence.Question]) -> Sample:
    """Make a sample of questions about one image."""
    pairs = list({each.prompt: each.answer for each in questions}.items())  # no question twice
    pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
    return {"id": f"picture-{identity}", "image": image.file, "conversations": make_turns(pairs)}


def compare(identity: str, images: tuple[ImageFile, ImageFile], chooser: random.Random) -> Sample:
    """Make a sample with two images that asks about an object in one of them."""
    which = chooser.randrange(2)
    scene = images[which].scene
    if chooser.random() < 0.5:
        name, answer = chooser.choice(scene.objects).name, "Yes"
    else:  # an object of the other image is the hardest to deny
        present = {item.name for item in scene.objects}
        elsewhere = [item.name for item in images[1 - which].scene.objects if item.name not in present]
        name, answer = chooser.choice(elsewhere or sentence.absent_names(scene)), "No"
    text = sentence.ask_presence(name, f"{sentence.ORDINALS[which]} image") + sentence.SUFFIX
    turns = make_turns([(f"<image>\n<image>\n{text}", answer)])
    return {"id": f"pair-{identity}", "image": [each.file for each in images], "conversations": turns}


def converse_in_words(
    identity: str, scene: Scene, chooser: random.Random, shares: tuple[float, float] = WORDS
) -> Sample:
    """Make a text-only sample: a description of an image, then questions about it.

    Args:
        identity: the last part of the sample's id.
        scene: the scene to describe.
        chooser: the random generator.
        shares: the share of samples that practise letters instead, and of multiple choice among the questions.
    """
    practice_share, choice_share = shares
    if chooser.random() < practice_share:
        return {"id": f"letters-{identity}", "conversations": make_turns(practice.practise(chooser))}
    questions: list[sentence.Question] = []
    for _ in range(chooser.randint(2, MAX_TURNS)):
        if chooser.random() < choice_share:
            questions += choose_in_words(scene, chooser)
        else:
            questions.append(ask_any(scene, chooser, WORDS_KINDS))
    pairs = list({each.prompt: each.answer for each in questions}.items())  # no question twice
    description = sentence.IMAGE_IN_WORDS.format(sentence.describe(scene).answer)
    pairs[0] = (description + pairs[0][0], pairs[0][1])
    return {"id": f"words-{identity}", "conversations": make_turns(pairs)}


def choose_in_words(scene: Scene, chooser: random.Random) -> list[sentence.Question]:
    """Ask a multiple-choice question, often after the same question without options."""
    asked = choice.choose_described(scene, chooser)
    before = []
    if asked.kind != "object" and chooser.random() < ANSWERED_BEFORE:
        before.append(sentence.Question(asked.text, asked.options[asked.answer]))
    return [*before, asked.question(chinese=chooser.random() < CHINESE_SHARE)]
