"""Hard input, one row each: it either works or ends in one clear line. Nothing may end in a traceback.

Everything goes the way of a user: a checkpoint folder, an image file, a question, `load_pretrained_model`,
`load_image`, `process_images`, `generate`.
"""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

NAME = "llava-v1.5-tiny84-TRIM"
QUESTION = "What is the color of the bus?"


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    shutil.copytree(golden / "checkpoints" / NAME, root / NAME)
    shutil.copytree(golden / "checkpoints" / "openai", root / "openai")
    edit(root / NAME, mm_vision_tower="../openai/clip-vit-tiny-patch14-84")
    return root


def edit(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | values))


def ask(
    checkpoint: Path, images: list[Path], question: str, *, placeholders: int | None = None, reduce: str | None = None
):
    """Ask as a user's script would; returns (visual tokens of the first image, new ids)."""
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), reduce=reduce, device="cpu")
    pixels = process_images([load_image(image) for image in images], processor, model.config)
    conversation = conv_templates["vicuna_v1"].copy()
    num_placeholders = len(images) if placeholders is None else placeholders
    conversation.append_message(conversation.roles[0], "<image>\n" * num_placeholders + question)
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    answer = model.generate(ids, images=pixels, max_new_tokens=4, do_sample=False)
    return model.encode_images(pixels, [question] * len(images))[0].num_tokens, answer


def noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def write_rotated(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    return write(path, noise(), exif=exif)


def write_truncated(path: Path) -> Path:
    buffer = io.BytesIO()
    noise().save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return path


def write_text(path: Path) -> Path:
    path.write_text("this is no image")
    return path


def make_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


IMAGES = {
    "all black": lambda p: write(p / "black.png", Image.new("RGB", (84, 84))),
    "1 x 1": lambda p: write(p / "one.png", Image.new("RGB", (1, 1), (200, 10, 10))),
    "10,000 x 20": lambda p: write(p / "strip.png", Image.new("RGB", (10_000, 20), (10, 200, 10))),
    "1 x 20,000": lambda p: write(p / "line.png", Image.new("RGB", (1, 20_000), (10, 200, 10))),
    "1 x 60,000": lambda p: write(p / "long.png", Image.new("RGB", (1, 60_000), (10, 200, 10))),
    "60,000 x 1": lambda p: write(p / "wide.png", Image.new("RGB", (60_000, 1), (10, 200, 10))),
    "20 x 10,000": lambda p: write(p / "tall.png", Image.new("RGB", (20, 10_000), (10, 200, 10))),
    "CMYK": lambda p: write(p / "cmyk.jpg", noise().convert("CMYK")),
    "16 bit": lambda p: write(p / "deep.png", Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100) * 10)),
    "palette": lambda p: write(p / "palette.png", noise().convert("P")),
    "palette with transparency": lambda p: write(p / "clear.gif", noise().convert("P"), transparency=0),
    "transparency": lambda p: write(p / "alpha.png", noise().convert("RGBA")),
    "grey": lambda p: write(p / "grey.png", noise().convert("L")),
    "one bit": lambda p: write(p / "bit.png", noise().convert("1")),
    "EXIF rotated": lambda p: write_rotated(p / "rotated.jpg"),
}
UNREADABLE = {
    "truncated": lambda p: write_truncated(p / "half.jpg"),
    "not an image": lambda p: write_text(p / "text.png"),
    "absent": lambda p: p / "absent.png",
    "a folder": lambda p: p,
    "a side too long": lambda p: write(p / "side.png", Image.new("1", (1, 300_000))),
    "a name too long": lambda p: p / f"{'x' * 300}.png",
    "a pipe": lambda p: make_pipe(p / "pipe.png"),
    "a device": lambda p: Path("/dev/zero"),
}
QUESTIONS = {
    "empty": "",
    "spaces": "  \n ",
    "2,000 words": "word " * 2000,
    "Chinese": "这张图片里有什么？请用一个词回答。",
    "emoji and controls": "🙂\u200b\x07 café ½",
    "special tokens": "Is there </s> a <|endoftext|> dog <unk>?",
    "line separators and a null": "Is\u2028it\u2029a\x85bus\0?",
    "a byte order mark": "\ufeffIs it a bus?",
}
NOT_TEXT = {
    "half a surrogate pair": "Is it \ud83d a bus?",
    "a byte": "Is it a b\udcfcs?",
    "too long": "word " * 300_000,
}
SETTINGS = ["TRIM:-1", "TRIM:1.0", "TRIM:0.001", "TextSim:-1", "TRIM:-1,fence=1000000"]
WRONG_SETTINGS = {
    "TRIM:0": "out of range",
    "TRIMM:-1": 'did you mean "TRIM"?',
    "TRIM:abc": '"abc" is not a budget',
    "TRIM:-1,foo=2": 'no option "foo=2"',
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_works(folder, tmp_path, kind):
    num_tokens, answer = ask(folder / NAME, [IMAGES[kind](tmp_path)], QUESTION)
    assert 1 <= num_tokens <= 36
    assert answer.shape[1] >= 1


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_image_is_named_in_one_line(folder, tmp_path, kind):
    path = UNREADABLE[kind](tmp_path)
    with pytest.raises(InputError) as caught:
        ask(folder / NAME, [path], QUESTION)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_question_works_or_says_that_it_is_too_long(folder, tmp_path, kind):
    image = IMAGES["grey"](tmp_path)
    if kind == "2,000 words":
        edit(folder / NAME, max_position_embeddings=1024)
        with pytest.raises(InputError, match=r"takes \d+ positions with its image tokens, the model has 1024"):
            ask(folder / NAME, [image], QUESTIONS[kind])
        edit(folder / NAME, max_position_embeddings=16_384)
    num_tokens, answer = ask(folder / NAME, [image], QUESTIONS[kind])
    assert 1 <= num_tokens <= 36
    assert answer.shape[1] >= 1


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_no_text_ends_in_one_line(folder, tmp_path, kind):
    with pytest.raises(InputError) as caught:
        ask(folder / NAME, [IMAGES["grey"](tmp_path)], NOT_TEXT[kind])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 100


@pytest.mark.parametrize("spec", SETTINGS)
def test_setting_works_on_any_image(folder, tmp_path, spec):
    for kind in ("all black", "EXIF rotated"):
        num_tokens, answer = ask(folder / NAME, [IMAGES[kind](tmp_path)], QUESTION, reduce=spec)
        assert num_tokens == {"TRIM:1.0": 36, "TRIM:0.001": 1, "TRIM:-1,fence=1000000": 1}.get(spec, num_tokens)
        assert answer.shape[1] >= 1


@pytest.mark.parametrize("spec", WRONG_SETTINGS)
def test_wrong_setting_ends_in_one_line_at_load_time(folder, spec):
    edit(folder / NAME, mm_vision_token_reduce_func=spec)
    try:
        with pytest.raises(InputError) as caught:
            load_pretrained_model(str(folder / NAME))
    finally:
        edit(folder / NAME, mm_vision_token_reduce_func="TRIM:-1")
    assert WRONG_SETTINGS[spec] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_images", "placeholders", "says"), [(2, 1, "more images"), (1, 2, "fewer images"), (1, 0, "more images")]
)
def test_images_that_do_not_fit_the_placeholders_end_in_one_line(folder, tmp_path, num_images, placeholders, says):
    with pytest.raises(InputError, match=says):
        ask(folder / NAME, [IMAGES["grey"](tmp_path)] * num_images, QUESTION, placeholders=placeholders)


def test_a_text_only_prompt_works(folder):
    tokenizer, model, _, _ = load_pretrained_model(str(folder / NAME), device="cpu")
    ids = tokenizer_image_token("USER: Hello ASSISTANT:", tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= 1
    assert torch.equal(model.generate(ids, max_new_tokens=3, images=None), model.generate(ids, max_new_tokens=3))
