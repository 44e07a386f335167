"""What can be said and asked about a scene, in one fixed set of wordings.

The generator, the tokenizers and the pocket CLIP's captions all take their sentences from here, so that no model is
ever asked in words that it has not seen.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from playground.shapes.world import COLORS, PICTURE_SIZE, SHAPES, Scene, WorldObject

SUFFIX = "\nAnswer the question using a single word or phrase."
ALL_NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
MIN_OFFSET = 14  # pixels from the middle below which a place has no name
ORDINALS = ("first", "second")
PICTURE_IN_WORDS = "Picture: {}\n"
DESCRIBE = "Describe the image."
CAPTION_FORMS = ("{}.", "{}", "a picture of {}.", "there is {} in the picture.")


@dataclass(frozen=True)
class Question:
    """A question without the suffix, its answer, and the object it is about (None: the whole picture)."""

    text: str
    answer: str
    about: WorldObject | None = None

    @property
    def prompt(self) -> str:
        """The question as it is put: with the suffix, unless a description is asked for."""
        return self.text if self.text == DESCRIBE else self.text + SUFFIX


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
    return Question(DESCRIBE, caption(sorted(scene.objects, key=lambda item: item.box)))


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


def ask_present(scene: Scene, chooser: random.Random) -> Question:
    """Ask for something that is there."""
    item = chooser.choice(scene.objects)
    return Question(ask_presence(item.name), "Yes", item)


def ask_any(scene: Scene, chooser: random.Random, kinds: Mapping[str, float]) -> Question:
    """Ask one question of a random kind; a kind that this scene can't answer is replaced by a presence question.

    Args:
        scene: what is in the picture.
        chooser: the source of randomness.
        kinds: weight of each kind out of `presence`, `color`, `shape`, `place`, `number`, `description`.
    """
    kind = chooser.choices(list(kinds), list(kinds.values()))[0]
    lists = {"color": ask_color, "shape": ask_shape, "place": ask_place, "number": ask_number}
    if kind == "description":
        return describe(scene)
    questions = lists[kind](scene) if kind in lists else []
    if questions:
        return chooser.choice(questions)
    return ask_present(scene, chooser) if chooser.random() < 0.5 else ask_absent(scene, chooser)
