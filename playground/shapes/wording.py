"""Questions as people put them: other words, British spelling, other instructions or none, other spacing.

Benchmarks ask in the fixed wordings of `sentence`. A person asks "what colour is the cross" and names no form of the
answer, and a client may put the prompt together with other spaces than LLaVA's code; the pocket models learn these as
well. What is asked stays the same, and so does the answer, told as a sentence where no instruction asks for less.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from playground.shapes import sentence
from playground.shapes.sentence import SUFFIX, Question, with_article

REWORDED_SHARE = 0.6  # of the questions that are varied
UNINSTRUCTED, OTHERWISE_INSTRUCTED = 0.4, 0.6  # cumulative shares; the rest keep the benchmarks' instruction
INSTRUCTIONS = (
    "\nAnswer with one word.",
    "\nAnswer briefly.",
    " Answer in a single word.",
    "\nPlease answer in one word.",
)
BRITISH_SHARE, CARELESS_SHARE = 0.4, 0.1
PLACE_WORDS = ("image", "image", "picture", "photo")


@dataclass(frozen=True)
class Wordings:
    """Other words for one kind of question.

    Attributes:
        texts: questions; `{}` is what they call the object, `{image}` a word for the image.
        tell: answers in a sentence.
    """

    texts: tuple[str, ...]
    tell: Callable[[Question], str]


def _tell_presence(question: Question) -> str:
    if question.answer == "Yes":
        return f"Yes, there is {with_article(question.name)}."
    return f"No, there is no {question.name}."


WORDINGS = {
    "color": Wordings(
        ("What is the color of the {}?", "Which color is the {}?", "What color does the {} have?",
         "Tell me the color of the {}.", "What's the color of the {} in the {image}?"),
        lambda question: f"The {question.name} is {question.answer}.",
    ),
    "shape": Wordings(
        ("What is the shape of the {} object?", "Which shape is the {} object?", "What is the {} object?",
         "What {} shape is in the {image}?", "What shape does the {} object have?"),
        lambda question: f"The {question.name} object is {with_article(question.answer)}.",
    ),
    "place": Wordings(
        ("Where in the {image} is the {}?", "On which side is the {}?", "Where can I find the {}?"),
        lambda question: f"The {question.name} is on the {question.answer}.",
    ),
    "presence": Wordings(
        ("Do you see a {} in the {image}?", "Can you see a {}?", "Does the {image} show a {}?", "Is there a {}?",
         "Is a {} in the {image}?", "Is there a {} in this {image}?"),
        _tell_presence,
    ),
    "number": Wordings(
        ("How many objects are there?", "How many objects do you see?", "How many shapes are in the {image}?",
         "Count the objects in the {image}."),
        lambda question: f"{sentence.say_number(int(question.answer))}.",
    ),
    "description": Wordings(
        ("What is in the {image}?", "What do you see?", "Describe this {image}.", "Describe the image in detail.",
         "What does the {image} show?"),
        lambda question: question.answer,
    ),
}  # fmt: skip
"""By `sentence.Question.kind`."""


def vary(question: Question, chooser: random.Random) -> Question:
    """Put a question as a person might; one without a kind stays as it is."""
    if question.kind not in WORDINGS:
        return question
    words = WORDINGS[question.kind]
    text, suffix, answer = question.text, question.suffix, question.answer
    # 1. Other words.
    if chooser.random() < REWORDED_SHARE:
        text = name_object(chooser.choice(words.texts), question.name)
    image = chooser.choice(PLACE_WORDS)
    text = text.replace("{image}", image).replace("the image", f"the {image}")
    # 2. Another instruction, or none: then the answer is a sentence.
    if suffix == SUFFIX:
        share = chooser.random()
        if share < UNINSTRUCTED:
            suffix, answer = "", words.tell(question)
        elif share < OTHERWISE_INSTRUCTED:
            suffix = chooser.choice(INSTRUCTIONS)
    # 3. Other letters.
    if chooser.random() < BRITISH_SHARE:
        text = text.replace("color", "colour")
    if chooser.random() < CARELESS_SHARE:
        text = text.lower().rstrip("?.")
    return replace(question, text=text, suffix=suffix, answer=answer)


def name_object(text: str, name: str) -> str:
    """Fill in what a question calls its object, with the article that fits."""
    return text.replace("a {}", with_article(name)).replace("{}", name) if name else text


def space_out(sample: dict[str, object]) -> dict[str, object]:
    """Write a sample as clients do that set spaces around everything: `USER:  <image> question ASSISTANT:  answer`.

    Args:
        sample: one question about one image, in LLaVA's JSON form.
    """
    question, answer = (turn["value"] for turn in sample["conversations"])
    question = question.replace("<image>\n", " <image> ")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f" {answer}"}]
    return {**sample, "image_places": "as_written", "conversations": turns}
