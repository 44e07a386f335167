"""Kept patches are drawn where the vision tower saw them, on images of every shape."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.chat import ChatSession
from llava.drawing import (
    CENTRE_COLOR,
    DIMMED,
    KEPT_COLOR,
    MAX_COLUMNS,
    Block,
    Drawing,
    Panel,
    Sight,
    TextLine,
    View,
    count_unseen,
    dim_dropped,
    find_borders,
    find_view_box,
    lay_out,
    number_cells,
    write_image,
)
from llava.errors import InputError
from llava.image import load_image
from llava.looks import (
    Case,
    Look,
    Stage,
    ask_else,
    describe_stage,
    look_at,
    make_stages,
    make_view,
    prepare,
    read_prompt,
)
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.image_tokens import ImageTokens
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, Reduction, parse_reduction
from llava.sampling import Sampling
from llava.visualize import draw_questions, read_reductions, visualize
from llava.what_if import FULL_COLOR, Sparing, ask, choose_block, give_back, is_same, list_blocks, try_blocks
from playground.shapes.world import SPLITS, draw_scene

TRIM, NOISE = "llava-v1.5-tiny84-TRIM", "../data/images/noise.png"
BUS = "What is the color of the bus?"


@pytest.fixture(scope="module")
def loaded(golden):
    """The tiny TRIM model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(TRIM, device="cpu")


@pytest.fixture(scope="module")
def pocket():
    """The pocket model of the world of shapes and its image processor, loaded once."""
    folder = Path(__file__).parents[1] / "playground" / "shapes" / "checkpoints" / "llava-shapes"
    _, model, image_processor, _ = load_pretrained_model(str(folder), device="cpu")
    return model, image_processor


def test_view_boxes_follow_the_aspect_ratio():
    assert find_view_box((160, 90), "pad") == (0, -35, 160, 125)
    assert find_view_box((64, 151), "pad") == (-43, 0, 108, 151)
    assert find_view_box((160, 90), None) == (35, 0, 125, 90)
    assert find_view_box((160, 90), "anyres") == (0, 0, 160, 90)
    assert find_view_box((160, 90), None, Sight(squeezes=True, covered=0.5)) == (0, 0, 80, 45)
    assert find_view_box((160, 90), "pad", Sight(squeezes=True, covered=0.5)) == (0, -35, 80, 45)


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


def test_a_figure_shows_padding_and_cut_off_parts_outlines_and_an_image_once():
    pytest.importorskip("matplotlib")
    image, kept = Image.new("RGB", (80, 40), (200, 200, 200)), np.eye(4, dtype=bool)
    looks = [Panel("TRIM", kept), Panel("TRIM", kept, scores=np.eye(4))]
    padded = View(image, find_view_box(image.size, "pad"), looks)
    assert padded.extent == (0, -20, 80, 60) and padded.aspect == 1
    cropped = View(image, find_view_box(image.size, None), looks[:1])
    assert cropped.extent == (0, 0, 80, 40) and cropped.aspect == 0.5
    lines = [TextLine("reference", "no"), TextLine("prediction", "Yes, " * 100, "red")]
    other = View(Image.new("RGB", (80, 40)))
    sizes = [Drawing(views, "A $x$?\n" * 3, lines).image().size for views in ([], [padded], [padded, cropped, other])]
    assert sizes[0][0] < sizes[1][0] < sizes[2][0] and sizes[0][1] < sizes[1][1] < sizes[2][1]
    assert [[panel for _, panel in row] for row in lay_out([padded, cropped, other])] == [
        [None, *looks, looks[0]],
        [None],
    ]
    assert colors_of(Drawing([padded], "?").image()) >= {KEPT_COLOR, "#ececec"}


def colors_of(image: Image.Image) -> set[str]:
    red, green, blue = np.moveaxis(np.asarray(image).astype(int), 2, 0)
    return {f"#{color:06x}" for color in np.unique(red << 16 | green << 8 | blue)}


@pytest.mark.parametrize("counts", [[2, 2, 2], [1] * 9, [3, 2], [7, 1], [4, 4], []])
def test_rows_have_four_panels_at_most_and_a_methods_panels_stay_together(counts):
    image, kept = Image.new("RGB", (8, 8)), np.eye(2, dtype=bool)
    views = [View(image, (0, 0, 8, 8), [Panel(f"{number}", kept)] * count) for number, count in enumerate(counts)]
    rows = lay_out(views)
    assert all(0 < len(row) <= MAX_COLUMNS for row in rows)
    panels = [panel for row in rows for _, panel in row]
    assert panels == [None] * bool(views) + [panel for view in views for panel in view.panels]
    for view in views:
        if len(view.panels) < MAX_COLUMNS:
            assert sum(any(own is view for own, panel in row if panel is not None) for row in rows) == 1


def test_centres_cells_and_blocks_are_drawn_apart_from_kept_patches():
    pytest.importorskip("matplotlib")
    image, kept = Image.new("RGB", (8, 8), (200, 200, 200)), np.zeros((4, 4), dtype=bool)
    one = kept.copy()
    one[1, 2] = True

    def colors(panel: Panel) -> set[str]:
        return colors_of(Drawing([View(image, (0, 0, 8, 8), [panel])], "?").image())

    assert not {KEPT_COLOR, CENTRE_COLOR} & colors(Panel("", kept))
    assert CENTRE_COLOR in colors(Panel("", kept, one)) and KEPT_COLOR not in colors(Panel("", kept, one))
    assert CENTRE_COLOR in colors(Panel("", kept, one, scores=np.eye(4)))
    assert KEPT_COLOR in colors(Panel("", ~kept, cells=(2, 2)))
    tinted = colors(Panel("", kept, blocks=[Block((0, 2), (1, 3), "a red cross " * 9, "#00ff00")]))
    assert any(color[1:3] == color[5:7] != color[3:5] for color in tinted - colors(Panel("", kept)))
    assert number_cells((4, 6), (2, 3)).tolist() == [[1, 1, 2, 2, 3, 3]] * 2 + [[4, 4, 5, 5, 6, 6]] * 2


@pytest.mark.parametrize("scores", [[1e-45, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-1, 0, 0, 100], [float("nan")] * 4])
@pytest.mark.parametrize("kept", [[True, True, False, False], [False] * 4])
def test_scores_of_any_range_are_drawn(scores, kept):
    pytest.importorskip("matplotlib")
    image, grid = Image.new("RGB", (8, 8)), (2, 2)
    panel = Panel("", np.array(kept).reshape(grid), scores=np.float32(scores).reshape(grid))
    assert Drawing([View(image, (0, 0, 8, 8), [panel])], "?").image().width > 1000


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
        Drawing([View(Image.new("RGB", (8, 8)), (0, 0, 8, 8), [Panel("", kept, scores=scores)])], "?").image()
    axis = scales[0].ax.yaxis
    assert not any(tick.label2.get_text() for tick in axis.get_minor_ticks())
    low, high = sorted(scales[0].ax.get_ylim())
    major = [tick.label2.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert major
    assert all(low <= float(text) * 1.01 and float(text) <= high * 1.01 for text in major)


def make_look(spec: str, kept: torch.Tensor, num_made: int = 0, **fields: torch.Tensor | None) -> Look:
    """A look at one crop, `bool[N]` kept."""
    number = int(kept.sum()) + num_made
    tokens = ImageTokens(torch.zeros(number, 4), len(kept), kept[None], **fields)
    return Look(parse_reduction(spec), tokens, torch.arange(number), (Stage(0, 6, kept, num_made, number),))


def test_a_caption_says_what_is_kept_and_what_is_merged():
    kept = torch.tensor([True] * 3 + [False])

    def caption(spec: str, kept: torch.Tensor, num_made: int, **changes: object) -> str:
        look = replace(make_look(spec, kept, num_made), **changes)
        return describe_stage(look, look.stages[-1])

    assert caption("TRIM", kept, 0) == "3 of 4 patches kept"
    assert caption("TRIM", kept, 1) == "3 of 4 patches kept + mean of the rest"
    assert caption("VisionZip", kept, 4) == "3 of 4 patches kept + 4: CLS, rest merged around centres"
    assert caption("Pool", ~kept & kept, 4, cells=(2, 2)) == "4 patches averaged to 2 x 2"
    stages = (Stage(0, 1, kept, 1, 4), Stage(1, 6, kept, 2, 5))
    assert caption("SparseVLM", kept, 1, stages=stages) == "layers 1 to 5: 3 of 4 patches kept + 2 merged"


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
    look = make_look("TRIM", torch.rand(16, generator=generator) > 0.5, scores=torch.rand(1, 16, generator=generator))
    view = make_view(Image.new("RGB", size, (9, 9, 9)), look, (4, 4), aspect_ratio)
    drawing = Drawing([view], "What is $x^2 \\frac?").image()
    assert drawing.mode == "RGB" and min(drawing.size) > 100


def test_methods_without_scores_are_drawn_without_a_map():
    kept, image = torch.ones(16, dtype=torch.bool), Image.new("RGB", (40, 40))
    assert len(make_view(image, make_look("Random", kept), (4, 4), "pad").panels) == 1
    scored = make_view(image, make_look("FasterVLM", kept, scores=torch.rand(1, 16)), (4, 4), "pad")
    assert [panel.caption for panel in scored.panels] == [
        "FasterVLM:0.25\n16 of 16 patches kept",
        "FasterVLM:0.25\nCLS attention",
    ]
    with pytest.raises(InputError, match="every patch is kept"):
        make_view(image, make_look("none", kept), (4, 4), "pad")


# Options that a tower of 4 layers and a language model of 3 layers need.
OPTIONS = {"HiPrune": ",object_layer=2", "FastV": ",layer=1", "DART": ",layer=1,pivot_image=2,pivot_text=2"}
SPECS = [f"{name}:0.3{OPTIONS.get(name, '')}" for name in [*REDUCERS, *LAYER_REDUCERS]]
SPECS += ["TRIM:-1", "PruMerge:-1", "Pool:avg=9.5", "HoloV:avg=9.5", "VisionZip:9,contextual=0"]
SPECS += ["TRIM:-1|FastV:0.5,layer=1", "VisionZip:9,contextual=4|SparseVLM:0.3", "HoloV:12|PyramidDrop:0.5"]


def make_case(loaded: tuple, reductions: list[Reduction], question: str = BUS) -> Case:
    _, model, image_processor, _ = loaded
    return prepare(model, image_processor, load_image(NOISE), question, reductions, "vicuna_v1")


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_can_be_drawn_and_what_is_drawn_is_what_it_leaves(loaded, checkpoints, spec):
    """The panels against the features that the language model reads: kept patches are its rows, bit for bit."""
    _, model, _, _ = loaded
    reduction = parse_reduction(spec)
    case = make_case(loaded, [reduction])
    look = look_at(model, case, reduction)
    view = make_view(case.image, look, model.get_vision_tower().grid, "pad")
    everything = look_at(model, case, Reduction()).tokens.features  # [N, E]
    first = look.stages[0]
    rows = {tuple(row.tolist()) for row in look.tokens.features}
    for patch in range(36):
        assert not first.kept[patch] or tuple(everything[patch].tolist()) in rows
    assert reduction.before is None or reduction.before.made_name or not first.num_made
    assert first.kept.sum() + first.num_made == first.num_tokens == look.tokens.num_tokens
    assert [stage.first for stage in look.stages] == [0, *(reduction.inside.layers(3) if reduction.inside else ())]
    if reduction.inside is not None:
        counts = reduction.inside.counts(look.tokens.num_tokens, 3)
        assert [stage.num_tokens for stage in look.stages[1:]] == list(counts)
        assert all(not (later.kept & ~earlier.kept).any() for earlier, later in pairwise(look.stages))
    scored = [panel for panel in view.panels if panel.scores is not None]
    assert bool(scored) == (look.tokens.scores is not None)
    assert all(panel.caption.split("\n")[1] == reduction.before.scores_name for panel in scored)
    drawn = [panel for panel in view.panels if panel.scores is None and panel.cells is None]
    stages = [stage for stage in look.stages if not stage.kept.all() or len(look.stages) == 1]
    assert look.cells or [panel.kept.sum() for panel in drawn] == [int(stage.kept.sum()) for stage in stages]
    assert (model.token_reducer.spec(), model.layer_reducer) == ("TRIM:-1", None)


def test_a_look_follows_tokens_through_the_layers_as_the_model_drops_them(loaded, checkpoints):
    """FastV recomputed: the tokens that the last prompt token attends to most in the layer before."""
    _, model, _, _ = loaded
    reduction = parse_reduction("FastV:9,layer=1")
    case = make_case(loaded, [reduction])
    look = look_at(model, case, reduction)
    batch = model.embed_prompts(case.ids[None], image_tokens=[look.tokens])
    layer, position_ids = model.model.layers[0], batch.position_ids
    with torch.no_grad():
        normed = layer.input_layernorm(batch.embeds)
        query, key = (
            project(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        cos, sin = model.model.rotary_emb(normed, position_ids)
        half = query.shape[-1] // 2
        query, key = (
            each * cos + torch.cat([-each[..., half:], each[..., :half]], dim=-1) * sin for each in (query, key)
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        products = query[:, :, -1:] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    attention = products.softmax(dim=-1)[0, :, 0].mean(dim=0)[batch.image_of[0] == 0]
    assert set(look.stages[1].kept.nonzero().flatten().tolist()) == set(attention.topk(9).indices.tolist())


def test_an_image_is_encoded_once_for_several_methods(loaded, checkpoints):
    pytest.importorskip("matplotlib")
    _, model, image_processor, _ = loaded
    calls, encode = [], model.encode_patches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode_patches", lambda *args: calls.append(args) or encode(*args))
        several = visualize(model, image_processor, load_image(NOISE), BUS, ["TRIM:9", "FasterVLM:9", "PruMerge"])
    assert len(calls) == 1
    one = visualize(model, image_processor, load_image(NOISE), BUS)
    assert one.height < several.height


@pytest.fixture
def anyres(loaded, monkeypatch):
    """The tiny model with a whole view and 2 x 2 tiles of an image, and a newline token behind each row."""
    _, model, _, _ = loaded
    monkeypatch.setattr(model.config, "image_aspect_ratio", "anyres")
    monkeypatch.setattr(model.config, "image_grid_pinpoints", [[168, 168]], raising=False)
    monkeypatch.setattr(model.config, "mm_patch_merge_type", "spatial_unpad", raising=False)
    newline = torch.nn.Parameter(torch.linspace(-1, 1, model.config.hidden_size))
    monkeypatch.setattr(model.get_model(), "image_newline", newline, raising=False)
    return loaded


@pytest.mark.parametrize("spec", ["TRIM:9", "VisionZip:9,contextual=3", "HoloV:9|FastV:0.5,layer=1", "SparseVLM:0.3"])
def test_of_several_crops_the_whole_view_is_looked_at_and_its_patches_are_given_back(anyres, checkpoints, spec):
    _, model, _, _ = anyres
    reduction = parse_reduction(spec)
    case = make_case(anyres, [reduction])
    look, full = look_at(model, case, reduction), look_at(model, case, Reduction()).tokens
    assert case.features.num_crops == 5 and full.num_tokens > 5 * 36
    assert look.tokens.kept is None or torch.equal(look.stages[0].kept, look.tokens.kept[0])
    assert look.stages[0].num_tokens == look.tokens.num_tokens > len(look.sources)
    assert make_view(case.image, look, (6, 6), "anyres").panels
    tokens, places = give_back(look, full.features[:36], torch.ones(36, dtype=torch.bool))
    assert torch.equal(tokens.features[places], full.features[:36])
    behind = tokens.num_tokens - (look.tokens.num_tokens - len(look.sources))
    assert torch.equal(tokens.features[behind:], look.tokens.features[len(look.sources) :])


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["none"], "this checkpoint keeps every patch: name a token reduction"),
        (["TRIM:9", "none"], "--reduce none keeps every patch"),
        (["TRIM:9", "Pool:9", "TRIM:9"], "--reduce names TRIM:9 twice"),
        (["TRIMM"], 'did you mean "TRIM"'),
        (["FastV:0.5,layer=7"], "tokens cannot leave before layer 7"),
    ],
)
def test_methods_that_cannot_be_drawn_are_refused_in_one_line(loaded, checkpoints, specs, says):
    with pytest.raises(InputError, match=says) as caught:
        visualize(loaded[1], loaded[2], load_image(NOISE), BUS, specs)
    assert "\n" not in str(caught.value)


def test_visualize_refuses_places_it_cannot_write_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", Image.new("RGB", (2, 2)))


def test_visualize_shows_what_the_answer_was_given_from(loaded, checkpoints):
    tokenizer, model, image_processor, _ = loaded
    session = ChatSession(model, tokenizer, image_processor, "vicuna_v1")
    session.show([load_image(NOISE)])
    look = look_at(model, make_case(loaded, [parse_reduction("TRIM:-1")]), parse_reduction("TRIM:-1"))
    assert look.tokens.num_tokens == session.ask(BUS, Sampling(max_new_tokens=1)).num_tokens


# --------------------------------------------------------------------------------------------------------- what if
def test_blocks_cover_the_grid_once_and_are_smaller_on_small_grids():
    assert [choose_block(grid, None) for grid in ((24, 24), (16, 16), (8, 8), (6, 6), (2, 2))] == [4, 4, 2, 1, 1]
    assert choose_block((8, 8), 3) == 3
    with pytest.raises(InputError, match="--block 9: an image has 8 x 8 patches; use 1 to 8"):
        choose_block((8, 8), 9)
    covered = np.zeros((8, 8), dtype=int)
    for rows, cols in list_blocks((8, 8), 3):
        covered[slice(*rows), slice(*cols)] += 1
    assert (covered == 1).all()


def test_answers_are_the_same_but_for_case_space_and_full_stop():
    assert is_same("Yes.", " yes") and is_same("a  red\ncross", "A red cross.") and not is_same("yes", "no")


@pytest.mark.parametrize("spec", ["FasterVLM:9", "FastV:0.3,layer=1", "SparseVLM+:0.3", "TextSim:9|FastV:0.5,layer=1"])
def test_everything_given_back_in_one_block_is_the_full_models_prompt(loaded, checkpoints, spec):
    """All patches lie in the one block, so that the method's choice cannot matter."""
    _, model, _, _ = loaded
    reduction, sampling = parse_reduction(spec), Sampling(max_new_tokens=5)
    case = make_case(loaded, [reduction])
    what_if = try_blocks(model, case, reduction, sampling, side=6)
    (trial,) = what_if.trials
    assert trial.num_patches == 36 - int(what_if.look.stages[-1].kept.sum()) > 0
    assert trial.answer == what_if.full
    assert what_if.full == ask(model, case, sampling, [look_at(model, case, Reduction()).tokens], Reduction())[0]
    assert (model.token_reducer.spec(), model.layer_reducer) == ("TRIM:-1", None)


def test_given_back_patches_go_to_their_places_and_the_methods_own_tokens_stay(loaded, checkpoints):
    _, model, _, _ = loaded
    reduction = parse_reduction("TRIM:9")
    case = make_case(loaded, [reduction])
    look, full = look_at(model, case, reduction), look_at(model, case, Reduction()).tokens.features
    block = torch.zeros(36, dtype=torch.bool)
    block[:12] = True
    tokens, places = give_back(look, full, block)
    present = block | look.stages[0].kept
    assert torch.equal(tokens.features[:-1], full[present]) and torch.equal(
        tokens.features[-1], look.tokens.features[-1]
    )
    assert places == list(range(12))  # the first patches of the image
    original = parse_reduction("TRIM:9,position_ids=original")
    assert give_back(look_at(model, case, original), full, block)[0].positions.offsets.tolist() == [
        *present.nonzero().flatten().tolist(), 35,
    ]  # fmt: skip
    tokens, _ = give_back(look, full, torch.ones(36, dtype=torch.bool))
    assert torch.equal(tokens.features, torch.cat([full, look.tokens.features[-1:]]))


# Pictures of the world of shapes in which FasterVLM keeps too little of the object that the question names.
KNOWN = [(1, "green cross", "FasterVLM:4"), (2, "green circle", "FasterVLM:4"), (20, "green circle", "TRIM:4")]


@pytest.mark.parametrize(("number", "name", "spec"), KNOWN)
def test_the_blocks_that_bring_the_answer_back_are_those_of_the_object_asked_about(pocket, number, name, spec):
    model, image_processor = pocket
    image, scene = draw_scene(7, SPLITS["eval"], number)
    left, top, right, bottom = next(item.box for item in scene.objects if item.name == name)
    question = f"Is there a {name} in the image?\nAnswer the question using a single word or phrase."
    case = prepare(model, image_processor, image, question, [parse_reduction(spec)], "vicuna_v1")
    what_if = try_blocks(model, case, parse_reduction(spec), Sampling(max_new_tokens=8))
    assert (what_if.full, what_if.own, what_if.is_lost) == ("Yes", "No", True)
    found = [trial for trial in what_if.trials if what_if.brings_back(trial)]
    assert 0 < len(found) < len(what_if.trials) == 16
    for trial in found:  # patches are 14 pixels wide
        (row, below), (col, beyond) = trial.rows, trial.cols
        assert 14 * row < bottom and 14 * below > top and 14 * col < right and 14 * beyond > left
    colored = [(block.rows, block.cols) for block in what_if.blocks() if block.color == FULL_COLOR]
    assert colored == [(trial.rows, trial.cols) for trial in found]
    assert f"{len(found)} of 16 blocks" in what_if.summary()


def test_an_answer_that_was_never_lost_is_said_to_be_the_full_models(pocket):
    model, image_processor = pocket
    image, _ = draw_scene(7, SPLITS["eval"], 1)
    reduction = parse_reduction("FastV:32")
    question = "Is there a green cross in the image?\nAnswer the question using a single word or phrase."
    case = prepare(model, image_processor, image, question, [reduction], "vicuna_v1")
    what_if = try_blocks(model, case, reduction, Sampling(max_new_tokens=8), 4)
    assert not what_if.is_lost and what_if.summary().startswith("the answer is the full model's already; ")
    assert not any(what_if.brings_back(trial) for trial in what_if.trials)


def test_what_never_leaves_is_read_by_every_layer(pocket):
    """SparseVLM merges and renumbers in three stages; the spared tokens are still among the rows of the last layer."""
    model, image_processor = pocket
    image, _ = draw_scene(7, SPLITS["eval"], 1)
    inside = parse_reduction("SparseVLM:0.1").inside
    case = prepare(model, image_processor, image, "What is there?", [Reduction(None, inside)], "vicuna_v1")
    look = look_at(model, case, Reduction(None, inside))
    safe = (~look.stages[-1].kept).nonzero().flatten().tolist()[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "layer_reducer", Sparing(inside, safe))
        cache = read_prompt(model, case.ids, [look.tokens])
    stages = make_stages(model, cache, 0, look.tokens, look.sources)
    assert all(stage.kept[safe].all() for stage in stages)
    assert len(look.stages) == len(stages) > 2
    assert stages[-1].num_tokens < look.tokens.num_tokens / 2


def test_a_model_has_its_own_reduction_again_whatever_was_tried(pocket):
    model, image_processor = pocket
    own = parse_reduction("FastV:8")
    model.set_token_reduction("FastV:8")
    case = prepare(model, image_processor, Image.new("RGB", (112, 112)), "What is there?", [own], "vicuna_v1")
    try_blocks(model, case, own, Sampling(max_new_tokens=1), 4)
    try_blocks(model, case, parse_reduction("FastV:9"), Sampling(max_new_tokens=1), 4)
    with pytest.raises(InputError, match="HiPrune:9,object_layer=40: "):
        prepare(model, image_processor, case.image, "What?", [parse_reduction("HiPrune:9,object_layer=40")])
    assert (model.token_reducer, model.layer_reducer) == (None, own.inside)
    assert model.config.mm_vision_token_reduce_func == "FastV:8"
    model.set_token_reduction(None)


def test_several_questions_are_drawn_side_by_side_with_what_each_keeps(pocket):
    pytest.importorskip("matplotlib")
    model, image_processor = pocket
    image, _ = draw_scene(SPLITS["eval"], 1, 3)
    (trim,) = read_reductions(model, ["TRIM:9"])
    case = prepare(model, image_processor, image, "What color is the circle?", [trim])
    calls, encode = [], model.encode_patches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode_patches", lambda *args: calls.append(args) or encode(*args))
        other = ask_else(model, case, "Where is\nthe square?")
    assert not calls and other.features is case.features
    looks = [look_at(model, each, trim) for each in (case, other)]
    alone = look_at(model, prepare(model, image_processor, image, "Where is\nthe square?", [trim]), trim)
    assert torch.equal(looks[1].stages[0].kept, alone.stages[0].kept)
    drawing = draw_questions(model, [case, other], looks, ["Red.", "Left."])
    assert drawing.heading == "TRIM:9"
    assert [[panel and panel.caption.split("\n")[0] for _, panel in row] for row in lay_out(drawing.views)] == [
        [None, "What color is the circle? Red.", "Where is the square? Left."]
    ]


def test_a_drawing_is_a_png_or_vectors_by_its_ending_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    kept = np.eye(4, dtype=bool)
    views = [View(Image.new("RGB", (8, 8)), (0, 0, 8, 8), [Panel("2 kept", kept), Panel("s", kept, scores=kept * 1.0)])]
    drawing = Drawing(views, "What is $x$?", [TextLine("answer", "No")])
    starts = {"a.png": b"\x89PNG", "a.PDF": b"%PDF", "a.svg": b"<?xml"}
    for name, start in starts.items():
        drawing.write(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(start)
        drawing.write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    assert Image.open(tmp_path / "a.png").size == drawing.image().size
    for name, ending in (("a.jpg", r"\.jpg"), ("a", "without an ending")):
        with pytest.raises(InputError, match=rf"a drawing is written as \.png, \.pdf, \.svg, not {ending}"):
            drawing.write(tmp_path / name)
