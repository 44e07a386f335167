"""Pixel values and prompt ids equal those recorded from the released code; odd images and texts work too."""

import base64
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.generation import StoppingCriteriaList

import llava.mm_utils
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenize_prompts,
    tokenize_texts,
    tokenizer_image_token,
)

GOLDEN = Path(__file__).parent / "golden"
PAD, CROP = SimpleNamespace(image_aspect_ratio="pad"), SimpleNamespace(image_aspect_ratio=None)
ANYRES = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints="[[84, 168], [168, 84], [168, 168]]")


@pytest.fixture(scope="module")
def processor():
    """The image processor that reproduces the recorded pixel values."""
    return CLIPImageProcessorPil.from_pretrained(GOLDEN / "checkpoints/openai/clip-vit-tiny-patch14-84")


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny Vicuna's tokenizer."""
    return LlamaTokenizer.from_pretrained(GOLDEN / "checkpoints/lmsys/vicuna-tiny-v1.5")


def recorded_pixels():
    for file in ("pixel_values_84.npz", "pixel_values_extra_84.npz"):
        with np.load(GOLDEN / file) as values:
            yield from ((name, values[name]) for name in values.files)


def find_image(name):
    folders = (GOLDEN / "data/images", GOLDEN / "data/images_extra")
    return next(path for folder in folders if (path := folder / f"{name}.png").exists())


# strip.png is 3 pixels high and the released code reads its rows as colour channels; see the test after.
@pytest.mark.parametrize(("name", "recorded"), [case for case in recorded_pixels() if case[0] != "strip/crop"])
def test_pixel_values_are_bit_identical_to_the_recorded_ones(name, recorded, processor):
    image, _, mode = name.partition("/")
    values = process_images([load_image(find_image(image))], processor, CROP if mode == "crop" else PAD)
    assert values.dtype == torch.float32
    assert np.array_equal(values[0].numpy(), recorded)


def test_rows_of_an_image_three_pixels_high_are_not_read_as_channels(processor):
    image = Image.new("RGB", (300, 3), (255, 0, 0))
    values = process_images([image], processor, CROP)[0]
    assert [len(channel.unique()) for channel in values] == [1, 1, 1]
    assert values[0, 0, 0] > values[1, 0, 0] == pytest.approx(-0.4578275 / 0.26130258)


@pytest.mark.parametrize("config", [PAD, CROP, ANYRES], ids=["pad", "crop", "anyres"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 200), (200, 1), (10_000, 20)])
def test_images_of_any_shape_are_processed(size, config, processor):
    values = process_images([Image.new("RGB", size, (9, 99, 200))], processor, config)
    assert values.shape[-3:] == (3, 84, 84) and values.isfinite().all()


def random_image(generator, width, height):
    """Noise of full contrast: every rounding shows."""
    values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values if generator.random() < 0.5 else np.where(values > 127, 255, 0).astype(np.uint8))


def random_shapes(generator, count):
    """Shapes of all kinds: any, a line of pixels, a few rows or columns."""
    for number in range(count):
        width, height = (int(side) for side in generator.integers(1, 700, 2))
        yield [(width, height), (width, 1), (1, height), (width, number % 5 + 1), (number % 5 + 1, height)][number % 5]


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_padding_in_parts_gives_the_same_pixels(processor, monkeypatch, resample):
    generator = np.random.default_rng(0)
    monkeypatch.setattr(processor, "resample", resample)
    for size in [*random_shapes(generator, 120), (84, 84), (83, 84), (85, 1), (84, 83), (168, 2), (2100, 2099)]:
        image = random_image(generator, *size)
        monkeypatch.setattr(llava.mm_utils, "DIRECT_PIXELS", 2**24)
        expected = process_images([image], processor, PAD)
        monkeypatch.setattr(llava.mm_utils, "DIRECT_PIXELS", 0)
        assert torch.equal(process_images([image], processor, PAD), expected), size


@pytest.mark.parametrize("size", [(4500, 300), (300, 4500), (6000, 1), (1, 6000), (4600, 4500)])
def test_beyond_the_limit_pixels_are_those_of_the_padded_square(processor, size):
    image = random_image(np.random.default_rng(1), *size)
    color = tuple(int(mean * 255) for mean in processor.image_mean)
    scaled = expand2square(image, color).resize((84, 84), Image.Resampling.BICUBIC)
    assert torch.equal(process_images([image], processor, PAD), process_images([scaled], processor, CROP))


def test_cropping_in_parts_gives_the_pixels_of_rows_scaled_first(processor, monkeypatch):
    generator = np.random.default_rng(2)
    for width, height in [*random_shapes(generator, 60), (90, 84), (84, 90), (84, 84), (168, 85)]:
        image, short = random_image(generator, width, height), min(width, height)
        size = (int(84 * width / short), int(84 * height / short))
        left, top = (size[0] - 84) // 2, (size[1] - 84) // 2
        # In two steps: Pillow 13 takes the columns of some tall images first, earlier versions never do.
        scaled = image.resize((size[0], height)).resize(size).crop((left, top, left + 84, top + 84))
        monkeypatch.setattr(llava.mm_utils, "DIRECT_PIXELS", 0)
        assert torch.equal(process_images([image], processor, CROP), process_images([scaled], processor, CROP))


def test_large_images_are_cropped_to_the_same_pixels(processor):
    image = random_image(np.random.default_rng(3), 5000, 4000)
    expected = processor.preprocess(image, input_data_format="channels_last")["pixel_values"][0]
    assert np.array_equal(process_images([image], processor, CROP)[0].numpy(), expected)


def test_the_whole_view_of_a_long_image_is_scaled_in_parts_to_the_same_pixels(processor, monkeypatch):
    generator = np.random.default_rng(4)
    for size in [(600, 40), (500, 1), (300, 290)]:
        image = random_image(generator, *size)
        monkeypatch.setattr(llava.mm_utils, "DIRECT_PIXELS", 2**24)
        expected = process_images([image], processor, ANYRES)
        monkeypatch.setattr(llava.mm_utils, "DIRECT_PIXELS", 0)
        assert torch.equal(process_images([image], processor, ANYRES), expected)


LONG_SHAPES = [(1, 20_000), (1, 60_000), (60_000, 1), (2**18, 1), (1, 2**18), (400, 60_000)]
MEASURE = """
import resource, sys
from types import SimpleNamespace
from PIL import Image
from transformers import CLIPImageProcessorPil
from llava.mm_utils import process_images

processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
settings = [SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=grid) for ratio in (None, "pad", "anyres")]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for each in settings:
    process_images([Image.new("RGB", (640, 480))], processor, each)
before = peak()
for size in eval(sys.argv[1]):
    image = Image.new("RGB", size, (9, 99, 200))
    for each in settings:
        process_images([image], processor, each)
print(peak() - before)
"""


def test_long_images_take_little_memory_and_time():
    command = [sys.executable, "-c", MEASURE, str(LONG_SHAPES)]
    megabytes = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout)
    # 400 x 60,000 pixels take 96 MB, the square of 60,000 x 60,000 pixels 14 GB.
    assert megabytes < 500


def test_an_image_without_memory_for_it_is_an_input_error(processor, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    for config in (PAD, CROP, ANYRES):
        monkeypatch.setattr(type(processor), "preprocess", fail)
        with pytest.raises(InputError, match="of 30 x 20 pixels does not fit into memory"):
            process_images([Image.new("RGB", (30, 20))], processor, config)


def test_an_image_without_pixels_is_refused(processor):
    for config in (PAD, CROP, ANYRES):
        with pytest.raises(InputError, match="0 x 20 pixels"):
            process_images([Image.new("RGB", (0, 20))], processor, config)


@pytest.mark.parametrize("ratio", ["PAD", "Pad", "pads", "", "any_res", "anyres_max_9", 1, ["pad"], False])
def test_an_unknown_aspect_ratio_is_refused(processor, ratio):
    with pytest.raises(InputError, match=r"image_aspect_ratio .*: expected one of None, square, pad, anyres"):
        process_images([Image.new("RGB", (30, 20))], processor, SimpleNamespace(image_aspect_ratio=ratio))


def test_square_is_the_processors_own_way(processor):
    image = random_image(np.random.default_rng(5), 30, 20)
    expected = process_images([image], processor, CROP)
    assert torch.equal(process_images([image], processor, SimpleNamespace(image_aspect_ratio="square")), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("config", [PAD, CROP, ANYRES], ids=["pad", "crop", "anyres"])
def test_images_of_any_mode_are_processed_as_rgb(mode, config, processor):
    image = Image.new("RGB", (40, 20), (255, 255, 255)).convert(mode)
    expected = process_images([image.convert("RGB")], processor, config)
    assert torch.equal(process_images([image], processor, config), expected)


def test_sixteen_bit_images_are_scaled(processor):
    grey = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    expected = process_images([Image.new("RGB", (8, 8), (128, 128, 128))], processor, PAD)
    assert torch.equal(process_images([grey], processor, PAD), expected)


def test_equal_shapes_are_stacked_and_unequal_ones_listed(processor):
    wide, square = Image.new("RGB", (168, 84)), Image.new("RGB", (168, 168))
    assert process_images([wide, square], processor, PAD).shape == (2, 3, 84, 84)
    assert process_images([wide, wide], processor, ANYRES).shape == (2, 3, 3, 84, 84)
    listed = process_images([wide, square], processor, ANYRES)
    assert [value.shape[0] for value in listed] == [3, 5]


def test_a_configuration_that_only_knows_the_aspect_ratio_is_enough(processor):
    class Odd:
        image_aspect_ratio = "pad"
        __slots__ = ()

    assert isinstance(process_images([Image.new("RGB", (5, 9))], processor, Odd()), torch.Tensor)
    assert isinstance(process_images([Image.new("RGB", (5, 9))], processor, object()), torch.Tensor)


def test_padding_centers_the_image():
    square = expand2square(Image.new("RGB", (4, 2), (1, 1, 1)), (9, 9, 9))
    assert np.asarray(square)[..., 0].tolist() == [[9] * 4, [1] * 4, [1] * 4, [9] * 4]


def test_best_resolution_shows_most_and_wastes_least():
    canvases = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    assert select_best_resolution((1000, 300), canvases) == (1008, 336)
    assert select_best_resolution((300, 1000), canvases) == (336, 1008)
    assert select_best_resolution((500, 500), canvases) == (672, 672)
    assert select_best_resolution((100, 100), canvases) == (336, 672)


def test_grid_shape_is_columns_then_rows():
    assert get_anyres_image_grid_shape((1000, 300), [(336, 672), (1008, 336)], 336) == (3, 1)
    assert get_anyres_image_grid_shape((300, 1000), "[(336, 672), (1008, 336)]", 336) == (1, 2)


@pytest.mark.parametrize("text", ["", "é", "AAAA", b"\xff", "x" * 5])
def test_what_is_not_the_base64_text_of_an_image_is_refused(text):
    with pytest.raises(InputError, match="base64"):
        load_image_from_base64(text)


def test_anyres_without_canvases_is_refused(processor):
    with pytest.raises(InputError, match="image_grid_pinpoints None"):
        process_images([Image.new("RGB", (5, 9))], processor, SimpleNamespace(image_aspect_ratio="anyres"))


@pytest.mark.parametrize(
    "canvases",
    [
        *("(1x1", "[]", 7, None, "", "null", [[336]], [[1, 2, 3]], [["a", "b"]], "[[336, 672], 5]", [[None, None]]),
        *(
            [[0, 336]],
            [[-336, 336]],
            [[10**9, 10**9]],
            [[float("nan"), 1]],
            [[float("inf"), 1]],
            "[" * 5000,
            "9" * 5000,
        ),
        *("[" * 5000, "9" * 5000, {"a": 1}, "'" * 3, "(" * 100_000, "x" * 100_000, "\0"),
    ],
    ids=lambda canvases: repr(canvases)[:20],
)
def test_unreadable_canvases_are_refused(canvases):
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        get_anyres_image_grid_shape((10, 10), canvases, 336)


def test_scaled_images_are_centered_on_black():
    canvas = np.asarray(resize_and_pad_image(Image.new("RGB", (20, 10), (255, 255, 255)), (8, 8)))
    assert canvas[:2].max() == canvas[6:].max() == 0 and canvas[2:6].min() == 255


def test_crops_follow_the_whole_view_in_raster_order(processor):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (168, 168))
    for number, color in enumerate(colors):
        image.paste(color, ((number % 2) * 84, (number // 2) * 84, (number % 2) * 84 + 84, (number // 2) * 84 + 84))
    crops = process_images([image], processor, ANYRES)[0]
    flat = process_images([Image.new("RGB", (84, 84), color) for color in colors], processor, CROP)
    assert torch.equal(crops[1:], flat)


def test_images_are_read_from_base64():
    buffer = BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(buffer, format="PNG")
    assert load_image_from_base64(base64.b64encode(buffer.getvalue())).getpixel((2, 1)) == (1, 2, 3)


def test_text_ids_are_the_recorded_ones(tokenizer):
    items = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))["items"]
    ids = tokenize_texts([item["text"] for item in items], tokenizer)
    differing = [item["text"] for item, own in zip(items, ids, strict=True) if own != item["llama"]]
    assert len(items) > 30 and differing == []


def test_prompt_ids_are_the_recorded_ones(tokenizer):
    recorded = json.loads((GOLDEN / "train_data.json").read_text(encoding="utf-8"))["tokenizer_image_token"]
    for prompt, input_ids in recorded.items():
        assert tokenizer_image_token(prompt, tokenizer) == input_ids
        assert tokenizer_image_token(prompt, tokenizer, return_tensors="pt").tolist() == input_ids


def test_prompts_tokenized_together_are_tokenized_as_alone(tokenizer):
    prompts = list(json.loads((GOLDEN / "train_data.json").read_text(encoding="utf-8"))["tokenizer_image_token"])
    prompts += ["", " ", "<image>", prompts[0], "<image>\n" + prompts[-1]]
    alone = [tokenizer_image_token(prompt, tokenizer) for prompt in prompts]
    assert tokenize_prompts(prompts, tokenizer) == alone
    assert tokenize_prompts([], tokenizer) == []


def test_a_space_after_the_image_keeps_its_token(tokenizer):
    word_mark = tokenizer.convert_tokens_to_ids("▁")
    plain, spaced = (tokenizer_image_token(text, tokenizer) for text in ("<image>A", "<image> A"))
    assert plain == [1, IMAGE_TOKEN_INDEX, *tokenizer("A").input_ids[1:]]
    assert spaced != plain and spaced in (
        [1, IMAGE_TOKEN_INDEX, word_mark, *tokenizer("A").input_ids[1:]],
        [1, IMAGE_TOKEN_INDEX, *tokenizer("  A").input_ids[1:]],
    )


def test_each_image_has_one_mark_and_the_prompt_one_start(tokenizer):
    input_ids = tokenizer_image_token("a<image><image>b<image>", tokenizer, image_token_index=-7)
    assert input_ids.count(-7) == 3 and input_ids.count(tokenizer.bos_token_id) == 1 and input_ids[-1] == -7


@pytest.mark.parametrize("text", ["half \ud83d", "byte \udcff", "x" * (2**20 + 1)])
def test_texts_that_no_tokenizer_takes_are_refused(tokenizer, text):
    for use in (
        lambda: tokenize_texts(["sound", text], tokenizer),
        lambda: tokenizer_image_token(f"<image>{text}", tokenizer),
        lambda: KeywordsStoppingCriteria([text], tokenizer, torch.tensor([[1]])),
    ):
        with pytest.raises(InputError):
            use()


@pytest.mark.parametrize("text", ["a\0b", "a\u2028b", "\ufeffa", "🙂\x07", "word " * 100_000])
def test_every_other_text_is_tokenized_without_a_warning(tokenizer, text, caplog):
    assert len(tokenizer_image_token(f"<image>{text}", tokenizer)) > 2
    assert not caplog.records


def test_an_unknown_tensor_kind_is_refused(tokenizer):
    with pytest.raises(ValueError, match="expected None or 'pt'"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/a/b/llava-lora/", "llava-lora"),
        ("/a/run/checkpoint-500", "run_checkpoint-500"),
        ("checkpoint-500", "checkpoint-500"),
    ],
)
def test_checkpoints_are_named_after_their_folder(path, name):
    assert get_model_name_from_path(path) == name


@pytest.mark.parametrize("with_prompt", [True, False])
def test_keywords_stop_with_and_without_the_prompt_in_the_output(tokenizer, with_prompt):
    prompt = torch.tensor([tokenizer("USER: hi ASSISTANT:").input_ids])
    criteria = KeywordsStoppingCriteria(["STOP"], tokenizer, prompt)
    front = prompt if with_prompt else prompt[:, :0]
    answer = torch.tensor([tokenizer("I say STOP").input_ids[1:]])
    assert not criteria(torch.cat([front, answer[:, :2]], dim=1), None).any()
    assert criteria(torch.cat([front, answer], dim=1), None).all()


def test_a_keyword_in_the_prompt_does_not_stop(tokenizer):
    prompt = torch.tensor([tokenizer("say STOP").input_ids])
    answer = torch.tensor([tokenizer("no").input_ids[1:]])
    criteria = KeywordsStoppingCriteria(["STOP"], tokenizer, prompt)
    assert not criteria(torch.cat([prompt, answer], dim=1), None).any()


def test_special_tokens_and_no_keywords(tokenizer):
    prompt = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5]])
    assert KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)(torch.tensor([[7, 8, 2]]), None).tolist() == [True]
    assert KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)(torch.tensor([[7, 2, 8]]), None).tolist() == [False]
    assert KeywordsStoppingCriteria([""], tokenizer, prompt)(torch.tensor([[7, 2, 8]]), None).tolist() == [False]


def test_rows_stop_one_by_one_also_under_beams(tokenizer):
    prompt = torch.tensor([[1, 5], [1, 6]])
    criteria = KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)
    beams = torch.tensor([[1, 5, 9], [1, 5, 2], [1, 6, 2], [1, 6, 9]])
    assert criteria(beams, None).tolist() == [False, True, True, False]


@pytest.mark.parametrize("as_embeddings", [True, False])
def test_generate_stops_at_the_keyword(tokenizer, as_embeddings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([tokenizer("USER: tell me a long tale about nothing ASSISTANT:").input_ids])

    def answer(**options):
        inputs = {"inputs_embeds": model.get_input_embeddings()(prompt)} if as_embeddings else {"input_ids": prompt}
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)[0].tolist()
        return output if as_embeddings else output[prompt.shape[1] :]

    free = answer()
    keyword = tokenizer.decode(free[3])
    assert keyword and keyword not in tokenizer.decode(free[:3])
    stopped = answer(stopping_criteria=StoppingCriteriaList([KeywordsStoppingCriteria([keyword], tokenizer, prompt)]))
    assert stopped == free[:4] and len(free) == 12
