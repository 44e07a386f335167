"""FLOPs, bytes and parameters from shapes: the published figures, and what torch counts on the meta device."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from llava.efficiency import cost
from llava.efficiency.cost import Cost, Look, Precision, Reduction, Workload
from llava.efficiency.estimate import count_left
from llava.efficiency.random_model import build_random_model
from llava.efficiency.runs import count_run
from llava.efficiency.shapes import PUBLISHED_MODELS, PUBLISHED_TOWERS, read_shape, read_source
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.token_reduction import Need, parse_reducer

LARGE = "openai/clip-vit-large-patch14-336"
CASES = ["tiny", "llava-v1.5-7b", "llava-v1.5-13b"]
FAMILIES = {"llava_mistral": {"sliding_window": None}, "llava_qwen2": {}, "llava_qwen": {"tie_word_embeddings": True}}


@pytest.fixture
def case(request, configs) -> tuple[dict, dict]:
    if request.param == "tiny":
        return configs.model, configs.tower
    return PUBLISHED_MODELS[request.param], PUBLISHED_TOWERS[LARGE]


def build_random(configs, needs) -> tuple:
    return build_random_model(
        configs.model, configs.tower, needs=needs, device=torch.device("cpu"), dtype=torch.float32
    )


def count_flops(run) -> int:
    """FLOPs by torch's count, without those of the angles of positions: some versions of transformers multiply
    matrices for them, others numbers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    rotary = [counts for name, counts in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in rotary)


def build_language_model(config: dict) -> LlamaForCausalLM:
    llama = LlamaConfig(**{key: value for key, value in config.items() if not key.startswith(("mm_", "image_"))})
    with torch.device("meta"):
        return LlamaForCausalLM(llama)


def build_clip(config: dict, tower: dict) -> tuple:
    joint = {"projection_dim": tower["projection_dim"]}
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**tower["vision_config"] | joint))
        text = CLIPTextModelWithProjection(CLIPTextConfig(**tower["text_config"] | joint))
    layers = vision.vision_model.encoder.layers
    del layers[len(layers) + 1 + config["mm_vision_select_layer"] :]
    return vision, text


@pytest.mark.parametrize(("num_tokens", "teraflops"), [(640, 8.67), (186, 2.48)])
def test_prefill_of_the_7b_shape_agrees_with_the_published_figures(num_tokens, teraflops):
    language = read_source("llava-v1.5-7b").shape.language
    assert round(cost.prefill_flops(language, num_tokens) / 1e12, 2) == teraflops


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("num_logits", [None, 1])
def test_prefill_is_what_torch_counts(case, num_logits):
    model = build_language_model(case[0])
    ids = torch.zeros(1, 186, dtype=torch.long, device="meta")
    counted = count_flops(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=num_logits or 0))
    assert cost.prefill_flops(read_shape(*case, "test").language, 186, num_logits) == counted


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_a_decoding_step_is_what_torch_counts(case):
    model = build_language_model(case[0])
    ids = torch.zeros(1, 100, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    counted = count_flops(lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))
    assert cost.decode_flops(read_shape(*case, "test").language, 101) == counted


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_the_vision_tower_is_what_torch_counts(case):
    shape, (vision, _) = read_shape(*case, "test").tower, build_clip(*case)
    pixels = torch.zeros(1, 3, shape.image_size, shape.image_size, device="meta")
    assert cost.vision_flops(shape) == count_flops(lambda: vision.vision_model(pixel_values=pixels))


@pytest.mark.parametrize(
    "needs",
    [
        [],
        [Need("cls_attention", -2)],
        [Need("attention", -3), Need("keys", -3), Need("cls_attention", 1)],
        [Need("keys", -1)],
        [Need("cls", -1)],
        [Need("received", 1), Need("received", -2)],
        [Need("cls_query", -1), Need("keys", -1), Need("cls", -2)],
    ],
    ids=str,
)
def test_looking_at_attention_is_what_torch_counts(configs, needs, monkeypatch):
    (model, _), shape = build_random(configs, needs), configs.shape.tower
    tower, looks = model.get_vision_tower().to("meta"), [Look(need.layer, need.num_queries(36)) for need in needs]
    monkeypatch.setattr(tower, "own_precision", nullcontext)  # there is no autocast on the meta device
    counted = count_flops(lambda: tower.extract(torch.zeros(1, 3, 84, 84), needs))
    assert cost.vision_flops(shape, looks) == counted


def test_a_reduction_that_looks_at_attention_costs_the_vision_tower_more(configs):
    plain, looking = (count_left(parse_reducer(spec), (6, 6)) for spec in ("Random:9", "FasterVLM:9"))
    assert looking.looks == (Look(-2, 1),) and not looking.reads_text
    costs = [cost.stage_costs(configs.shape, each, Workload(), Precision()) for each in (plain, looking)]
    extra = costs[1]["vision tower"].flops - costs[0]["vision tower"].flops
    assert extra == 2 * 32 * 32 * 38 + 2 * 37 * 32
    assert costs[1].keys() == costs[0].keys()


@pytest.mark.parametrize("spec", ["DivPrune:9", "CDPruner:9"])
def test_a_reduction_that_looks_at_projected_patches_runs_the_projector_on_all_of_them(configs, spec):
    looking = count_left(parse_reducer(spec), (6, 6))
    assert looking.reads_projected and looking.reads_text == spec.startswith("CD")
    costs = cost.stage_costs(configs.shape, looking, Workload(), Precision())
    without = cost.stage_costs(configs.shape, replace(looking, reads_projected=False), Workload(), Precision())
    matrices, _ = cost.projector_parameters(configs.shape)
    extra = costs["selection"].flops - (without["selection"].flops if "selection" in without else 0)
    assert extra == 2 * 36 * matrices
    assert costs["projector"] == without["projector"]


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
@pytest.mark.parametrize("num_tokens", [9, 77])
def test_the_text_tower_is_what_torch_counts(case, num_tokens):
    shape, (_, text) = read_shape(*case, "test").tower, build_clip(*case)
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    assert cost.text_flops(shape, num_tokens) == count_flops(lambda: text(input_ids=ids))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_projector_is_what_torch_counts(configs, kind):
    config = configs.model | {"mm_projector_type": kind}
    shape = read_shape(config, configs.tower, "test")
    with torch.device("meta"):
        projector = build_vision_projector(LlamaConfig(**config))
    matrices, biases = cost.projector_parameters(shape)
    assert matrices + biases == sum(weight.numel() for weight in projector.parameters())
    assert 2 * 7 * matrices == count_flops(lambda: projector(torch.zeros(7, 32, device="meta")))


def test_the_selection_is_what_torch_counts(configs, random_parts):
    model, _ = random_parts
    model.set_token_reduction("TRIM:-1")
    image, text = ImageFeatures(torch.randn(1, 36, 32)), torch.randn(1, 24)
    counted = count_flops(lambda: model.choose_tokens([image], [""], text))
    assert cost.selection_flops(configs.shape.tower) == counted


def test_parameters_are_those_of_the_loaded_model(configs, random_parts):
    counts, (model, _) = cost.count_parameters(configs.shape), random_parts
    tower = model.get_vision_tower()
    real = {
        "vision tower": sum(weight.numel() for weight in tower.vision_tower.parameters()),
        "text tower": sum(weight.numel() for weight in tower.text_tower.parameters()),
        "projector": sum(weight.numel() for weight in model.get_model().mm_projector.parameters()),
    }
    real["language model"] = sum(weight.numel() for weight in model.parameters()) - sum(real.values())
    assert counts == real


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_language_models_are_what_torch_counts(configs, kind):
    config = configs.model | {"model_type": kind} | FAMILIES[kind]
    shape = read_shape(config, configs.tower, "test")
    model, _ = build_random_model(config, configs.tower, device=torch.device("cpu"), dtype=torch.float32)
    assert type(model).__name__ == {"llava_mistral": "LlavaMistralForCausalLM"}.get(kind, "LlavaQwen2ForCausalLM")
    parts = (model.get_vision_tower(), model.get_model().mm_projector)
    others = sum(weight.numel() for part in parts for weight in part.parameters())
    counts = cost.count_parameters(shape)
    assert counts["language model"] == sum(weight.numel() for weight in model.parameters()) - others
    model.to("meta")
    embeds = torch.zeros(1, 70, 48, device="meta")
    with torch.no_grad():
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    counted = count_flops(lambda: model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))
    assert cost.prefill_flops(shape.language, 70, 1) == counted
    counted = count_flops(lambda: model(inputs_embeds=embeds[:, :1], past_key_values=cache, use_cache=True))
    assert cost.decode_flops(shape.language, 71) == counted


@pytest.mark.parametrize("name", list(PUBLISHED_MODELS))
def test_parameters_of_the_published_language_models(name):
    model = build_language_model(PUBLISHED_MODELS[name])
    counts = cost.count_parameters(read_source(name).shape)
    assert counts["language model"] == sum(weight.numel() for weight in model.parameters())


def test_cache_is_two_numbers_per_layer_and_key_width(configs):
    model = build_language_model(configs.model)
    ids = torch.zeros(1, 11, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    real = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cost.cache_bytes(configs.shape.language, 11, 4) == 4 * real


def test_a_half_gigabyte_of_cache_holds_1024_positions_of_the_7b_shape():
    assert cost.cache_bytes(read_source("llava-v1.5-7b").shape.language, 1024, 2) == 2**29


def test_every_stage_but_the_weights_grows_with_the_batch(configs):
    left, precision = Reduction(7, 8, reads_text=True), Precision()
    one, four = (cost.stage_costs(configs.shape, left, Workload(size), precision) for size in (1, 4))
    assert list(one) == ["vision tower", "text tower", "selection", "projector", "prefill", "decode"]
    for name in one:
        assert four[name].flops == 4 * one[name].flops
        assert one[name].bytes < four[name].bytes < 4 * one[name].bytes


def test_without_reduction_there_is_no_text_tower_and_no_selection(configs):
    costs = cost.stage_costs(configs.shape, Reduction(36, 36, reads_text=False), Workload(), Precision())
    assert "text tower" not in costs and "selection" not in costs
    assert "text tower" not in cost.weight_bytes(configs.shape, Precision(), with_text=False)


def test_intensity_of_nothing_is_zero():
    assert Cost(0, 0).intensity == 0


@pytest.mark.parametrize("spec", ["FastV:9,layer=1", "PyramidDrop:0.5", "TRIM:12|SparseVLM:0.3"])
def test_where_tokens_leave_between_layers_each_layer_is_counted_with_its_own(configs, spec):
    left = count_run(spec, SimpleNamespace(shape=configs.shape), None).reduction
    work, language = Workload(prompt_tokens=20, new_tokens=1), configs.shape.language
    lengths = cost.prompt_lengths(language, left, work)
    assert len(lengths) == language.layers and lengths[0] == 20 + left.num_tokens and lengths[-1] < lengths[0]
    assert left.mean_tokens(language.layers) == pytest.approx(sum(lengths) / language.layers - 20)
    layers = [cost.prefill_flops(replace(language, layers=1), length, 0) for length in lengths]
    assert cost.prefill_flops(language, lengths, 0) == sum(layers)
    whole = cost.stage_costs(configs.shape, replace(left, drops=()), work, Precision())
    parts = cost.stage_costs(configs.shape, left, work, Precision())
    for stage in ("prefill", "decode"):
        assert parts[stage].flops < whole[stage].flops and parts[stage].bytes < whole[stage].bytes


def test_fastv_with_64_tokens_is_96_on_average_over_32_layers():
    left = count_run("FastV:64", read_source("llava-v1.5-7b"), None).reduction
    assert left.num_tokens == 576 and left.mean_tokens(32) == 96


SIGLIP = {
    "model_type": "siglip",
    "vision_config": {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"image_size": 90, "patch_size": 14},
    "text_config": {"hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 300, "max_position_embeddings": 16, "projection_size": 32},
}


@pytest.mark.parametrize("specs", [[], ["HiPrune:9,object_layer=2,layer=-1"]], ids=str)
def test_a_siglip_is_what_torch_counts_and_has_the_parameters_that_are_loaded(configs, specs, monkeypatch):
    shape = read_shape(configs.model, SIGLIP, "test")
    needs = [need for spec in specs for need in parse_reducer(spec).needs]
    model, _ = build_random_model(configs.model, SIGLIP, needs=needs, device=torch.device("cpu"), dtype=torch.float32)
    tower = model.get_vision_tower()
    counts = cost.count_parameters(shape)
    if not specs:
        assert counts["vision tower"] == sum(weight.numel() for weight in tower.vision_tower.parameters())
        assert counts["text tower"] == sum(weight.numel() for weight in tower.text_tower.parameters())
    model.set_token_reduction("TRIM:-1")
    image, text = ImageFeatures(torch.randn(1, 36, 32)), torch.randn(1, 32)
    counted = count_flops(lambda: model.choose_tokens([image], [""], text))
    assert cost.selection_flops(shape.tower) == counted
    looks = [Look(need.layer, need.num_queries(36)) for need in needs]
    tower.to("meta")
    monkeypatch.setattr(tower, "own_precision", nullcontext)  # there is no autocast on the meta device
    counted = count_flops(lambda: tower.extract(torch.zeros(1, 3, 90, 90), needs))
    assert cost.vision_flops(shape.tower, looks) == counted
    ids = torch.zeros(1, 16, dtype=torch.long, device="meta")
    assert cost.text_flops(shape.tower, 16) == count_flops(lambda: tower.text_tower.model(input_ids=ids))


def test_the_published_siglips_have_their_patches_and_parameters():
    config = PUBLISHED_MODELS["llava-v1.5-7b"] | {"mm_vision_select_layer": -1}
    tower = PUBLISHED_TOWERS["google/siglip-so400m-patch14-384"]
    shape = read_shape(config, tower, "test")
    with torch.device("meta"):
        real = SiglipModel(SiglipConfig(vision_config=tower["vision_config"], text_config=tower["text_config"]))
    assert shape.tower.num_patches == shape.tower.num_rows == 729
    counts = cost.count_parameters(shape)
    assert counts["vision tower"] == sum(weight.numel() for weight in real.vision_model.parameters())
    assert counts["text tower"] == sum(weight.numel() for weight in real.text_model.parameters())
