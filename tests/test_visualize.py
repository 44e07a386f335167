"""Kept patches are drawn where the vision tower saw them, on images of every shape."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.chat import ChatSession
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.image_tokens import ImageTokens
from llava.sampling import Sampling
from llava.visualize import (
    DIMMED,
    TextLine,
    View,
    count_unseen,
    dim_dropped,
    draw_figure,
    draw_reduction,
    find_borders,
    find_view_box,
    make_view,
    visualize,
    write_image,
)

TRIM, NOISE = "llava-v1.5-tiny84-TRIM", "../data/images/noise.png"
BUS = "What is the color of the bus?"


@pytest.fixture(scope="module")
def loaded(golden):
    """The tiny TRIM model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(TRIM, device="cpu")


def test_view_boxes_follow_the_aspect_ratio():
    assert find_view_box((160, 90), "pad") == (0, -35, 160, 125)
    assert find_view_box((64, 151), "pad") == (-43, 0, 108, 151)
    assert find_view_box((160, 90), None) == (35, 0, 125, 90)
    assert find_view_box((160, 90), "anyres") == (0, 0, 160, 90)


def test_dropped_patches_are_dimmed_where_the_vision_tower_saw_them():
    kept = np.zeros((4, 4), dtype=bool)
    kept[1, 2] = kept[0, 0] = True
    dimmed = int(200 * DIMMED)
    light = np.asarray(dim_dropped(Image.new("RGB", (80, 40), (200, 200, 200)), kept, find_view_box((80, 40), "pad")))
    bright = light[..., 0] == 200
    assert bright[0:20, 40:60].all() and bright.sum() == 20 * 20 and set(light[~bright, 0]) == {dimmed}
    assert count_unseen(kept, (80, 40), find_view_box((80, 40), "pad")) == 1


def test_borders_are_drawn_around_regions_of_kept_patches():
    kept = np.zeros((2, 3), dtype=bool)
    kept[0, :2] = True
    borders = find_borders(kept, (-3, 0, 9, 8))
    assert sorted(borders) == sorted(
        [((-3, 0), (-3, 4)), ((5, 0), (5, 4)), ((-3, 0), (1, 0)), ((1, 0), (5, 0)), ((-3, 4), (1, 4)), ((1, 4), (5, 4))]
    )
    assert find_borders(np.zeros((2, 3), dtype=bool), (0, 0, 1, 1)) == []


def test_a_figure_shows_padding_and_cut_off_parts_outlines_and_any_number_of_rows():
    pytest.importorskip("matplotlib")
    image, kept = Image.new("RGB", (80, 40), (200, 200, 200)), np.eye(4, dtype=bool)
    padded = View(image, "TRIM", kept, np.eye(4), find_view_box(image.size, "pad"))
    assert padded.extent == (0, -20, 80, 60) and padded.aspect == 1
    cropped = View(image, "TRIM", kept, None, find_view_box(image.size, None))
    assert cropped.extent == (0, 0, 80, 40) and cropped.aspect == 0.5
    lines = [TextLine("reference", "no"), TextLine("prediction", "Yes, " * 100, "red")]
    sizes = [draw_figure(views, "A $x$?\n" * 3, lines).size for views in ([], [padded], [padded, View(image), cropped])]
    assert sizes[0][0] < sizes[1][0] == sizes[2][0] and sizes[0][1] < sizes[1][1] < sizes[2][1]
    colors = {tuple(color) for color in np.asarray(draw_figure([padded], "?")).reshape(-1, 3)}
    assert (255, 214, 10) in colors and (0xEC, 0xEC, 0xEC) in colors


@pytest.mark.parametrize("scores", [[1e-45, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-1, 0, 0, 100], [float("nan")] * 4])
@pytest.mark.parametrize("kept", [[True, True, False, False], [False] * 4])
def test_scores_of_any_range_are_drawn(scores, kept):
    pytest.importorskip("matplotlib")
    image, grid = Image.new("RGB", (8, 8)), (2, 2)
    view = View(image, "", np.array(kept).reshape(grid), np.float32(scores).reshape(grid), (0, 0, 8, 8))
    assert draw_figure([view], "?").width > 1000


@pytest.mark.parametrize("least", [0.49, 0.2, 0.05, 1e-9])
def test_the_color_scale_has_readable_labels_for_any_range_of_kept_scores(least):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    scales = []

    def keep_scale(figure, *args, **kwargs):
        scale = colorbar(figure, *args, **kwargs)
        scales.append(scale)
        return scale

    colorbar = Figure.colorbar
    kept = np.zeros((6, 6), dtype=bool)
    scores = np.full((6, 6), 1e-10, dtype=np.float32)
    kept[0, :2], scores[0, :2] = True, (least, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "colorbar", keep_scale)
        draw_figure([View(Image.new("RGB", (8, 8)), "", kept, scores, (0, 0, 8, 8))], "?")
    axis = scales[0].ax.yaxis
    assert not any(tick.label2.get_text() for tick in axis.get_minor_ticks())
    low, high = sorted(scales[0].ax.get_ylim())
    major = [tick.label2.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert major
    assert all(low <= float(text) * 1.01 and float(text) <= high * 1.01 for text in major)


def test_the_mean_token_is_named_beside_the_kept_patches():
    kept = torch.tensor([[True] * 3 + [False]])
    image = Image.new("RGB", (8, 8))
    with_mean, without = (ImageTokens(torch.zeros(number, 4), 4, kept, None) for number in (4, 3))
    assert make_view(image, with_mean, (2, 2), "pad").has_mean
    assert not make_view(image, without, (2, 2), "pad").has_mean


def test_what_the_crop_cut_off_is_dimmed():
    kept = np.ones((2, 2), dtype=bool)
    dimmed = int(200 * DIMMED)
    light = np.asarray(dim_dropped(Image.new("RGB", (80, 40), (200, 200, 200)), kept, find_view_box((80, 40), None)))
    assert (
        (light[:, 20:60, 0] == 200).all() and (light[:, :20, 0] == dimmed).all() and (light[:, 60:, 0] == dimmed).all()
    )


def test_a_kept_patch_covers_the_pixels_that_move_its_features(loaded, checkpoints):
    """Geometry against the model itself: only pixels of a patch change its embedding before attention mixes them."""
    tokenizer, model, image_processor, _ = loaded
    del tokenizer
    image = Image.new("RGB", (120, 60), (90, 90, 90))
    box = find_view_box(image.size, model.config.image_aspect_ratio)
    kept = np.zeros((6, 6), dtype=bool)
    kept[2, 4] = True
    shade = np.where(np.asarray(dim_dropped(image, kept, box))[..., :1] == 90, 255, 90).astype(np.uint8)
    changed = Image.fromarray(np.repeat(shade, 3, axis=2))
    before, after = (process_images([image], image_processor, model.config)[0] for image in (image, changed))
    weight = (after - before).abs().sum(0).reshape(6, 14, 6, 14).sum((1, 3))
    assert weight.argmax() == 2 * 6 + 4 and weight[2, 4] / weight.sum() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (2000, 9), (64, 64)])
@pytest.mark.parametrize("aspect_ratio", ["pad", None, "anyres"])
def test_images_of_any_shape_are_drawn(size, aspect_ratio):
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(1, 16, generator=generator) > 0.5
    tokens = ImageTokens(torch.zeros(9, 4), 16, kept, torch.rand(1, 16, generator=generator))
    drawing = draw_reduction(Image.new("RGB", size, (9, 9, 9)), tokens, (4, 4), aspect_ratio, "What is $x^2 \\frac?")
    assert drawing.mode == "RGB" and min(drawing.size) > 100


def test_methods_without_scores_are_drawn_without_a_map_and_blending_ones_refused():
    pytest.importorskip("matplotlib")
    tokens = ImageTokens(torch.zeros(9, 4), 16, torch.ones(1, 16, dtype=torch.bool), None)
    scored = ImageTokens(torch.zeros(9, 4), 16, torch.ones(1, 16, dtype=torch.bool), torch.rand(1, 16))
    image = Image.new("RGB", (40, 40))
    assert (
        draw_reduction(image, tokens, (4, 4), "pad", "?").width
        < draw_reduction(image, scored, (4, 4), "pad", "?").width
    )
    with pytest.raises(InputError, match="blends"):
        draw_reduction(image, ImageTokens(torch.zeros(4, 4), 16, None, None), (4, 4), "pad", "?")


def test_visualize_refuses_places_it_cannot_write_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", Image.new("RGB", (2, 2)))


def test_visualize_shows_what_the_answer_was_given_from(loaded, checkpoints):
    tokenizer, model, image_processor, _ = loaded
    session = ChatSession(model, tokenizer, image_processor, "vicuna_v1")
    session.show([load_image(NOISE)])
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.visualize.draw_reduction", lambda image, tokens, *rest: drawn.append(tokens) or image)
        visualize(model, image_processor, load_image(NOISE), BUS)
    assert drawn[0].num_tokens == session.ask(BUS, Sampling(max_new_tokens=1)).num_tokens
