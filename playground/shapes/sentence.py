"""Every sentence and question about a scene, in the benchmarks' fixed wordings.

The generator, the tokenizers and the pocket CLIP's captions take their sentences from here; `wording` has the other
words in which people ask the same.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from playground.shapes.world import COLORS, PICTURE_SIZE, SHAPES, Scene, WorldObject

SUFFIX = "\nAnswer the question using a single word or phrase."
UNANSWERABLE_HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."  # VizWiz
UNANSWERABLE = "Unanswerable"
OCR_LINE = "\nReference OCR token: "  # TextVQA
OCR_WORDS = ("STOP", "EXIT", "OPEN", "TAXI", "MENU", "SALE")
ALL_NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
PLACES = ("left", "right", "top", "bottom")
MIN_OFFSET = 14  # pixels from the centre; an object nearer to it has no named place
ORDINALS = ("first", "second")
IMAGE_IN_WORDS = "Picture: {}\n"
DESCRIBE = "Describe the image."
NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
SAME_COLOR_SHARE = 0.75  # of lookalikes: same colour as a present object, another shape
CAPTION_FORMS = ("{}.", "{}", "a picture of {}.", "there is {} in the picture.")


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        text: the question.
        answer: what it is answered with.
        about: the object it is about; None: the whole image.
        suffix: the instruction after the question; empty where the answer is a sentence.
        kind: under which `wording.WORDINGS` knows other words for it; empty: there are none.
        name: what the question calls its object.
    """

    text: str
    answer: str
    about: WorldObject | None = None
    suffix: str = SUFFIX
    kind: str = ""
    name: str = ""

    @property
    def prompt(self) -> str:
        """The question with its instruction."""
        return self.text + self.suffix


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def list_objects(objects: Sequence[WorldObject]) -> str:
    """List the objects: `a red circle, a blue square and an orange star`."""
    names = [with_article(item.name) for item in objects]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def caption(objects: Sequence[WorldObject], form: str = "{}.") -> str:
    """Describe an image by its objects, in the given order."""
    return form.format(list_objects(objects))


def ask_presence(name: str, image: str = "image") -> str:
    """Ask whether an object is there, in POPE's wording; `image` names one of several, e.g. "first image"."""
    return f"Is there {with_article(name)} in the {image}?"


def name_place(item: WorldObject) -> str | None:
    """Name the side of the image that an object is on; None where two names fit."""
    across = (item.box[0] + item.box[2] - PICTURE_SIZE) / 2
    down = (item.box[1] + item.box[3] - PICTURE_SIZE) / 2
    if max(abs(across), abs(down)) < MIN_OFFSET or abs(abs(across) - abs(down)) < MIN_OFFSET / 2:
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def ask_color(scene: Scene) -> list[Question]:
    """Ask for the colour of each shape that occurs once."""
    counts = Counter(item.shape for item in scene.objects)
    return [
        Question(f"What color is the {item.shape}?", item.color, item, kind="color", name=item.shape)
        for item in scene.objects
        if counts[item.shape] == 1
    ]


def ask_shape(scene: Scene) -> list[Question]:
    """Ask for the shape of each colour that occurs once."""
    counts = Counter(item.color for item in scene.objects)
    return [
        Question(f"What shape is the {item.color} object?", item.shape, item, kind="shape", name=item.color)
        for item in scene.objects
        if counts[item.color] == 1
    ]


def ask_place(scene: Scene) -> list[Question]:
    """Ask for the place of each object whose place has a name."""
    placed = [(item, name_place(item)) for item in scene.objects]
    return [
        Question(f"Where is the {item.name}?", place, item, kind="place", name=item.name)
        for item, place in placed
        if place is not None
    ]


def ask_number(scene: Scene) -> list[Question]:
    return [Question("How many objects are in the image?", str(len(scene.objects)), kind="number")]


def describe(scene: Scene) -> Question:
    """Ask for a description, which lists the objects from left to right."""
    return Question(DESCRIBE, caption(sort_objects(scene)), suffix="", kind="description")


def sort_objects(scene: Scene) -> list[WorldObject]:
    """Sort the objects from left to right."""
    return sorted(scene.objects, key=lambda item: item.box)


def tell_number(scene: Scene) -> Question:
    """Ask for the number of objects and their names; the answer is a sentence."""
    number = len(scene.objects)
    text = "How many objects are there, and what are they?"
    return Question(text, f"{say_number(number)}: {list_objects(sort_objects(scene))}.", suffix="")


def say_number(number: int) -> str:
    return "There is 1 object" if number == 1 else f"There are {number} objects"


def tell_color(scene: Scene) -> list[Question]:
    """Ask for each colour; the answer is a sentence."""
    return [
        Question(each.text, f"The {each.about.shape} is {each.answer}.", each.about, "") for each in ask_color(scene)
    ]


def tell_place(scene: Scene) -> list[Question]:
    """Ask for each place; the answer is a sentence."""
    return [
        Question(each.text, f"The {each.about.name} is on the {each.answer}.", each.about, "")
        for each in ask_place(scene)
    ]


def absent_names(scene: Scene) -> list[str]:
    """List the names of all objects that the scene does not contain."""
    present = {item.name for item in scene.objects}
    return [name for name in ALL_NAMES if name not in present]


def confusable_names(scene: Scene, chooser: random.Random) -> list[str]:
    """List absent objects that share colour or shape with the scene; those that share both first, ties shuffled."""
    colors = {item.color for item in scene.objects}
    shapes = {item.shape for item in scene.objects}
    absent = absent_names(scene)
    chooser.shuffle(absent)
    num_shared = {name: (name.split()[0] in colors) + (name.split()[1] in shapes) for name in absent}
    return sorted((name for name in absent if num_shared[name]), key=lambda name: -num_shared[name])


def ask_absent(scene: Scene, chooser: random.Random) -> Question:
    """Ask for an absent object; half of the time one that resembles a present object."""
    candidates = confusable_names(scene, chooser)[: len(SHAPES)] if chooser.random() < 0.5 else absent_names(scene)
    return deny_presence(chooser.choice(candidates))


def deny_presence(name: str) -> Question:
    return Question(ask_presence(name), "No", kind="presence", name=name)


def ask_lookalike(scene: Scene, chooser: random.Random) -> Question:
    """Ask for an absent object with the colour or the shape of a present one."""
    item = chooser.choice(scene.objects)
    feature = item.color if chooser.random() < SAME_COLOR_SHARE else item.shape
    absent = absent_names(scene)
    lookalikes = [name for name in absent if feature in name.split()]
    return deny_presence(chooser.choice(lookalikes or absent))


def ask_present(scene: Scene, chooser: random.Random) -> Question:
    """Ask for a present object."""
    item = chooser.choice(scene.objects)
    return Question(ask_presence(item.name), "Yes", item, kind="presence", name=item.name)


def ask_either_way(scene: Scene, chooser: random.Random) -> Question:
    """Ask for a present or an absent object, with equal chance."""
    return ask_present(scene, chooser) if chooser.random() < 0.5 else ask_absent(scene, chooser)


def say_yes_or_no(is_true: bool) -> str:
    return "Yes" if is_true else "No"


def check_number(scene: Scene, number: int) -> Question:
    """Ask whether the image shows `number` objects."""
    objects = "is one object" if number == 1 else f"are {NUMBER_WORDS[number]} objects"
    text = f"{objects.split()[0].capitalize()} there {objects.split(' ', 1)[1]} in the image?"
    return Question(text, say_yes_or_no(len(scene.objects) == number))


def check_more(scene: Scene, number: int) -> Question:
    """Ask whether the image shows more than `number` objects."""
    return Question(f"Are there more than {NUMBER_WORDS[number]} objects?", say_yes_or_no(len(scene.objects) > number))


def check_place(question: Question, place: str) -> Question:
    """Turn a question for a place into a yes/no question about `place`."""
    text = f"Is the {question.about.name} on the {place}?"
    return Question(text, say_yes_or_no(question.answer == place), question.about)


def check_color(question: Question, color: str) -> Question:
    """Turn a question for a colour into a yes/no question about `color`."""
    return Question(f"Is the {question.about.shape} {color}?", say_yes_or_no(question.answer == color), question.about)


def check_any(scene: Scene, chooser: random.Random) -> Question:
    """Ask a yes/no question about number, place or colour."""
    is_true = chooser.random() < 0.5
    places, colors = ask_place(scene), ask_color(scene)
    kind = chooser.choice(["number", *["place"] * bool(places), *["color"] * bool(colors)])
    if kind == "number":
        if chooser.random() < 0.3:
            return check_more(scene, chooser.choice((1, 2)))
        here = len(scene.objects)
        others = [number for number in NUMBER_WORDS if number != here]
        return check_number(scene, here if is_true else chooser.choice(others))
    question = chooser.choice(places if kind == "place" else colors)
    names = PLACES if kind == "place" else tuple(COLORS)
    wrong = chooser.choice([name for name in names if name != question.answer])
    check = check_place if kind == "place" else check_color
    return check(question, question.answer if is_true else wrong)


def offer_two(question: Question, chooser: random.Random) -> Question:
    """Turn a question for a colour into a choice of two: `Is the circle red or blue?`."""
    wrong = chooser.choice([color for color in COLORS if color != question.answer])
    pair = [question.answer, wrong]
    chooser.shuffle(pair)
    return Question(f"Is the {question.about.shape} {pair[0]} or {pair[1]}?", question.answer, question.about)


def allow_unanswerable(question: Question) -> Question:
    """Write a question as VizWiz does: capitalised, with `Unanswerable` as an allowed answer."""
    return Question(question.text.capitalize(), question.answer, question.about, UNANSWERABLE_HINT + SUFFIX)


def ask_blind(scene: Scene, chooser: random.Random) -> Question:
    """Ask for a colour as VizWiz does; one third of the questions, where possible, are about an absent shape."""
    questions = ask_color(scene) or ask_number(scene)
    present = {item.shape for item in scene.objects}
    missing = [shape for shape in SHAPES if shape not in present]
    if chooser.random() < 1 / 3 and missing:
        return allow_unanswerable(Question(f"What color is the {chooser.choice(missing)}?", UNANSWERABLE))
    return allow_unanswerable(chooser.choice(questions))


def add_ocr(question: Question, chooser: random.Random) -> Question:
    """Write a question as TextVQA does, with a line of OCR tokens."""
    words = chooser.sample(OCR_WORDS, chooser.randrange(4))
    return Question(question.text, question.answer, question.about, OCR_LINE + ", ".join(words) + SUFFIX)


def ask_with_ocr(scene: Scene, chooser: random.Random) -> Question:
    """Ask for a colour, a shape or the number, with OCR tokens that do not help."""
    return add_ocr(chooser.choice(ask_color(scene) + ask_shape(scene) + ask_number(scene)), chooser)


KINDS: dict[str, Callable[[Scene, random.Random], Sequence[Question]]] = {
    "presence": lambda scene, chooser: [ask_either_way(scene, chooser)],
    "lookalike": lambda scene, chooser: [chooser.choice((ask_present, ask_lookalike))(scene, chooser)],
    "color": lambda scene, chooser: ask_color(scene),
    "shape": lambda scene, chooser: ask_shape(scene),
    "place": lambda scene, chooser: ask_place(scene),
    "number": lambda scene, chooser: ask_number(scene),
    "check": lambda scene, chooser: [check_any(scene, chooser)],
    "two": lambda scene, chooser: [offer_two(each, chooser) for each in ask_color(scene)],
    "blind": lambda scene, chooser: [ask_blind(scene, chooser)],
    "ocr": lambda scene, chooser: [ask_with_ocr(scene, chooser)],
    "description": lambda scene, chooser: [describe(scene)],
    "sentence": lambda scene, chooser: [tell_number(scene), *tell_color(scene), *tell_place(scene)],
}


def ask_any(scene: Scene, chooser: random.Random, kinds: Mapping[str, float]) -> Question:
    """Ask one question of a random kind; a kind that does not fit the scene is replaced by a presence question.

    Args:
        scene: the scene in the image.
        chooser: the random generator.
        kinds: weight of each kind; the keys are keys of `KINDS`.
    """
    kind = chooser.choices(list(kinds), list(kinds.values()))[0]
    return chooser.choice(KINDS[kind](scene, chooser) or [ask_either_way(scene, chooser)])
