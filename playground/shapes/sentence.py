"""What can be said and asked about a scene, in one fixed set of wordings.

The generator, the tokenizers and the pocket CLIP's captions all take their sentences from here, so that no model is
ever asked in words that it has not seen.
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
MIN_OFFSET = 14  # pixels from the middle below which a place has no name
ORDINALS = ("first", "second")
PICTURE_IN_WORDS = "Picture: {}\n"
DESCRIBE = "Describe the image."
NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
SAME_COLOR_SHARE = 0.75  # of lookalikes, those that only their shape tells from what is there
CAPTION_FORMS = ("{}.", "{}", "a picture of {}.", "there is {} in the picture.")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the object it is about (None: the whole picture).

    `suffix` is what a benchmark puts after the question; nothing where a sentence is wanted.
    """

    text: str
    answer: str
    about: WorldObject | None = None
    suffix: str = SUFFIX

    @property
    def prompt(self) -> str:
        """The question as it is put."""
        return self.text + self.suffix


def with_article(name: str) -> str:
    """Put `a` or `an` before a name."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def list_objects(objects: Sequence[WorldObject]) -> str:
    """Name the objects: `a red circle, a blue square and an orange star`."""
    names = [with_article(item.name) for item in objects]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def caption(objects: Sequence[WorldObject], form: str = "{}.") -> str:
    """Describe a picture by its objects, in the order given."""
    return form.format(list_objects(objects))


def ask_presence(name: str, picture: str = "image") -> str:
    """Ask whether an object is there, in POPE's wording; `picture` tells one of several pictures."""
    return f"Is there {with_article(name)} in the {picture}?"


def name_place(item: WorldObject) -> str | None:
    """Name the side of the picture an object is on, or None where two names would do."""
    across = (item.box[0] + item.box[2] - PICTURE_SIZE) / 2
    down = (item.box[1] + item.box[3] - PICTURE_SIZE) / 2
    if max(abs(across), abs(down)) < MIN_OFFSET or abs(abs(across) - abs(down)) < MIN_OFFSET / 2:
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def ask_color(scene: Scene) -> list[Question]:
    """Ask for the colour of every shape that occurs once."""
    counts = Counter(item.shape for item in scene.objects)
    return [
        Question(f"What color is the {item.shape}?", item.color, item)
        for item in scene.objects
        if counts[item.shape] == 1
    ]


def ask_shape(scene: Scene) -> list[Question]:
    """Ask for the shape of every colour that occurs once."""
    counts = Counter(item.color for item in scene.objects)
    return [
        Question(f"What shape is the {item.color} object?", item.shape, item)
        for item in scene.objects
        if counts[item.color] == 1
    ]


def ask_place(scene: Scene) -> list[Question]:
    """Ask where every object is whose place has a name."""
    placed = [(item, name_place(item)) for item in scene.objects]
    return [Question(f"Where is the {item.name}?", place, item) for item, place in placed if place is not None]


def ask_number(scene: Scene) -> list[Question]:
    """Ask how many objects the picture shows."""
    return [Question("How many objects are in the image?", str(len(scene.objects)))]


def describe(scene: Scene) -> Question:
    """Ask for a description; the objects are named from left to right."""
    return Question(DESCRIBE, caption(sort_objects(scene)), suffix="")


def sort_objects(scene: Scene) -> list[WorldObject]:
    """Order the objects from left to right."""
    return sorted(scene.objects, key=lambda item: item.box)


def tell_number(scene: Scene) -> Question:
    """Ask for the objects and their number, in a sentence."""
    number = len(scene.objects)
    start = "There is 1 object" if number == 1 else f"There are {number} objects"
    text = "How many objects are there, and what are they?"
    return Question(text, f"{start}: {list_objects(sort_objects(scene))}.", suffix="")


def tell_color(scene: Scene) -> list[Question]:
    """Ask for a colour, in a sentence."""
    return [
        Question(each.text, f"The {each.about.shape} is {each.answer}.", each.about, "") for each in ask_color(scene)
    ]


def tell_place(scene: Scene) -> list[Question]:
    """Ask for a place, in a sentence."""
    return [
        Question(each.text, f"The {each.about.name} is on the {each.answer}.", each.about, "")
        for each in ask_place(scene)
    ]


def absent_names(scene: Scene) -> list[str]:
    """List the names of all kinds of objects that the scene lacks."""
    present = {item.name for item in scene.objects}
    return [name for name in ALL_NAMES if name not in present]


def confusable_names(scene: Scene, chooser: random.Random) -> list[str]:
    """List absent names that share colour or shape with the scene, first those of which both occur; ties shuffled."""
    colors = {item.color for item in scene.objects}
    shapes = {item.shape for item in scene.objects}
    absent = absent_names(scene)
    chooser.shuffle(absent)
    num_shared = {name: (name.split()[0] in colors) + (name.split()[1] in shapes) for name in absent}
    return sorted((name for name in absent if num_shared[name]), key=lambda name: -num_shared[name])


def ask_absent(scene: Scene, chooser: random.Random) -> Question:
    """Ask for something that isn't there; every second time something easily confused with what is."""
    candidates = confusable_names(scene, chooser)[: len(SHAPES)] if chooser.random() < 0.5 else absent_names(scene)
    return Question(ask_presence(chooser.choice(candidates)), "No")


def ask_lookalike(scene: Scene, chooser: random.Random) -> Question:
    """Ask for something that isn't there but has the colour, or the shape, of something that is."""
    item = chooser.choice(scene.objects)
    feature = item.color if chooser.random() < SAME_COLOR_SHARE else item.shape
    absent = absent_names(scene)
    lookalikes = [name for name in absent if feature in name.split()]
    return Question(ask_presence(chooser.choice(lookalikes or absent)), "No")


def ask_present(scene: Scene, chooser: random.Random) -> Question:
    """Ask for something that is there."""
    item = chooser.choice(scene.objects)
    return Question(ask_presence(item.name), "Yes", item)


def ask_either_way(scene: Scene, chooser: random.Random) -> Question:
    """Ask for something that is there or isn't, each as often."""
    return ask_present(scene, chooser) if chooser.random() < 0.5 else ask_absent(scene, chooser)


def say_yes_or_no(is_true: bool) -> str:
    """Answer a yes/no question."""
    return "Yes" if is_true else "No"


def check_number(scene: Scene, number: int) -> Question:
    """Ask whether the picture shows so many objects."""
    objects = "is one object" if number == 1 else f"are {NUMBER_WORDS[number]} objects"
    text = f"{objects.split()[0].capitalize()} there {objects.split(' ', 1)[1]} in the image?"
    return Question(text, say_yes_or_no(len(scene.objects) == number))


def check_more(scene: Scene, number: int) -> Question:
    """Ask whether the picture shows more than so many objects."""
    return Question(f"Are there more than {NUMBER_WORDS[number]} objects?", say_yes_or_no(len(scene.objects) > number))


def check_place(question: Question, place: str) -> Question:
    """Turn a question for a place into one that names it."""
    text = f"Is the {question.about.name} on the {place}?"
    return Question(text, say_yes_or_no(question.answer == place), question.about)


def check_color(question: Question, color: str) -> Question:
    """Turn a question for a colour into one that names it."""
    return Question(f"Is the {question.about.shape} {color}?", say_yes_or_no(question.answer == color), question.about)


def check_any(scene: Scene, chooser: random.Random) -> Question:
    """Ask a yes/no question about number, place or colour; as many yes as no."""
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
    """Put a question as VizWiz does: capitalised, and with leave to say that it cannot be answered."""
    return Question(question.text.capitalize(), question.answer, question.about, UNANSWERABLE_HINT + SUFFIX)


def ask_blind(scene: Scene, chooser: random.Random) -> Question:
    """Ask as VizWiz does for a colour, of a shape that is there or, every third time, of one that isn't."""
    questions = ask_color(scene) or ask_number(scene)
    present = {item.shape for item in scene.objects}
    missing = [shape for shape in SHAPES if shape not in present]
    if chooser.random() < 1 / 3 and missing:
        return allow_unanswerable(Question(f"What color is the {chooser.choice(missing)}?", UNANSWERABLE))
    return allow_unanswerable(chooser.choice(questions))


def add_ocr(question: Question, chooser: random.Random) -> Question:
    """Put a question as TextVQA does, with a line of words that a reader of signs would have found."""
    words = chooser.sample(OCR_WORDS, chooser.randrange(4))
    return Question(question.text, question.answer, question.about, OCR_LINE + ", ".join(words) + SUFFIX)


def ask_with_ocr(scene: Scene, chooser: random.Random) -> Question:
    """Ask for a colour, a shape or the number beside words that don't help."""
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
    """Ask one question of a random kind; a kind that this scene can't answer is replaced by a presence question.

    Args:
        scene: what is in the picture.
        chooser: the source of randomness.
        kinds: weight of each kind, words of `KINDS`.
    """
    kind = chooser.choices(list(kinds), list(kinds.values()))[0]
    return chooser.choice(KINDS[kind](scene, chooser) or [ask_either_way(scene, chooser)])
