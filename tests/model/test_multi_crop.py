"""Multi-crop pictures (`image_aspect_ratio: anyres`) through the whole model, with and without reduction."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from llava.errors import InputError
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model

PINPOINTS = [[84, 168], [168, 84], [168, 168]]
PICTURE_SIZE = (200, 150)  # becomes a 2 x 2 grid of tiles and a base view: 5 crops of 36 patches


@pytest.fixture
def model(checkpoints):
    model = load_pretrained_model("llava-v1.5-tiny84-TRIM", device="cpu", dtype="float32")[1]
    model.config.image_aspect_ratio = "anyres"
    model.config.image_grid_pinpoints = PINPOINTS
    return model


def set_merge(model, kind: str) -> None:
    model.config.mm_patch_merge_type = kind
    if kind == "spatial_unpad":
        newline = torch.linspace(-1, 1, model.config.hidden_size)
        model.get_model().image_newline = torch.nn.Parameter(newline)


def make_crops(model, golden, size=PICTURE_SIZE) -> list[torch.Tensor]:
    image = Image.open(golden / "data" / "images" / "wide_shapes.png").convert("RGB").resize(size)
    return list(process_images([image], model.get_vision_tower().image_processor, model.config))


# 180 and 166: what upstream LLaVA gives for this layout (the published fork loses all crops but the first).
@pytest.mark.parametrize(("kind", "length"), [("flat", 180), ("spatial", 180), ("spatial_unpad", 166)])
def test_without_reduction_all_crops_arrive(model, golden, kind, length):
    set_merge(model, kind)
    model.set_token_reduction(None)
    crops = make_crops(model, golden)
    assert crops[0].shape == (5, 3, 84, 84)
    assert model.encode_images(crops, ["a bus"], [PICTURE_SIZE])[0].num_tokens == length


@pytest.mark.parametrize("kind", ["flat", "spatial", "spatial_unpad"])
def test_keeping_everything_equals_no_reduction(model, golden, kind):
    set_merge(model, kind)
    crops = make_crops(model, golden)
    model.set_token_reduction("TRIM:1.0")
    everything = model.encode_images(crops, ["a bus"], [PICTURE_SIZE])[0].features
    model.set_token_reduction(None)
    assert torch.allclose(everything, model.encode_images(crops, ["a bus"], [PICTURE_SIZE])[0].features, atol=1e-6)


def test_each_crop_is_reduced_on_its_own(model, golden):
    crops = make_crops(model, golden)
    together = model.encode_images(crops, ["a bus"], [PICTURE_SIZE])[0]
    singles = [model.encode_images(crop[None], ["a bus"])[0] for crop in crops[0]]
    assert torch.equal(together.kept, torch.cat([single.kept for single in singles]))
    assert torch.allclose(together.features, torch.cat([single.features for single in singles]), atol=1e-5)
    assert together.num_patches == 180


@pytest.mark.parametrize("kind", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("spec", ["TRIM:-1", "TextSim:0.2", "Pool:0.25"])
def test_reduced_crops_generate(model, golden, kind, spec):
    set_merge(model, kind)
    model.set_token_reduction(spec)
    crops = make_crops(model, golden)
    ids = torch.tensor([[1, 5, -200, 7]])
    answer = model.generate(ids, images=crops, image_sizes=[PICTURE_SIZE], texts="a bus", max_new_tokens=3)
    assert answer.shape[0] == 1
    assert 0 < model.encode_images(crops, ["a bus"], [PICTURE_SIZE])[0].num_tokens < 100


def test_a_batch_of_pictures_with_different_crops_equals_single_ones(model, golden):
    set_merge(model, "spatial_unpad")
    sizes = [PICTURE_SIZE, (100, 300)]
    crops = [make_crops(model, golden, size)[0] for size in sizes]
    assert crops[0].shape[0] != crops[1].shape[0]
    together = model.encode_images(crops, ["a bus", "a dog"], sizes)
    for crop, size, text, tokens in zip(crops, sizes, ["a bus", "a dog"], together, strict=True):
        alone = model.encode_images([crop], [text], [size])[0]
        assert torch.equal(alone.kept, tokens.kept)
        assert torch.allclose(alone.features, tokens.features, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "says"), [(None, "needs image_aspect_ratio anyres"), ([(84, 400)], "is .84, 400. the image's")]
)
def test_spatial_merge_without_the_right_size_says_so(model, golden, sizes, says):
    set_merge(model, "spatial")
    with pytest.raises(InputError, match=says):
        model.encode_images(make_crops(model, golden), ["a bus"], sizes)


def test_unknown_merge_type_says_so(model, golden):
    set_merge(model, "spatial_pad")
    with pytest.raises(InputError, match="use flat, spatial, spatial_unpad"):
        model.encode_images(make_crops(model, golden), ["a bus"], [PICTURE_SIZE])


def test_a_training_batch_without_a_row_of_tiles_has_the_newline_in_its_graph(model, golden):
    # Another rank's batch has rows, and ranks exchange the gradients of the same weights.
    set_merge(model, "spatial_unpad")
    tokens = model.encode_images(make_crops(model, golden), ["a bus"], [PICTURE_SIZE])[0]
    ids = torch.tensor([[1, 5, -200, 7]])
    rowless = replace(tokens, features=tokens.features.detach())
    model.train().embed_prompts(ids, labels=ids, image_tokens=[rowless]).embeds.sum().backward()
    assert model.get_model().image_newline.grad.abs().max() == 0
