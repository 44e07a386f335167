"""What the page shows is what the library says: answers, kept patches, figures; and it says what is wrong."""

import time
from itertools import pairwise
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from llava.answer_cost import count_answer
from llava.assistant import Llava
from llava.drawing import THRESHOLD_COLOR, Panel, View, draw_panel, find_threshold
from llava.efficiency.cost import Precision, Workload, stage_costs, total_flops
from llava.efficiency.estimate import count_reduction
from llava.efficiency.shapes import PUBLISHED_MODELS, read_source
from llava.errors import InputError
from llava.looks import look_at, make_ids, prepare
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, parse_reduction
from llava.serve.page_model import NONE, PageModel, Result, describe_threshold, list_methods, make_spec, stream
from llava.serve.samples import SHAPES, list_samples

POCKET = str(SHAPES / "checkpoints" / "llava-shapes")
QUESTION = "What shape is the purple object?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def llava() -> Llava:
    return Llava.from_pretrained(POCKET, device="cpu")


@pytest.fixture(scope="module")
def model(llava) -> PageModel:
    return PageModel(llava, POCKET)


@pytest.fixture(scope="module")
def image() -> Path:
    return list_samples()[0].image


def ask(model: PageModel, image: Path, spec: str, question: str = QUESTION) -> tuple[list[str], Result]:
    *texts, result = model.ask(image, question, spec)
    return texts, result


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("spec", [NONE, "TRIM:-1", "TRIM:8", "PruMerge:8", "FastV:16", "TRIM:-1|FastV:0.5,layer=2"])
def test_the_answer_is_that_of_llava_and_grows_to_it(spec, llava, model, image):
    pytest.importorskip("matplotlib")
    before = llava.reduce
    texts, result = ask(model, image, spec, "Describe the image.")
    assert llava.reduce == before
    llava.set_token_reduction(spec)
    answer = llava.ask(image, "Describe the image.")
    llava.set_token_reduction(before)
    assert (result.text, result.num_tokens, result.num_patches) == (answer.text, answer.num_tokens, answer.num_patches)
    assert len(texts) > 1 and texts[-1].strip() == answer.text
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert result.new_tokens == len(llava.tokenizer(answer.text, add_special_tokens=False).input_ids) + 1
    assert 0 < result.first_seconds < result.seconds and set(result.stages) >= {"encode", "reduce", "generate"}


@pytest.mark.parametrize("spec", ["TRIM:-1", "FasterVLM:8", "FastV:16", "SparseVLM:16", "Pool:16"])
def test_the_kept_patches_are_those_that_llava_visualize_draws(spec, llava, model, image):
    pytest.importorskip("matplotlib")
    _, result = ask(model, image, spec)
    reduction = parse_reduction(spec)
    case = prepare(llava.model, llava.image_processor, Image.open(image).convert("RGB"), QUESTION, [reduction])
    look = look_at(llava.model, case, reduction)
    assert (result.kept == look.stages[-1].kept.numpy()).all()
    assert result.tokens == look.describe_tokens().removesuffix(" tokens")
    maps, scores = ([drawn for drawn in result.pictures if drawn.is_map is is_map] for is_map in (True, False))
    assert len(maps) == max(1, len(look.stages) - 1) and len(scores) == (look.tokens.scores is not None)


def test_another_question_moves_the_kept_patches_and_no_reduction_has_no_pictures(model, image):
    pytest.importorskip("matplotlib")
    kept = [ask(model, image, "TRIM:8", question)[1].kept for question in (QUESTION, "Is there a white triangle?")]
    assert [mask.sum() for mask in kept] == [8, 8] and (kept[0] != kept[1]).any()
    _, full = ask(model, image, NONE)
    assert (full.pictures, full.kept, full.tokens) == ((), None, "64")


def test_the_methods_are_those_that_the_model_can_serve_its_own_first(llava, model):
    assert set(model.methods) == {*REDUCERS, *LAYER_REDUCERS} - {"HiPrune"}  # HiPrune looks at a layer too deep for it
    assert model.methods["TRIM"] and not model.methods["FasterVLM"] and model.num_patches == 64
    for own, first in (("TRIM:0.25,similarity=direct", ("TRIM:0.25,similarity=direct", False)),
                       ("TextSim:-1", ("TextSim", True)), ("TRIM:8", ("TRIM:8", False))):  # fmt: skip
        llava.set_token_reduction(own)
        try:
            methods = PageModel(llava, POCKET).methods
        finally:
            llava.set_token_reduction(NONE)
        assert next(iter(methods.items())) == first and set(methods) == {*model.methods, first[0]}


@pytest.mark.parametrize(
    ("method", "count", "is_automatic", "spec"),
    [
        ("TRIM", 8, True, "TRIM:-1"),
        ("TRIM", 8, False, "TRIM:8"),
        ("TRIM", 1, False, "TRIM:0.015625"),
        ("TRIM:0.25,fence=2.0", 8, True, "TRIM:0.25,fence=2.0"),
        ("FastV", 64, False, "FastV:64"),
    ],
)
def test_a_choice_on_the_page_is_a_spec_string(method, count, is_automatic, spec):
    assert make_spec(method, count, 64, is_automatic) == spec


@pytest.mark.parametrize("name", [name for name, has_rule in list_methods().items() if not has_rule])
def test_a_method_without_a_rule_of_its_own_has_no_automatic_budget(name):
    with pytest.raises(InputError, match="has no automatic budget"):
        make_spec(name, 8, 64, is_automatic=True)


def test_mistakes_are_told_in_one_line(model, image, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.png").write_text("no image")
    for arguments, words in (
        ((tmp_path / "text.png", QUESTION, NONE), "not an image in a known format"),
        ((image, "  \n", NONE), "the question is empty"),
        ((image, QUESTION, "TRIMM:8"), 'did you mean "TRIM"'),
        ((image, QUESTION, "HiPrune:8"), "HiPrune:8: "),
        ((image, QUESTION, "PyramidDrop:8"), "64 tokens are at least 22 on average"),
    ):
        with pytest.raises(InputError, match=words) as error:
            list(model.ask(*arguments))
        assert "\n" not in str(error.value)
    assert ask(model, image, "TRIM:8")[1].text == "circle"  # the model answers on


# ----------------------------------------------------------------------------------------------------------- streaming
RESULT = Result("none", "", "", None, None, None, 0.0, 0.0)


def test_closing_a_stream_stops_the_work_at_its_next_piece():
    seen, is_over = [], Event()

    def work(put):
        try:
            for number in range(10000):
                put(f"{number} ")
                seen.append(number)
                time.sleep(0.001)
        finally:
            is_over.set()

    items = stream(work)
    assert next(items) == "0 "
    items.close()
    assert is_over.wait(10) and len(seen) < 10000


def test_an_error_of_the_work_is_raised_where_the_stream_is_read():
    def work(put):
        put("begun")
        raise InputError("too long")

    items = stream(work)
    assert next(items) == "begun"
    with pytest.raises(InputError, match="too long"):
        next(items)
    assert list(stream(lambda put: RESULT)) == [RESULT]


# --------------------------------------------------------------------------------------------------------------- FLOPs
@pytest.mark.parametrize("spec", ["none", "TRIM:8", "FasterVLM:8", "CDPruner:8", "FastV:16", "SparseVLM:16", "DART:16"])
def test_flops_are_those_of_llava_efficiency_for_the_same_work(spec, llava, model, image):
    pytest.importorskip("matplotlib")
    _, result = ask(model, image, spec)
    shape = read_source(POCKET).shape
    prompt_tokens = len(make_ids(llava.model, QUESTION, 1, llava.conv_mode)) - 1
    work = Workload(1, prompt_tokens, shape.tower.text_context, result.new_tokens)
    costs = stage_costs(shape, count_reduction(parse_reduction(spec), shape), work, Precision())
    assert result.flops == total_flops(costs, work)


@pytest.mark.parametrize("spec", ["TRIM:-1", "PruMerge:-1"])
def test_an_automatic_budget_counts_with_what_this_image_left(spec):
    shape = read_source("llava-v1.5-7b").shape
    few, many = (count_answer(shape, parse_reduction(spec), count, 64, 16) for count in (50, 200))
    full = count_answer(shape, parse_reduction(None), 576, 64, 16)
    # 150 tokens more through 32 layers of 4096 by 11008: 13.5 GFLOPs each, and a little attention.
    assert few < many < full and 150 * 13e9 < many - few < 150 * 15e9


def test_flops_that_cannot_be_counted_are_said_to_be_missing(llava, image):
    model = PageModel(llava, "no/such-checkpoint")
    _, result = ask(model, image, NONE)
    assert result.flops is None
    assert result.note == (
        "FLOPs are not counted: no folder no/such-checkpoint: give one with a config.json, or one of "
        + ", ".join(PUBLISHED_MODELS)
    )


# ------------------------------------------------------------------------------------------------------------ pictures
def test_a_threshold_is_known_only_where_scores_alone_choose():
    scores = np.array([[0.1, 0.4], [0.3, 0.2]])
    assert find_threshold(scores, scores > 0.25) == 0.3
    assert find_threshold(scores, scores < 0.25) is None  # a dropped patch scores more
    assert find_threshold(scores, scores > 1) is None and find_threshold(scores, scores > 0) is None
    assert describe_threshold(Panel("", scores > 0.25, scores=scores)) == "; kept from 0.3 on (red line)"
    assert describe_threshold(Panel("", scores > 0.25)) == ""


def test_a_panel_alone_has_the_size_of_its_frame_and_a_line_at_the_threshold():
    pytest.importorskip("matplotlib")
    scores = np.array([[0.1, 0.4], [0.3, 0.2]])
    panels = [Panel("", scores > 0.25), Panel("", scores > 0.25, scores=scores), Panel("a\nb", scores > 0.25)]
    view = View(Image.new("RGB", (80, 80), (200, 200, 200)), (0, 0, 80, 80), panels)
    drawn = [draw_panel(view, panel) for panel in panels]
    assert drawn[0].width == drawn[0].height < drawn[1].width and drawn[1].height == drawn[0].height < drawn[2].height
    red = tuple(int(THRESHOLD_COLOR[place : place + 2], 16) for place in (1, 3, 5))
    assert [(np.asarray(image) == red).all(axis=2).any() for image in drawn] == [False, True, False]
