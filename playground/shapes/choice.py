"""Multiple-choice questions about scenes, in the forms of MMBench, MMBench-CN, ScienceQA and SEED-Bench.

Each ends with a line that asks for the option's letter. Chinese questions keep the English names of objects: the pocket
CLIP reads English only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from playground.shapes import sentence
from playground.shapes.world import COLORS, SHAPES, Scene

LETTERS = "ABCDE"
MAX_OPTIONS = 4
MIN_OPTIONS = 3
LETTER_LINE = "\nAnswer with the option's letter from the given choices directly."
LETTER_LINE_CN = "\n请直接回答选项字母。"
HINT = "The picture shows {}."
COUNTS = tuple(str(number) for number in sentence.NUMBER_WORDS)


@dataclass(frozen=True)
class Choice:
    """A question with options.

    Attributes:
        kind: `object`, `color`, `shape`, `number` or `place`.
        text: the question in English.
        text_cn: the question in Chinese.
        options: the options, in the order shown.
        answer: index of the correct option.
    """

    kind: str
    text: str
    text_cn: str
    options: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The correct option's letter."""
        return LETTERS[self.answer]

    def lines(self, chinese: bool = False, hint: str | None = None) -> str:
        """Write hint, question and options, one per line, without the line that asks for a letter."""
        lines = [hint] if hint else []
        lines.append(self.text_cn if chinese else self.text)
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join(lines)

    def question(self, chinese: bool = False, hint: str | None = None) -> sentence.Question:
        """Write the whole question, with the line that asks for a letter."""
        return sentence.Question(
            self.lines(chinese, hint), self.letter, suffix=LETTER_LINE_CN if chinese else LETTER_LINE
        )


def make_choice(
    kind: str, texts: tuple[str, str], right: str, wrong: Sequence[str], chooser: random.Random, number: int
) -> Choice:
    """Shuffle the correct option with wrong ones.

    Args:
        kind: see `Choice`.
        texts: the question in English and Chinese.
        right: the correct option.
        wrong: candidates for the wrong options, best first; the first `number - 1` are used.
        chooser: the random generator.
        number: number of options.
    """
    options = [right, *wrong[: number - 1]]
    chooser.shuffle(options)
    return Choice(kind, *texts, tuple(options), options.index(right))


def choose_object(scene: Scene, chooser: random.Random, number: int) -> Choice:
    """Ask which object the image shows; half of the wrong options resemble an object that it shows."""
    confusable = sentence.confusable_names(scene, chooser)[: len(SHAPES)]
    absent = sentence.absent_names(scene)
    wrong: list[str] = []
    while len(wrong) < number - 1:
        name = chooser.choice(confusable if chooser.random() < 0.5 else absent)
        if name not in wrong:
            wrong.append(name)
    texts = ("Which object is in the image?", "图中有哪个物体？")
    return make_choice("object", texts, chooser.choice(scene.objects).name, wrong, chooser, number)


def choose_feature(scene: Scene, chooser: random.Random, number: int) -> list[Choice]:
    """Ask for every colour, shape and place that has one answer, and for the number of objects."""
    choices = []
    for kind, questions, names in (
        ("color", sentence.ask_color(scene), tuple(COLORS)),
        ("shape", sentence.ask_shape(scene), SHAPES),
        ("place", sentence.ask_place(scene), sentence.PLACES),
        ("number", sentence.ask_number(scene), COUNTS),
    ):
        for question in questions:
            wrong = [name for name in names if name != question.answer]
            chooser.shuffle(wrong)
            texts = (question.text, translate(kind, question))
            shown = min(number, len(names))
            choices.append(make_choice(kind, texts, question.answer, wrong, chooser, shown))
    return choices


def translate(kind: str, question: sentence.Question) -> str:
    """Translate a question into Chinese; names of objects, colours and shapes stay English."""
    about = question.about
    if kind == "color":
        return f"{about.shape} 是什么颜色？"
    if kind == "shape":
        return f"{about.color} 物体是什么形状？"
    if kind == "place":
        return f"{about.name} 在哪里？"
    return "图中有几个物体？"


def choose_any(scene: Scene, chooser: random.Random, number: int | None = None) -> Choice:
    """Ask a random multiple-choice question; half of them ask for an object.

    Args:
        scene: the scene in the image.
        chooser: the random generator.
        number: number of options; None: three or four.
    """
    number = number or chooser.randint(MIN_OPTIONS, MAX_OPTIONS)
    if chooser.random() < 0.5:
        return choose_object(scene, chooser, number)
    return chooser.choice(choose_feature(scene, chooser, number))


def choose_described(scene: Scene, chooser: random.Random, number: int | None = None) -> Choice:
    """Ask a random question that a description of the scene answers; descriptions give no places."""
    while (asked := choose_any(scene, chooser, number)).kind == "place":
        pass
    return asked


def ask_choice(scene: Scene, chooser: random.Random) -> sentence.Question:
    """Ask a multiple-choice question in one of its forms: English, Chinese, or with ScienceQA's context line."""
    form = chooser.random()
    choice = choose_any(scene, chooser)
    if form < 0.2:
        return choice.question(chinese=True)
    if form < 0.3:
        return choice.question(hint=write_hint(scene))
    return choice.question()


def write_hint(scene: Scene) -> str:
    """Write a context line that is true and does not give the answer away."""
    number = len(scene.objects)
    return "Context: " + HINT.format("one object" if number == 1 else f"{sentence.NUMBER_WORDS[number]} objects")
