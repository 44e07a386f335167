"""What reducers look at besides the patches: from the tower, per crop, to the reducer, by name and layer."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.token_reduction import TEXT, Need, ReducedTokens, TokenReducer, parse_reduction
from llava.model.token_reduction.base import PROJECTED, gather_kept

LAYERS = [-4, -2, -1, 1, 3]
CHECKPOINT = "llava-v1.5-tiny84-TRIM"
TOWERS = {"hf": "hf", "open_clip": "open_clip:local-dir:oc"}


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 84, 84, generator=torch.Generator().manual_seed(1))


def load(clips: Path, kind: str, needs=(), **settings):
    if kind == "open_clip":
        pytest.importorskip("open_clip")
    tower = build_named_tower(
        str(clips / "hf") if kind == "hf" else TOWERS[kind], folder=clips, needs=needs, **settings
    )
    tower.load_model()
    return tower


@pytest.fixture(scope="module")
def eager(clips):
    """What transformers tells of the same CLIP with eager attention, by kind of need and layer."""
    model = CLIPVisionModelWithProjection.from_pretrained(clips / "hf", attn_implementation="eager").eval()
    projected = {"q_proj": [], "k_proj": []}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(lambda *call, found=found: found.append(call[-1]))
        for layer in model.vision_model.encoder.layers
        for name, found in projected.items()
    ]
    with torch.no_grad():
        found = model(pixel_values=pixels(), output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    rows = {name: [each.unflatten(-1, (4, 16)).transpose(1, 2) for each in own] for name, own in projected.items()}
    return {
        "attention": found.attentions,
        "cls_attention": [each[:, :, 0, 1:] for each in found.attentions],
        "received": [each.mean(dim=(1, 2))[:, 1:] for each in found.attentions],
        "keys": rows["k_proj"],
        "cls_query": [each[:, :, 0] for each in rows["q_proj"]],
        "cls": [each[:, 0] for each in found.hidden_states[1:]],
    }


def place(layer: int) -> int:
    """Index, from 0, of the layer whose output is hidden state `layer` of 4 layers."""
    return layer - 1 if layer > 0 else 4 + layer


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_intermediates_equal_those_of_eager_attention(clips, eager, kind, layer):
    needs = [Need(kind, layer) for kind in Need.KINDS_OF_A_LAYER]
    found = load(clips, kind, needs).extract(pixels(), needs).intermediates
    for need in needs:
        assert found[need].shape == (3, *need.shape(36, heads=4, width=64 if need.kind == "cls" else 16))
        atol = 1e-6 if "attention" in need.kind else 1e-5
        torch.testing.assert_close(found[need], eager[need.kind][place(layer)], atol=atol, rtol=1e-5)
    assert (found[Need("cls_attention", layer)].sum(dim=-1) < 1).all()


@pytest.mark.parametrize("kind", TOWERS)
def test_the_patches_do_not_depend_on_what_else_is_asked_for(clips, kind):
    needs = {Need("keys", -1), Need("cls_attention", -2), Need("attention", 1)}
    plain, looking = load(clips, kind), load(clips, kind, needs)
    assert torch.equal(plain.encode(pixels()), looking.extract(pixels(), needs).patches)
    assert len(plain.layers) == 3 and len(looking.layers) == 4


@pytest.mark.parametrize("kind", TOWERS)
def test_nothing_is_computed_that_is_not_asked_for(clips, kind, monkeypatch):
    tower = load(clips, kind, {Need("keys", -1)})
    runs = []
    for number, layer in enumerate(tower.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
    monkeypatch.setattr(tower, "queries_and_keys", lambda *_: pytest.fail("looked at"))
    assert tower.extract(pixels()).intermediates == {}
    assert runs == [1, 2, 3]


def test_the_tower_stays_on_its_fast_attention(clips, monkeypatch):
    tower = load(clips, "hf")
    sizes = []
    attend = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: sizes.append(1) or attend(*a, **k)
    )
    tower.extract(pixels(), {Need("cls_attention", -2)})
    assert len(sizes) == 3


def test_a_batch_gives_what_single_images_give(clips):
    needs = {Need("cls_attention", -2), Need("keys", -2)}
    tower = load(clips, "hf", needs)
    together = tower.extract(pixels(), needs).split([1, 1, 1])
    for image, alone in zip(together, (tower.extract(each[None], needs) for each in pixels()), strict=True):
        for need in needs:
            torch.testing.assert_close(image.intermediates[need], alone.intermediates[need], atol=1e-6, rtol=1e-5)


def test_features_can_be_cut_and_put_together_again():
    need, other = Need("keys", -1), Need("attention", -1)
    whole = ImageFeatures(torch.randn(6, 4, 2), {need: torch.randn(6, 3, 5, 2)})
    parts = whole.split([1, 3, 2])
    assert [part.num_crops for part in parts] == [1, 3, 2]
    again = ImageFeatures.concatenate(parts)
    assert torch.equal(again.patches, whole.patches)
    assert torch.equal(again.intermediates[need], whole.intermediates[need])
    richer = ImageFeatures(torch.randn(1, 4, 2), {need: torch.randn(1, 3, 5, 2), other: torch.randn(1, 3, 5, 5)})
    assert list(ImageFeatures.concatenate([whole, richer]).intermediates) == [need]


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layer", [9, -5])
def test_a_layer_that_does_not_exist_is_refused(clips, kind, layer):
    tower = load(clips, kind)
    with pytest.raises(InputError, match="has 4 layers"):
        tower.provide({Need("cls_attention", layer)})
    assert tower.needs == frozenset()
    with pytest.raises(InputError, match="has 4 layers"):
        load(clips, kind, {Need("cls_attention", layer)})


def test_needs_are_values_with_a_name():
    assert str(Need("cls_attention", -2)) == "cls_attention[-2]" and str(TEXT) == "text"
    assert Need("keys", -1) == Need("keys", -1) and len({Need("keys", -1), Need("keys", -1), Need("keys", -2)}) == 2
    for kind, layer in (("keys", None), ("text", -2), ("values", -1)):
        with pytest.raises(ValueError, match="a need is"):
            Need(kind, layer)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_reads_what_is_missing_when_the_reduction_changes(clips, kind):
    tower = load(clips, kind)
    before = tower.encode(pixels())
    need = Need("cls_attention", -1)
    with pytest.raises(InputError, match="not loaded"):
        tower.extract(pixels(), {need})
    tower.provide({need, TEXT})
    assert len(tower.layers) == 4 and not any(weight.requires_grad for weight in tower.parameters())
    features = tower.extract(pixels(), {need})
    assert torch.equal(features.patches, before)
    fresh = load(clips, kind, {need}).extract(pixels(), {need})
    assert torch.equal(features.intermediates[need], fresh.intermediates[need])
    assert tower.embed_text(["a bus"]).shape == (1, 24)


# Through the whole model.
@pytest.fixture(scope="module")
def loaded(golden):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32", reduce="FasterVLM:9")[1]


@pytest.fixture
def model(loaded):
    loaded.set_token_reduction("FasterVLM:9")
    return loaded


def expected_kept(model, image: torch.Tensor, layer: int = -2, count: int = 9) -> list[int]:
    """The top patches of eager attention, from the tower's own checkpoint."""
    name = model.get_vision_tower().name
    clip = CLIPVisionModelWithProjection.from_pretrained(name, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = clip(pixel_values=image, output_attentions=True).attentions
    return maps[layer][0, :, 0, 1:].mean(dim=0).topk(count).indices.sort().values.tolist()


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("layer", [-2, -1])
def test_fastervlm_keeps_the_patches_of_the_highest_cls_attention_and_answers(model, layer):
    model.set_token_reduction(f"FasterVLM:9,layer={layer}")
    ids = torch.tensor([[1, 5, -200, 7]])
    (tokens,) = model.encode_images(pixels(1), ["not read"])
    assert tokens.num_tokens == 9 and tokens.num_patches == 36
    assert tokens.kept[0].nonzero().flatten().tolist() == expected_kept(model, pixels(1), layer)
    answer = model.generate(ids, images=pixels(1), max_new_tokens=4, do_sample=False)
    assert answer.tolist() == model.generate(ids, image_tokens=[tokens], max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.usefixtures("checkpoints")
def test_fastervlm_loads_no_text_tower(model):
    assert not hasattr(load_pretrained_model(CHECKPOINT, reduce="FasterVLM:9")[1].get_vision_tower(), "text_tower")


def test_each_crop_keeps_its_own_patches(model):
    crops = pixels(5)
    images = [crops[:2], crops[2:]]
    tokens = model.encode_images(images, ["", ""])
    singles = [model.encode_images(crop[None], [""])[0] for crop in crops]
    assert [each.num_tokens for each in tokens] == [18, 27]
    assert torch.equal(torch.cat([each.kept for each in tokens]), torch.cat([each.kept for each in singles]))


@pytest.mark.usefixtures("checkpoints")
def test_features_of_another_reduction_are_refused_in_one_line(model):
    features = model.encode_patches(pixels(2))
    model.set_token_reduction("FasterVLM:9,layer=2")
    with pytest.raises(InputError, match=r"hold no cls_attention\[2\]"):
        model.make_image_tokens(features, ["", ""])
    model.set_token_reduction("TRIM:9")
    assert [each.num_tokens for each in model.make_image_tokens(features, ["a bus", "a dog"])] == [10, 10]


def test_a_reduction_that_the_tower_cannot_serve_leaves_the_model_as_it_was(model):
    with pytest.raises(InputError, match="has 4 layers"):
        model.set_token_reduction("FasterVLM:9,layer=-9")
    assert model.token_reducer.spec() == "FasterVLM:9"
    assert model.encode_images(pixels(1), [""])[0].num_tokens == 9


class FirstOfProjected(TokenReducer):
    """Keep the patch whose first projected number is largest."""

    spec_name = "FirstOfProjected"
    needs = frozenset({PROJECTED})

    def __call__(self, tokens):
        projected = tokens.require(PROJECTED)
        kept = projected[..., 0] == projected[..., 0].max(dim=1, keepdim=True).values
        return ReducedTokens(*gather_kept(tokens.patches, kept), kept)


def test_projected_patches_are_what_the_language_model_would_read(model):
    model.set_token_reduction(None)
    (everything,) = model.encode_images(pixels(1), [""])
    model.token_reducer = FirstOfProjected()
    (tokens,) = model.encode_images(pixels(1), [""])
    best = int(everything.features[:, 0].argmax())
    assert tokens.kept[0].nonzero().flatten().tolist() == [best]
    torch.testing.assert_close(tokens.features[0], everything.features[best])


@pytest.mark.usefixtures("checkpoints")
def test_a_tower_without_a_text_half_serves_fastervlm(tmp_path, checkpoints, monkeypatch):
    shutil.copytree(checkpoints / CHECKPOINT, tmp_path / CHECKPOINT)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    weights = tmp_path / "openai" / "clip-vit-tiny-patch14-84" / "pytorch_model.bin"
    kept = {key: value for key, value in torch.load(weights, weights_only=True).items() if not key.startswith("text_")}
    torch.save(kept, weights)
    monkeypatch.chdir(tmp_path)
    model = load_pretrained_model(CHECKPOINT, device="cpu", reduce="FasterVLM:9")[1]
    assert model.encode_images(pixels(1), [""])[0].num_tokens == 9
    with pytest.raises(InputError):
        model.set_token_reduction("TRIM:-1")
    assert model.token_reducer.spec() == "FasterVLM:9"


def test_a_layer_that_is_not_there_is_named_with_the_option_that_chose_it(clips):
    tower = load(clips, "hf")
    with pytest.raises(InputError, match=r"received\[9\] does not exist: .* 4 layers; give object_layer= of the token"):
        tower.provide(parse_reduction("HiPrune:9").before.needs)
