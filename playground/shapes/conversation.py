"""Training conversations about scenes, in LLaVA's JSON form.

Kinds: a caption (projector pretraining), one question or several about a picture, a question about one of two pictures,
and questions about a picture told in words, which teach a fresh language model the answers before it sees a picture.
"""

import random
from collections.abc import Mapping
from typing import Protocol

from playground.shapes import choice, practice, sentence
from playground.shapes.world import Scene

# Weights of the kinds of questions; "choice" is `choice.ask_choice`, the others are `sentence.KINDS`.
QUESTION_KINDS = {
    "presence": 0.5, "color": 0.1, "shape": 0.08, "place": 0.06, "number": 0.06, "choice": 0.1, "description": 0.1,
}  # fmt: skip
# Words tell no place.
WORDS_KINDS = {"presence": 0.45, "color": 0.2, "shape": 0.12, "number": 0.12, "description": 0.11}
# All forms of the twelve benchmarks, and what is hardest to learn more often: shapes, and objects that only their shape
# tells from one that is there. A model that starts with these learns neither; it must know colours first.
EXAM_KINDS = {
    "presence": 0.18, "lookalike": 0.26, "shape": 0.14, "color": 0.04, "place": 0.03, "number": 0.03, "check": 0.06,
    "two": 0.02, "blind": 0.04, "ocr": 0.03, "choice": 0.2, "description": 0.03, "sentence": 0.02,
}  # fmt: skip
# Where pictures are told in words: conversations that practise letters only; multiple choice among other questions.
FIRST_WORDS, WORDS = (0.7, 0.2), (0.2, 0.55)
CHINESE_SHARE = 0.15
ANSWERED_BEFORE = 0.6  # of multiple choice told in words: the same was just asked for in words
SINGLE_TURN, SEVERAL_TURNS, TWO_PICTURES = 0.35, 0.9, 0.95  # cumulated shares; the rest is text only
MAX_TURNS = 6

Sample = dict[str, object]


class PictureFile(Protocol):
    """A picture on disk."""

    file: str
    scene: Scene


def make_turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Write questions and answers as LLaVA's list of turns."""
    return [
        {"from": role, "value": value} for pair in pairs for role, value in zip(("human", "gpt"), pair, strict=True)
    ]


def describe(index: int, file: str, scene: Scene) -> Sample:
    """Make a caption sample: the picture alone on the human's side, as the `plain` format wants."""
    turns = make_turns([("<image>", sentence.describe(scene).answer)])
    return {"id": f"caption-{index}", "image": file, "conversations": turns}


def converse(identity: str, picture: PictureFile, other: PictureFile, chooser: random.Random) -> Sample:
    """Make one fine-tuning sample, of a random kind; `other` is the second picture where two are shown."""
    share = chooser.random()
    if share >= TWO_PICTURES:
        return converse_in_words(identity, picture.scene, chooser)
    if share >= SEVERAL_TURNS:
        return compare(identity, (picture, other), chooser)
    number = 1 if share < SINGLE_TURN else chooser.randint(2, MAX_TURNS)
    return ask(identity, picture, [ask_any(picture.scene, chooser, QUESTION_KINDS) for _ in range(number)])


def ask_any(scene: Scene, chooser: random.Random, kinds: Mapping[str, float]) -> sentence.Question:
    """Ask a question of a random kind, multiple choice among them."""
    share = kinds.get("choice", 0.0)
    if share and chooser.random() < share / sum(kinds.values()):
        return choice.ask_choice(scene, chooser)
    return sentence.ask_any(scene, chooser, {kind: weight for kind, weight in kinds.items() if kind != "choice"})


def ask_once(
    identity: str, picture: PictureFile, chooser: random.Random, kinds: Mapping[str, float] = EXAM_KINDS
) -> Sample:
    """Make a sample with a single question about one picture."""
    return ask(identity, picture, [ask_any(picture.scene, chooser, kinds)])


def ask(identity: str, picture: PictureFile, questions: list[sentence.Question]) -> Sample:
    """Make a sample of questions about one picture."""
    pairs = list({each.prompt: each.answer for each in questions}.items())  # no question twice
    pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
    return {"id": f"picture-{identity}", "image": picture.file, "conversations": make_turns(pairs)}


def compare(identity: str, pictures: tuple[PictureFile, PictureFile], chooser: random.Random) -> Sample:
    """Make a sample with two pictures that asks for an object in one of them."""
    which = chooser.randrange(2)
    scene = pictures[which].scene
    if chooser.random() < 0.5:
        name, answer = chooser.choice(scene.objects).name, "Yes"
    else:  # what the other picture shows is the hardest to deny
        present = {item.name for item in scene.objects}
        elsewhere = [item.name for item in pictures[1 - which].scene.objects if item.name not in present]
        name, answer = chooser.choice(elsewhere or sentence.absent_names(scene)), "No"
    text = sentence.ask_presence(name, f"{sentence.ORDINALS[which]} image") + sentence.SUFFIX
    turns = make_turns([(f"<image>\n<image>\n{text}", answer)])
    return {"id": f"pair-{identity}", "image": [each.file for each in pictures], "conversations": turns}


def converse_in_words(
    identity: str, scene: Scene, chooser: random.Random, shares: tuple[float, float] = WORDS
) -> Sample:
    """Make a text-only sample: the picture is told, then some questions are asked about it.

    Args:
        identity: of the sample.
        scene: what is told.
        chooser: the source of randomness.
        shares: of samples that practise letters instead; of multiple choice among the questions.
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
    told = sentence.PICTURE_IN_WORDS.format(sentence.describe(scene).answer)
    pairs[0] = (told + pairs[0][0], pairs[0][1])
    return {"id": f"words-{identity}", "conversations": make_turns(pairs)}


def choose_in_words(scene: Scene, chooser: random.Random) -> list[sentence.Question]:
    """Put a multiple-choice question, often after the same question without options."""
    asked = choice.choose_told(scene, chooser)
    before = []
    if asked.kind != "object" and chooser.random() < ANSWERED_BEFORE:
        before.append(sentence.Question(asked.text, asked.options[asked.answer]))
    return [*before, asked.question(chinese=chooser.random() < CHINESE_SHARE)]
