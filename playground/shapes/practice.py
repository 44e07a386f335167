"""Practice with options and their letters, without images: what a new language model learns before multiple choice.

To answer with a letter, a model must find a text among the options and read the letter before it. These conversations
do only that, many times each, so that every training step has much to learn from.
"""

import random
from collections.abc import Callable, Sequence

from playground.shapes import choice, sentence
from playground.shapes.world import COLORS, SHAPES

OPENING = "Choose."
MAX_QUESTIONS, MAX_COPIES = 8, 4
LETTER_SHARE = 0.7  # of the single questions; the rest ask for an option
COPY_SHARE = 4 / 7

Pairs = list[tuple[str, str]]  # questions and answers
Copy = Callable[[Sequence[str], Sequence[int]], tuple[str, str]]


def draw_options(chooser: random.Random) -> list[str]:
    """Draw three or four colours, shapes or object names."""
    pools = (sentence.ALL_NAMES, tuple(COLORS), SHAPES)
    pool = chooser.choices(pools, (0.4, 0.3, 0.3))[0]
    return chooser.sample(pool, chooser.choice((choice.MIN_OPTIONS, choice.MAX_OPTIONS, choice.MAX_OPTIONS)))


def ask_about(options: Sequence[str], chooser: random.Random) -> tuple[str, str]:
    """Ask for an option's letter, or for a letter's option."""
    index = chooser.randrange(len(options))
    letter = choice.LETTERS[index]
    if chooser.random() < LETTER_SHARE:
        return f"Which letter is {options[index]}?", letter
    return f"What is {letter}?", options[index]


def repeat(options: Sequence[str], order: Sequence[int]) -> tuple[str, str]:
    """Ask for the options in the order shown."""
    del order
    return "Repeat.", " ".join(f"{letter}. {option}" for letter, option in zip(choice.LETTERS, options, strict=False))


def name_options(options: Sequence[str], order: Sequence[int]) -> tuple[str, str]:
    """Ask for the options of all letters, in a given order."""
    letters = " ".join(choice.LETTERS[index] for index in order)
    return f"List {letters}.", ", ".join(options[index] for index in order)


def name_letters(options: Sequence[str], order: Sequence[int]) -> tuple[str, str]:
    """Ask for the letters of all options, in a given order."""
    names = ", ".join(options[index] for index in order)
    return f"Letters {names}.", " ".join(choice.LETTERS[index] for index in order)


COPIES: tuple[Copy, ...] = (repeat, name_options, name_letters, name_letters)


def practise(chooser: random.Random) -> Pairs:
    """Make one conversation: three or four options, then questions about them."""
    options = draw_options(chooser)
    if chooser.random() < COPY_SHARE:
        orders = [chooser.sample(range(len(options)), len(options)) for _ in range(MAX_COPIES)]
        pairs = [chooser.choice(COPIES)(options, order) for order in orders]
    else:
        pairs = [ask_about(options, chooser) for _ in range(MAX_QUESTIONS)]
    shown = "".join(f"\n{letter}. {option}" for letter, option in zip(choice.LETTERS, options, strict=False))
    first, answer = pairs[0]
    return [(f"{OPENING}{shown}\n{first}", answer), *pairs[1:]]
