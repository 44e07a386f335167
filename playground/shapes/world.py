"""Images of coloured shapes, drawn from a seed; the colour, shape and place of every object are known.

A scene is a pure function of its seed: the same seed gives the same bytes on every machine with the same Pillow and
NumPy. Questions are in `sentence.py`, files in `generate.py`.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 112
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "yellow": (245, 222, 40),
    "green": (36, 150, 50),
    "blue": (38, 70, 215),
    "purple": (125, 45, 165),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUM_OBJECTS = (1, 2, 3)
NUM_OBJECTS_WEIGHTS = (0.35, 0.35, 0.3)
MIN_OBJECT_SIZE, MAX_OBJECT_SIZE = 28, 46
GAP = 3  # pixels between the boxes of two objects
COLOR_JITTER = 14
SUPERSAMPLING = 3  # shapes are drawn larger by this factor and averaged down, for smooth edges
PLACING_ATTEMPTS = 60
SPLITS = {"train": 0, "calibrate": 1, "eval": 2, "tokenizer": 3}  # second part of a seed: splits share no image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class WorldObject:
    """One coloured shape; `box` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    color: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        """Colour and shape, e.g. `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The contents of an image; no two objects share both colour and shape."""

    seed: tuple[int, ...]
    objects: tuple[WorldObject, ...]


def draw_scene(*seed: int) -> tuple[Image.Image, Scene]:
    """Draw the image of a seed.

    Args:
        seed: whole numbers >= 0; by convention (world seed, split, index).

    Returns:
        The image (RGB, `PICTURE_SIZE` square) and its contents.
    """
    generator = np.random.default_rng(seed)
    image = Image.fromarray(draw_background(generator))
    objects = place_objects(generator)
    for item in objects:
        paint(image, item, generator)
    return image, Scene(seed, objects)


def place_objects(generator: np.random.Generator) -> tuple[WorldObject, ...]:
    """Choose objects and boxes that do not overlap; an object that finds no place is left out."""
    wanted = generator.choice(NUM_OBJECTS, p=NUM_OBJECTS_WEIGHTS)
    kinds = generator.choice(len(COLORS) * len(SHAPES), size=wanted, replace=False)
    objects: list[WorldObject] = []
    for kind in kinds:
        box = find_free_box(generator, [item.box for item in objects])
        if box is not None:
            color = tuple(COLORS)[kind // len(SHAPES)]
            objects.append(WorldObject(color, SHAPES[kind % len(SHAPES)], box))
    return tuple(objects)


def find_free_box(generator: np.random.Generator, taken: list[Box]) -> Box | None:
    """Find a random square at least `GAP` from every taken box; None after `PLACING_ATTEMPTS`."""
    for _ in range(PLACING_ATTEMPTS):
        size = int(generator.integers(MIN_OBJECT_SIZE, MAX_OBJECT_SIZE + 1))
        left, top = (int(value) for value in generator.integers(1, PICTURE_SIZE - size, size=2))
        box = (left, top, left + size, top + size)
        if not any(overlaps(box, other) for other in taken):
            return box
    return None


def overlaps(box: Box, other: Box) -> bool:
    """Whether two boxes are nearer to each other than `GAP`."""
    return box[0] < other[2] + GAP and other[0] < box[2] + GAP and box[1] < other[3] + GAP and other[1] < box[3] + GAP


def draw_background(generator: np.random.Generator) -> np.ndarray:
    """Draw a plain, nearly grey background with a little noise.

    Returns:
        `uint8[PICTURE_SIZE, PICTURE_SIZE, 3]`.
    """
    level = generator.uniform(70, 190)
    tint = generator.uniform(-8, 8, size=3)
    noise = generator.normal(0, 4, size=(PICTURE_SIZE, PICTURE_SIZE, 1))
    return np.clip(level + tint + noise, 0, 255).astype(np.uint8)


def paint(image: Image.Image, item: WorldObject, generator: np.random.Generator) -> None:
    """Paint one object into the image, its colour slightly off the named one."""
    left, top, right, _ = item.box
    size = right - left
    mask = draw_mask(item.shape, size)
    offset = generator.integers(-COLOR_JITTER, COLOR_JITTER + 1, size=3)
    color = tuple(int(value) for value in np.clip(np.array(COLORS[item.color]) + offset, 0, 255))
    image.paste(color, (left, top), mask)


def draw_mask(shape: str, size: int) -> Image.Image:
    """Draw a shape that fills a square of `size` pixels, as an 8-bit mask (255 inside)."""
    side = size * SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "ring":
        hole = side * 0.28
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        draw.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in outline(shape)], fill=255)
    return mask.reduce(SUPERSAMPLING)


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in the unit square, y downwards."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    corners = []
    for index in range(10):  # a five-pointed star: outer and inner corners in turn
        radius = 0.5 if index % 2 == 0 else 0.2
        angle = math.pi * (index / 5 - 0.5)
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners
