"""The training data of the pocket CLIP: images in one array, and texts that are true of them.

Each text lists the features an image must have to match it. A batch therefore knows every matching pair, not only the
pairs it was drawn as: a question about a red circle matches all images with a red circle.
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
# Shares of the kinds of text: captions of the whole scene, captions of one object; the rest are questions.
SCENE_SHARE, OBJECT_SHARE = 0.5, 0.2
QUESTION_WEIGHTS = {"presence": 0.5, "place": 0.2, "color": 0.15, "shape": 0.15}
SUFFIX_SHARE = 0.5


@dataclass(frozen=True)
class ImageSet:
    """Images and their contents: `pixels` `uint8[I, H, W, 3]`, `features` `float32[I, len(FEATURES)]` of 0 and 1."""

    pixels: np.ndarray
    scenes: list[Scene]
    features: Tensor


def draw_images(split: str, count: int, seed: int = 0) -> ImageSet:
    """Draw the first `count` images of a split, in parallel, into one array."""
    pixels = np.empty((count, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    scenes = []
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        for index, (image, scene) in enumerate(pool.map(partial(draw_one, seed, split), range(count), chunksize=256)):
            pixels[index] = image
            scenes.append(scene)
    return ImageSet(pixels, scenes, torch.stack([mark_features(list_features(scene)) for scene in scenes]))


def draw_one(seed: int, split: str, index: int) -> tuple[np.ndarray, Scene]:
    image, scene = draw_scene(seed, SPLITS[split], index)
    return np.asarray(image), scene


def list_features(scene: Scene) -> list[str]:
    """List a scene's features: its objects' names, colours and shapes."""
    return [name for item in scene.objects for name in (item.name, item.color, item.shape)]


def mark_features(names: Sequence[str]) -> Tensor:
    """Encode features as 0 and 1, `float32[len(FEATURES)]`."""
    present = torch.zeros(len(FEATURES))
    present[[FEATURES[name] for name in names]] = 1
    return present


def choose_texts(scene: Scene, chooser: random.Random) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """Choose a text that matches a scene, and the same text with one object's colour or shape exchanged.

    The second is a hard negative, as in NegCLIP (Yuksekgonul et al., ICLR 2023): without it a small model learns
    colours and ignores shapes for a long time. The questions have the form that the text tower reads later, with and
    without the short-answer suffix.

    Returns:
        Two pairs of a text and the features that an image must have to match it.
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
    """Replace one object by one of another colour or shape that the scene does not contain."""
    place = chooser.randrange(len(objects))
    item = objects[place]
    present = {each.name for each in scene.objects}
    candidates = [replace(item, color=color) for color in COLORS] + [replace(item, shape=shape) for shape in SHAPES] * 2
    chosen = chooser.choice([each for each in candidates if each.name not in present])
    return [*objects[:place], chosen, *objects[place + 1 :]]


def write_caption(objects: Sequence[WorldObject], form: str) -> tuple[str, list[str]]:
    """Write a caption; returns it with the features it needs."""
    return sentence.caption(objects, form), [each.name for each in objects]


def write_question(item: WorldObject, kind: str, suffix: str) -> tuple[str, list[str]]:
    """Write a question about an object; returns it with the features it needs."""
    text, need = {
        "presence": (sentence.ask_presence(item.name), item.name),
        "place": (f"Where is the {item.name}?", item.name),
        "color": (f"What color is the {item.shape}?", item.shape),
        "shape": (f"What shape is the {item.color} object?", item.color),
    }[kind]
    return text + suffix, [need]


def match_pairs(needs: Tensor, features: Tensor) -> Tensor:
    """Match texts with images.

    Args:
        needs: `float32[T, len(FEATURES)]` features that the texts need.
        features: `float32[I, len(FEATURES)]` features of the images.

    Returns:
        `float32[T, I]`, 1 where the text is true of the image, else 0.
    """
    return (needs @ features.T == needs.sum(1, keepdim=True)).float()
