"""What the model does not do: no layer, row, position or query more than an answer needs."""

import pytest
import torch

from llava.clock import StageClock
from llava.efficiency.stages import Runner, make_batch
from llava.model.multimodal_encoder.tower import ImageFeatures


@pytest.fixture
def shapes_seen(random_parts):
    """Input shapes of each call, by part, while the model works."""
    model, image_processor = random_parts
    seen: dict[str, list] = {"lm_head": [], "projector": [], "text": []}
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen["lm_head"].append(tuple(inputs[0].shape)))
    model.get_model().mm_projector.register_forward_pre_hook(
        lambda module, inputs: seen["projector"].append(tuple(inputs[0].shape))
    )
    model.get_vision_tower().text_tower.register_forward_pre_hook(
        lambda module, inputs: seen["text"].append(list(inputs[0]))
    )
    model.set_token_reduction("TRIM:0.25")
    batch = make_batch(4, 12, 3, vocab_size=120, image_size=(60, 40), query="a bus?")
    return model, Runner(model, image_processor), batch, seen


def test_generate_makes_logits_for_the_last_position_alone(shapes_seen):
    _, runner, batch, seen = shapes_seen
    runner.answer(batch)
    assert seen["lm_head"] == [(4, 1, 48)] * 3


def test_the_projector_runs_once_on_the_tokens_that_are_left(shapes_seen):
    _, runner, batch, seen = shapes_seen
    runner.answer(batch)
    assert seen["projector"] == [(4 * 10, 32)]


def test_equal_queries_are_embedded_once(shapes_seen):
    _, runner, batch, seen = shapes_seen
    runner.answer(batch)
    assert seen["text"] == [["a bus?"]]


def test_the_tower_holds_the_layers_up_to_the_selected_one(shapes_seen):
    model = shapes_seen[0]
    assert len(model.get_vision_tower().vision_tower.vision_model.encoder.layers) == 3


def test_queries_embedded_before_give_the_same_tokens(shapes_seen):
    model, _, _, seen = shapes_seen
    images, texts = [ImageFeatures(torch.randn(crops, 36, 32)) for crops in (1, 2)], ["a bus", "a dog"]
    fresh = model.make_image_tokens(images, texts)
    embedded = model.embed_queries(texts)
    seen["text"].clear()
    again = model.make_image_tokens(images, texts, text_embeds=embedded)
    assert seen["text"] == []
    assert all(torch.equal(one.features, two.features) for one, two in zip(fresh, again, strict=True))


def test_reducers_without_a_query_embed_nothing(shapes_seen):
    model = shapes_seen[0]
    model.set_token_reduction("Random:0.2")
    assert model.embed_queries(["a bus"]) is None


def test_lengths_come_back_on_the_host(shapes_seen):
    model = shapes_seen[0]
    (reduced,) = model.choose_tokens([ImageFeatures(torch.randn(1, 36, 32))], ["a bus"])
    assert reduced.lengths.device.type == "cpu"


def test_a_clock_adds_up_repeated_stages():
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("x"):
            pass
    assert list(clock.seconds) == ["x"] and clock.seconds["x"] > 0
