"""What the pocket CLIP is trained on: pictures as one array, and texts that are true of them.

A text's needs are the features a picture must have for the text to be true of it, so that a batch knows every true
pair and not only the one it was made from: a question about a red circle fits all pictures with a red circle.
"""

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from playground.shapes import sentence
from playground.shapes.world import COLORS, PICTURE_SIZE, SHAPES, SPLITS, Scene, WorldObject, draw_scene

NUM_PROCESSES = 2
FEATURES = {name: index for index, name in enumerate((*sentence.ALL_NAMES, *COLORS, *SHAPES))}
# Shares of the kinds of text: the whole scene, one object in a caption, and questions (the rest).
SCENE_SHARE, OBJECT_SHARE = 0.5, 0.2
QUESTION_WEIGHTS = {"presence": 0.5, "place": 0.2, "color": 0.15, "shape": 0.15}
SUFFIX_SHARE = 0.5


@dataclass(frozen=True)
class Pictures:
    """Pictures and what they show: `pixels` is uint8[I, H, W, 3], `features` float32[I, len(FEATURES)] of 0 and 1."""

    pixels: np.ndarray
    scenes: list[Scene]
    features: Tensor


def draw_pictures(split: str, count: int, seed: int = 0) -> Pictures:
    """Draw the first `count` pictures of a split, in parallel, into one array."""
    pixels = np.empty((count, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    scenes = []
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        for index, (picture, scene) in enumerate(pool.map(partial(draw_one, seed, split), range(count), chunksize=256)):
            pixels[index] = picture
            scenes.append(scene)
    return Pictures(pixels, scenes, torch.stack([mark_features(list_features(scene)) for scene in scenes]))


def draw_one(seed: int, split: str, index: int) -> tuple[np.ndarray, Scene]:
    """Draw one picture as an array."""
    picture, scene = draw_scene(seed, SPLITS[split], index)
    return np.asarray(picture), scene


def list_features(scene: Scene) -> list[str]:
    """List what is true of a scene: its objects' names, colours and shapes."""
    return [word for item in scene.objects for word in (item.name, item.color, item.shape)]


def mark_features(words: Sequence[str]) -> Tensor:
    """Mark features, float32[len(FEATURES)]."""
    marks = torch.zeros(len(FEATURES))
    marks[[FEATURES[word] for word in words]] = 1
    return marks


def choose_texts(scene: Scene, chooser: random.Random) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """Choose a text that fits a scene, and the same text with one object's colour or shape exchanged.

    The second is a hard negative, as in NegCLIP (Yuksekgonul et al., ICLR 2023): without it a small model learns
    colours and stays blind to shapes for long. Questions are the form in which the text tower is later asked, with
    and without the short-answer suffix.

    Returns:
        Twice a text and the features that a picture needs for it to be true.
    """
    share = chooser.random()
    if share < SCENE_SHARE:
        objects = chooser.sample(scene.objects, len(scene.objects))
        form = chooser.choice(sentence.CAPTION_FORMS)
        return write_caption(objects, form), write_caption(exchange(objects, scene, chooser), form)
    objects = [chooser.choice(scene.objects)]
    if share < SCENE_SHARE + OBJECT_SHARE:
        form = chooser.choice(sentence.CAPTION_FORMS)
        return write_caption(objects, form), write_caption(exchange(objects, scene, chooser), form)
    kind = chooser.choices(list(QUESTION_WEIGHTS), list(QUESTION_WEIGHTS.values()))[0]
    suffix = sentence.SUFFIX if chooser.random() < SUFFIX_SHARE else ""
    other = exchange(objects, scene, chooser)
    return write_question(objects[0], kind, suffix), write_question(other[0], kind, suffix)


def exchange(objects: Sequence[WorldObject], scene: Scene, chooser: random.Random) -> list[WorldObject]:
    """Replace one of the objects by one of another colour or shape that the scene does not show."""
    place = chooser.randrange(len(objects))
    item = objects[place]
    present = {each.name for each in scene.objects}
    candidates = [replace(item, color=color) for color in COLORS] + [replace(item, shape=shape) for shape in SHAPES] * 2
    chosen = chooser.choice([each for each in candidates if each.name not in present])
    return [*objects[:place], chosen, *objects[place + 1 :]]


def write_caption(objects: Sequence[WorldObject], form: str) -> tuple[str, list[str]]:
    """Write a caption and what it needs."""
    return sentence.caption(objects, form), [each.name for each in objects]


def write_question(item: WorldObject, kind: str, suffix: str) -> tuple[str, list[str]]:
    """Write a question about an object and what it needs."""
    text, need = {
        "presence": (sentence.ask_presence(item.name), item.name),
        "place": (f"Where is the {item.name}?", item.name),
        "color": (f"What color is the {item.shape}?", item.shape),
        "shape": (f"What shape is the {item.color} object?", item.color),
    }[kind]
    return text + suffix, [need]


def match_pairs(needs: Tensor, features: Tensor) -> Tensor:
    """Tell which texts are true of which pictures.

    Args:
        needs: float32[T, len(FEATURES)] of the texts.
        features: float32[I, len(FEATURES)] of the pictures.

    Returns:
        float32[T, I] of 0 and 1.
    """
    return (needs @ features.T == needs.sum(1, keepdim=True)).float()
