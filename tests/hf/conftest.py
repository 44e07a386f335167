"""The recorded tiny LLaVA as transformers' own classes hold it, with the same weights, and mixed samples for both."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer

CHECKPOINT = "llava-v1.5-tiny84-TRIM"
CLIP = "openai/clip-vit-tiny-patch14-84"
IMAGE_ID, PAD_ID = 1000, 1001
PINPOINTS = [[84, 168], [168, 84], [168, 168]]


@dataclass
class Sample:
    """One prompt for both sides.

    Attributes:
        question: what is asked.
        ids: `int64[T]` with IMAGE_TOKEN_INDEX at images.
        images: pixel values, `[C, 3, 84, 84]` each.
        sizes: (width, height) of each image.
    """

    question: str
    ids: torch.Tensor
    images: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def hold(ours, clip_folder, is_next: bool):
    """Our model's weights in transformers' class."""
    config = ours.config
    text = {
        "model_type": "llama",
        "vocab_size": config.vocab_size + 64,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }
    tower = CLIPVisionModel.from_pretrained(clip_folder, dtype="float32")
    settings = {"text_config": text, "vision_config": tower.config.to_dict(), "image_token_index": IMAGE_ID}
    settings |= {"vision_feature_layer": -2, "pad_token_id": PAD_ID}
    if is_next:
        held = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings, image_grid_pinpoints=PINPOINTS))
    else:
        held = LlavaForConditionalGeneration(LlavaConfig(**settings, image_seq_length=36))
    weights = held.state_dict()
    weights["lm_head.weight"].zero_()  # the rows that only the wider vocabulary has never win
    weights |= {f"model.vision_tower.{key}": value for key, value in tower.state_dict().items()}
    for key, value in ours.state_dict().items():
        new = key
        if key.startswith("model.vision_tower."):
            continue
        if key.startswith("model.mm_projector."):
            number, part = key.removeprefix("model.mm_projector.").split(".")
            new = f"model.multi_modal_projector.linear_{int(number) // 2 + 1}.{part}"
        elif key.startswith("model.") and key != "model.image_newline":
            new = f"model.language_model.{key.removeprefix('model.')}"
        weights[new][: len(value)] = value
    held.load_state_dict(weights)
    held.generation_config.eos_token_id = 2
    held.generation_config.pad_token_id = PAD_ID
    return held.eval()


@pytest.fixture(scope="session")
def folder(golden):
    """Where the recorded checkpoints are."""
    return golden / "checkpoints"


@pytest.fixture(scope="session")
def clip(folder) -> str:
    """The CLIP that the towers come from."""
    return str(folder / CLIP)


@pytest.fixture(scope="session")
def processor(folder, clip) -> LlavaProcessor:
    """As in a llava-hf folder: it writes a placeholder per patch."""
    tokenizer = load_tokenizer(str(folder / CHECKPOINT))
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "left"
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [IMAGE_ID, PAD_ID]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(clip),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module", params=["1.5", "1.6"])
def pair(request, folder, clip):
    """(transformers' model, ours, its tokenizer): the same weights on both sides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer, ours, _, _ = load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32", reduce="none")
        is_next = request.param == "1.6"
        if is_next:
            ours.config.image_aspect_ratio, ours.config.mm_patch_merge_type = "anyres", "spatial_unpad"
            # (width, height) here, (height, width) there.
            ours.config.image_grid_pinpoints = [list(reversed(canvas)) for canvas in PINPOINTS]
            ours.get_model().image_newline = torch.nn.Parameter(torch.linspace(-1, 1, ours.config.hidden_size))
        yield hold(ours, clip, is_next), ours, tokenizer


@pytest.fixture
def held(pair):
    """transformers' model."""
    return pair[0]


@pytest.fixture(scope="module")
def samples(pair) -> list[Sample]:
    """64 questions of different lengths about no, one or two images of different sizes."""
    held, _, tokenizer = pair
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    words = ["what", "is", "the", "color", "of", "the", "big", "red", "circle", "near", "the", "sign"]
    samples = []
    for index in range(64):
        num_images = (1, 1, 2, 1, 0, 1, 1, 1)[index % 8]
        question = " ".join(draw.choice(words) for _ in range(draw.randint(2, 20))) + "?"
        prompt = "A chat. USER: " + "<image>\n" * num_images + question + " ASSISTANT:"
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        sizes = [(draw.randint(40, 300), draw.randint(40, 300)) for _ in range(num_images)]
        counts = [num_crops(size) if is_next(held) else 1 for size in sizes]
        crops = [torch.randn(count, 3, 6, 6, generator=generator) for count in counts]
        images = [torch.nn.functional.interpolate(each, size=84, mode="bilinear") for each in crops]
        samples.append(Sample(question, ids, images, sizes))
    return samples


def is_next(held) -> bool:
    return isinstance(held, LlavaNextForConditionalGeneration)


def num_crops(size: tuple[int, int]) -> int:
    columns, rows = get_anyres_image_grid_shape(size, [list(reversed(canvas)) for canvas in PINPOINTS], 84)
    return 1 + columns * rows


def as_processor_writes(held, samples: list[Sample], side: str = "left") -> dict[str, torch.Tensor]:
    """The inputs of a batch for transformers' model: a placeholder per token that the model itself makes."""
    images = [image for sample in samples for image in sample.images]
    sizes = [size for sample in samples for size in sample.sizes]
    inputs, counts = {}, []
    if images:
        most = max(len(image) for image in images)
        padded = torch.stack([torch.cat([image, image.new_zeros(most - len(image), 3, 84, 84)]) for image in images])
        inputs["pixel_values"] = padded if is_next(held) else padded[:, 0]
        if is_next(held):
            inputs["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
        with torch.no_grad():
            counts = [len(features) for features in held.get_image_features(**inputs).pooler_output]
    counts = iter(counts)
    rows = []
    for sample in samples:
        pieces = [[IMAGE_ID] * next(counts) if token == IMAGE_TOKEN_INDEX else [token] for token in sample.ids.tolist()]
        rows.append(torch.tensor([token for piece in pieces for token in piece]))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs["input_ids"] = pad(rows, batch_first=True, padding_value=PAD_ID, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    inputs["attention_mask"] = pad(ones, batch_first=True, padding_value=0, padding_side=side)
    return inputs


def new_ids(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """What users cut out of `generate`'s output, up to the end of each answer."""
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[: answer.index(2)] if 2 in answer else answer for answer in answers]


@pytest.fixture(scope="session")
def lay_out() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(inputs=as_processor_writes, new_ids=new_ids, is_next=is_next)
