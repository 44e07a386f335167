"""MME on shapes: one question with the answer yes and one with no per image, in the subtasks that fit shapes."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_lines
from playground.shapes.world import COLORS, Scene

Pair = tuple[sentence.Question, sentence.Question]
SUFFIX = " Please answer yes or no."


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `MME_Benchmark_release_version/<subtask>/` and LLaVA's question file."""
    lines = []
    for subtask, make_pair in SUBTASKS.items():
        for index, drawing in enumerate(drawings, 1):
            pair = make_pair(drawing.scene, chooser)
            if pair is None:
                continue
            place = folder / "MME_Benchmark_release_version" / subtask
            drawing.save(place / f"{index:04d}.jpg")
            texts = [f"{each.text}{SUFFIX}\t{each.answer}\n" for each in pair]
            (place / f"{index:04d}.txt").write_text("".join(texts), encoding="utf-8")
            name = f"{subtask}/{index:04d}.jpg"
            lines += [{"question_id": name, "image": name, "text": each.prompt, "category": subtask} for each in pair]
    write_lines(folder / "llava_mme.jsonl", lines)


def ask_existence(scene: Scene, chooser: random.Random) -> Pair:
    """Ask for a present and an absent object."""
    return sentence.ask_present(scene, chooser), sentence.ask_absent(scene, chooser)


def ask_count(scene: Scene, chooser: random.Random) -> Pair:
    """Ask about the correct number and a wrong one."""
    here = len(scene.objects)
    wrong = chooser.choice([number for number in sentence.NUMBER_WORDS if number != here])
    return sentence.check_number(scene, here), sentence.check_number(scene, wrong)


def ask_position(scene: Scene, chooser: random.Random) -> Pair | None:
    """Ask about an object's correct place and a wrong one."""
    placed = sentence.ask_place(scene)
    if not placed:
        return None
    question = chooser.choice(placed)
    wrong = chooser.choice([place for place in sentence.PLACES if place != question.answer])
    return sentence.check_place(question, question.answer), sentence.check_place(question, wrong)


def ask_color(scene: Scene, chooser: random.Random) -> Pair | None:
    """Ask about an object's correct colour and a wrong one."""
    colored = sentence.ask_color(scene)
    if not colored:
        return None
    question = chooser.choice(colored)
    wrong = chooser.choice([color for color in COLORS if color != question.answer])
    return sentence.check_color(question, question.answer), sentence.check_color(question, wrong)


def ask_calculation(scene: Scene, chooser: random.Random) -> Pair | None:
    """Compare the number of objects with two numbers; one comparison is true, the other false."""
    if len(scene.objects) != 2:
        return None
    return sentence.check_more(scene, 1), sentence.check_more(scene, 2)


SUBTASKS = {
    "existence": ask_existence,
    "count": ask_count,
    "position": ask_position,
    "color": ask_color,
    "numerical_calculation": ask_calculation,
}
