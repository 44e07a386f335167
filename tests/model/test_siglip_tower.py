"""SigLIP as vision tower: transformers' and open_clip's numbers, no CLS, TRIM in its joint space, whole models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import SiglipModel, SiglipVisionModel

from llava import calibrate
from llava.assistant import Llava
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.multimodal_encoder.builder import build_named_tower, load_tower
from llava.model.multimodal_encoder.loading import is_siglip
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, TEXT, Need, methods_without_cls
from tests.siglips import CONTEXT, NUM_LAYERS, NUM_PATCHES, SIDE, TEXTS, WIDTH, make_model, write_llava

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {"hf": "hf", "open_clip": "open_clip:local-dir:oc"}
QUESTION = "What shape is red?"
SERVED = ("TRIM", "TextSim", "TextSim+", "DivPrune", "CDPruner", "HiPrune", "Random", "Pool")
OPTIONS = {"HiPrune": ",object_layer=2", "FastV": ",layer=1", "DART": ",layer=1,pivot_image=2,pivot_text=2"}


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def load(siglips: Path, kind: str, needs=(), **settings):
    if kind == "open_clip":
        pytest.importorskip("open_clip")
    name = str(siglips / "hf") if kind == "hf" else KINDS[kind]
    tower = build_named_tower(name, folder=siglips, needs=needs, **settings)
    tower.load_model()
    return tower


@pytest.fixture(scope="module")
def reference(siglips) -> SiglipModel:
    """The same SigLIP in transformers' own class."""
    return SiglipModel.from_pretrained(siglips / "hf").eval()


# ------------------------------------------------------------------------------------------------------ the numbers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, -1, 0, 1, -5])
def test_patches_are_the_hidden_states_of_transformers_without_a_cls_row_to_drop(siglips, reference, kind, layer):
    with torch.no_grad():
        states = reference.vision_model(pixels(), output_hidden_states=True).hidden_states
    patches = load(siglips, kind, select_layer=layer).encode(pixels())
    assert patches.shape == (2, NUM_PATCHES, WIDTH)
    torch.testing.assert_close(patches, states[layer], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_text_embeddings_are_those_of_transformers_for_padded_texts_without_a_mask(siglips, reference, kind):
    tower = load(siglips, kind, {TEXT})
    tokenizer = load(siglips, "hf", {TEXT}).text_tower.tokenizer
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
    assert ids.shape == (len(TEXTS), CONTEXT) and (ids[:3] == tokenizer.pad_token_id).any(dim=1).all()
    with torch.no_grad():
        expected = reference.get_text_features(ids).pooler_output
        masked = reference.get_text_features(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).pooler_output
    torch.testing.assert_close(tower.embed_text(TEXTS), expected, **TOLERANCE)
    assert (masked[0] - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_lies_where_the_head_puts_an_image_of_this_one_patch(siglips, reference, kind):
    patches = load(siglips, kind).encode(pixels())
    vision = reference.vision_model
    with torch.no_grad():
        normed = vision.post_layernorm(patches)
        alone = torch.stack([vision.head(normed[:, place : place + 1]) for place in range(NUM_PATCHES)], dim=1)
    torch.testing.assert_close(load(siglips, kind).project_to_joint(patches), alone, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_embedding_is_that_of_its_patches_where_they_are_all_the_same(siglips, reference, kind):
    tower = load(siglips, kind, select_layer=-1)
    row = tower.encode(pixels())[:, :1]
    with torch.no_grad():
        whole = reference.vision_model.head(reference.vision_model.post_layernorm(row.expand(-1, NUM_PATCHES, -1)))
    torch.testing.assert_close(tower.project_to_joint(row)[:, 0], whole, **TOLERANCE)


def test_both_libraries_embed_an_image_alike(siglips, reference):
    pytest.importorskip("open_clip")
    from llava.model.multimodal_encoder.open_clip_source import parse_source

    with torch.no_grad():
        theirs = parse_source("local-dir:oc", siglips).load().encode_image(pixels())
        torch.testing.assert_close(theirs, reference.get_image_features(pixels()).pooler_output, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, 1])
def test_received_attention_is_the_mean_of_eager_attention_over_heads_and_all_patches(siglips, kind, layer):
    model = SiglipVisionModel.from_pretrained(siglips / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(pixels(), output_attentions=True).attentions
    need = Need("received", layer)
    found = load(siglips, kind, {need}).extract(pixels(), {need}).intermediates[need]
    expected = maps[layer - 1 if layer > 0 else NUM_LAYERS + layer].mean(dim=(1, 2))
    assert found.shape == (2, *need.shape(NUM_PATCHES))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_float32_whatever_the_tower_runs_in(siglips, kind):
    if kind != "hf":
        pytest.importorskip("open_clip")
    name = str(siglips / "hf") if kind == "hf" else f"open_clip:local-dir:{siglips / 'oc'}"
    tower = load_tower(name, needs={TEXT}, dtype=torch.bfloat16)
    patches = tower.encode(pixels())
    assert patches.dtype == torch.bfloat16
    assert tower.project_to_joint(patches).dtype == tower.embed_text(TEXTS).dtype == torch.float32


def test_text_is_lower_case_unless_a_tokenizer_says_otherwise(siglips):
    """SigLIP's own tokenizer lowers text itself; Gemma's, which SigLIP 2 has, leaves it to the model."""
    read: list[str] = []

    class Tokenizer:
        def __call__(self, texts: list[str], **options: object) -> SimpleNamespace:
            read.extend(texts)
            return SimpleNamespace(input_ids=torch.ones(len(texts), CONTEXT, dtype=torch.long))

    tower = load(siglips, "hf", {TEXT})
    for settings in ({}, {"do_lower_case": True}, {"do_lower_case": False}):
        tower.text_tower.tokenizer = Tokenizer()
        vars(tower.text_tower.tokenizer).update(settings)
        tower.embed_text(["Is the SQUARE red?"])
    assert read == ["is the square red?", "is the square red?", "Is the SQUARE red?"]


def test_a_siglip_2_reads_texts_with_gemmas_tokenizer_in_lower_case_and_ends_them(siglips, tmp_path):
    folder = shutil.copytree(siglips / "hf", tmp_path / "second")
    (folder / "spiece.model").unlink()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator([QUESTION.lower()] * 5, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {f"{name[1:-1]}_token": name for name in special} | {"tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tower = load_tower(str(folder), needs={TEXT})
    assert type(tower.text_tower.tokenizer).__name__ == "GemmaTokenizer"
    read = []
    tower.text_tower.model.register_forward_pre_hook(
        lambda _, inputs, options: read.append(options["input_ids"][0].tolist()), with_kwargs=True
    )
    tower.embed_text(["What SHAPE is red?"])
    tower.embed_text(["what shape is red?"])
    assert read[0] == read[1] and 3 not in read[0]
    assert len(read[0]) == CONTEXT and read[0][read[0].index(0) - 1] == 1 and set(read[0][read[0].index(0) :]) == {0}


# ---------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_values_are_scaled_to_a_square_and_centred_at_half(siglips, kind):
    processor = load(siglips, kind).image_processor
    drawn = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    image = Image.fromarray(drawn)
    squashed = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = torch.from_numpy((squashed - 0.5) / 0.5).permute(2, 0, 1)
    torch.testing.assert_close(process_images([image], processor, LlavaConfig())[0], expected, **TOLERANCE)
    padded = process_images([image], processor, LlavaConfig(image_aspect_ratio="pad"))[0]
    assert padded.shape == (3, SIDE, SIDE)
    assert (padded[:, :20] - (127 / 255 - 0.5) / 0.5).abs().max() < 1e-6  # bars of the mean colour


@pytest.mark.parametrize("ratio", ["pad", None])
def test_an_image_that_is_scaled_in_parts_has_the_pixels_of_one_that_is_not(siglips, ratio, monkeypatch):
    processor = load(siglips, "hf").image_processor
    image = Image.effect_noise((900, 300), 60).convert("RGB")
    settings = LlavaConfig(image_aspect_ratio=ratio)
    expected = process_images([image], processor, settings)
    monkeypatch.setattr("llava.mm_utils.DIRECT_PIXELS", 2000)
    torch.testing.assert_close(process_images([image], processor, settings), expected, atol=0.02, rtol=0)


def test_anyres_cuts_crops_of_the_size_that_the_tower_reads(siglips):
    settings = LlavaConfig(image_aspect_ratio="anyres", image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE]])
    values = process_images([Image.new("RGB", (190, 80))], load(siglips, "hf").image_processor, settings)
    assert values.shape == (1, 3, 3, SIDE, SIDE)


# ------------------------------------------------------------------------------------------------- what needs a CLS
def test_the_methods_that_serve_a_tower_without_cls_are_these():
    assert tuple(methods_without_cls()) == SERVED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(REDUCERS) - set(SERVED)))
def test_a_method_that_reads_cls_is_refused_in_one_line_that_names_others(siglips, kind, name):
    needs = REDUCERS[name]().needs
    with pytest.raises(InputError, match=r"is a SigLIP, which has no CLS: use TRIM, .*HiPrune.*\(FastV") as caught:
        load(siglips, kind, needs)
    assert "\n" not in str(caught.value)
    tower = load(siglips, kind)
    with pytest.raises(InputError, match="has no CLS"):
        tower.provide(needs)
    assert tower.needs == frozenset()


def test_a_cls_row_among_the_patches_is_refused(siglips):
    with pytest.raises(InputError, match=r"mm_vision_select_feature cls_patch: .* has no CLS; use patch"):
        load(siglips, "hf", select_feature="cls_patch")


# ------------------------------------------------------------------------------------------------------ whole models
@pytest.fixture(scope="module")
def checkpoint(siglips) -> Path:
    write_llava(siglips / "llava", "../hf", mm_vision_token_reduce_func="TRIM:-1")
    if (siglips / "oc").is_dir():
        write_llava(siglips / "llava-oc", "open_clip:local-dir:../oc", mm_vision_token_reduce_func="TRIM:-1")
    return siglips / "llava"


def ask(model, tokenizer, processor) -> tuple[torch.Tensor, list]:
    """Logits of a prompt with an image, and what is kept of it."""
    drawn = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    values = process_images([Image.fromarray(drawn).resize((120, 80))], processor, model.config)
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        logits = model(ids, images=values, texts=[QUESTION]).logits
    return logits, model.encode_images(values, [QUESTION])


@pytest.mark.parametrize("layout", ["llava", "llava-oc"])
@pytest.mark.parametrize("method", [*SERVED, *LAYER_REDUCERS])
def test_every_method_that_it_serves_answers_and_keeps_what_it_is_told(checkpoint, layout, method):
    if layout == "llava-oc":
        pytest.importorskip("open_clip")
    spec = f"{method}:0.25{OPTIONS.get(method, '')}"
    assistant = Llava.from_pretrained(str(checkpoint.parent / layout), reduce=spec, device="cpu")
    answer = assistant.ask(Image.new("RGB", (120, 80), "red"), QUESTION, max_new_tokens=3)
    assert answer.num_patches == NUM_PATCHES
    logits, (tokens,) = ask(assistant.model, assistant.tokenizer, assistant.image_processor)
    assert logits.isfinite().all()
    if method in SERVED:
        assert tokens.num_patches == NUM_PATCHES
        assert tokens.num_tokens in ((12, 13) if method != "Pool" else (9, 16))


def test_trim_keeps_the_same_patches_with_either_library(checkpoint):
    pytest.importorskip("open_clip")
    found = []
    for layout in ("llava", "llava-oc"):
        tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint.parent / layout), device="cpu")
        found.append(ask(model, tokenizer, processor))
    (theirs, (one,)), (ours, (other,)) = found
    assert torch.equal(one.kept, other.kept) and 0 < one.kept.sum() < NUM_PATCHES
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_asks_for_cls_attention_is_refused_before_weights_are_read(siglips, checkpoint):
    for spec in ("FasterVLM:9", "VisionZip"):
        with pytest.raises(InputError, match="which has no CLS"):
            load_pretrained_model(str(checkpoint), reduce=spec, device="cpu")


def test_a_model_is_switched_between_methods_and_stays_as_it_was_where_one_is_refused(checkpoint):
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), reduce="Random:9", device="cpu")
    assert not hasattr(model.get_vision_tower(), "text_tower")
    with pytest.raises(InputError, match="which has no CLS"):
        model.set_token_reduction("FasterVLM:9")
    assert model.token_reducer.spec() == "Random:9"
    model.set_token_reduction("TRIM:9")
    assert ask(model, tokenizer, processor)[1][0].num_tokens == 10


def test_calibrate_tells_which_sign_finds_what_was_planted(siglips, tmp_path):
    tower = load(siglips, "hf", {TEXT})
    rows = []
    for index in range(4):
        image = Image.effect_noise((60, 60), 60).convert("RGB")
        image.paste((255, 0, 0), (15 * index, 0, 15 * index + 15, 15))
        image.save(tmp_path / f"{index}.png")
        rows.append(calibrate.LabelledImage(tmp_path / f"{index}.png", "red", ((15 * index, 0, 15 * index + 15, 15),)))
    images, inside = calibrate.encode_images(tower, rows)
    objects = torch.stack(
        [joint[mask].mean(dim=0) - joint[~mask].mean(dim=0) for joint, mask in zip(images.joint, inside, strict=True)]
    )
    for sign, option in ((-1, "TRIM:-1"), (1, "TRIM:-1,similarity=direct")):
        tower.text_features = lambda texts, sign=sign: sign * objects.mean(dim=0).expand(len(texts), -1)
        figures = calibrate.calibrate(tower, rows)
        assert [figure.option for figure in figures] == [*calibrate.OPTIONS, *calibrate.COSINE_OPTIONS]
        assert max(figures[:2], key=lambda figure: figure.auc).option == option
        assert max(figures[2:], key=lambda figure: figure.auc).option == f"{option},metric=cosine"


# ------------------------------------------------------------------------------------------------- mistakes in files
def test_a_siglip_is_told_by_its_config_and_on_the_hub_by_its_name(siglips, clips, tmp_path):
    assert is_siglip(str(siglips / "hf")) and not is_siglip(str(clips / "hf"))
    assert is_siglip("hf", siglips)
    assert is_siglip("google/siglip-so400m-patch14-384") and not is_siglip("openai/clip-vit-large-patch14-336")
    shutil.copytree(clips / "hf", tmp_path / "siglip")
    assert not is_siglip(str(tmp_path / "siglip"))


def edit(file: Path, **values: object) -> None:
    """Set keys of a JSON file; `a__b` is a key inside an object."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        inner, _, name = key.rpartition("__")
        (content[inner] if inner else content)[name] = value
    file.write_text(json.dumps(content))


FAULTS = [
    ("preprocessor_config.json", {"size": {"height": 84, "width": 84}}, '"height": 100, "width": 100'),
    ("preprocessor_config.json", {"size": {"shortest_edge": SIDE}}, "the vision tower reads 100 x 100 pixels"),
    ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is true; expected false"),
    ("preprocessor_config.json", {"do_resize": False}, "do_resize is false; expected true"),
    ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, 'expected "SiglipImageProcessor"'),
    ("config.json", {"text_config__projection_size": 32}, "text_config.projection_size is 32; expected 64"),
    ("config.json", {"vision_config__patch_size": 0}, "vision_config.patch_size is 0; expected a whole number"),
    ("config.json", {"vision_config__vision_use_head": "no"}, 'vision_use_head is "no"; expected true or false'),
    ("config.json", {"text_config__vocab_size": 20}, "has shape [90, 64], the config asks for [20, 64]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "words"), FAULTS, ids=str)
def test_a_fault_in_its_files_is_told_in_one_line(siglips, tmp_path, name, values, words):
    folder = shutil.copytree(siglips / "hf", tmp_path / "faulty")
    edit(folder / name, **values)
    with pytest.raises(InputError) as caught:
        load_tower(str(folder), needs={TEXT})
    assert words in str(caught.value) and "\n" not in str(caught.value)


OPEN_CLIP_FAULTS = [
    ({"vision_cfg__timm_model_name": "vit_base_siglip"}, 'is "vit_base_siglip"; expected a model of timm'),
    ({"vision_cfg__timm_model_name": "vit_base_patch16_224"}, "vit_base_patch16_224 is not SigLIP's ViT"),
    ({"vision_cfg__timm_model_name": "resnet18"}, "timm refuses resnet18 with attention pooling"),
    ({"vision_cfg__timm_proj": "linear"}, "has a projection behind the pooling: this tower needs"),
    ({"vision_cfg__image_size": 84}, "vision_cfg.image_size is 84; expected 100, that of its timm model"),
    ({"embed_dim": 32}, "embed_dim is 32; expected 64, the width of its timm model"),
    ({"text_cfg__hf_tokenizer_name": None}, "hf_tokenizer_name is null; expected the name of SigLIP's tokenizer"),
    ({"text_cfg__no_causal_mask": False, "text_cfg__pool_type": "argmax"}, "a text tower read at argmax"),
    ({"text_cfg__vocab_size": 20}, "token_embedding.weight is [90, 64], the model has [20, 64]"),
    ({"text_cfg__layers": 1}, "have no place in the model"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), OPEN_CLIP_FAULTS, ids=str)
def test_a_fault_in_an_open_clip_siglip_is_told_in_one_line(siglips, tmp_path, values, words):
    pytest.importorskip("open_clip")
    folder = shutil.copytree(siglips / "oc", tmp_path / "faulty")
    file = folder / "open_clip_config.json"
    settings = json.loads(file.read_text())
    (tmp_path / "model.json").write_text(json.dumps(settings["model_cfg"]))
    edit(tmp_path / "model.json", **values)
    file.write_text(json.dumps(settings | {"model_cfg": json.loads((tmp_path / "model.json").read_text())}))
    with pytest.raises(InputError) as caught:
        load_tower(f"open_clip:local-dir:{folder}", needs={TEXT})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_open_clip_lead_to_a_siglip_without_its_weights():
    source = pytest.importorskip("llava.model.multimodal_encoder.open_clip_source")
    found = source.parse_source("ViT-SO400M-14-SigLIP-384,pretrained=webli")
    config = found.vision_config
    assert found.is_siglip and (config.image_size, config.patch_size, config.width, config.layers) == (
        384,
        14,
        1152,
        27,
    )
    tower = build_named_tower("open_clip:ViT-SO400M-14-SigLIP-384,pretrained=webli")
    assert tower.num_patches == 729 and tower.covered == 378 / 384
    with pytest.raises(InputError, match="is a SigLIP, which has GELU: leave quickgelu= out"):
        source.parse_source("ViT-B-16-SigLIP,pretrained=webli,quickgelu=true")


def test_a_missing_tokenizer_is_told_where_text_is_read_and_nowhere_else(siglips, tmp_path):
    folder = shutil.copytree(siglips / "hf", tmp_path / "silent")
    (folder / "spiece.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load_tower(str(folder)).encode(pixels()).shape == (2, NUM_PATCHES, WIDTH)
    with pytest.raises(InputError, match=r"its tokenizer \(spiece\.model or tokenizer\.json\) can't be loaded"):
        load_tower(str(folder), needs={TEXT})


@pytest.mark.parametrize("has_head", [True, False])
def test_a_vision_half_alone_serves_methods_that_read_no_text(siglips, tmp_path, has_head):
    folder = tmp_path / "half"
    vision = make_model(vision_use_head=has_head).vision_model
    vision.save_pretrained(folder)
    shutil.copy(siglips / "hf/preprocessor_config.json", folder)
    tower = load_tower(str(folder))
    assert tower.encode(pixels()).shape == (2, NUM_PATCHES, WIDTH)
    words = "SigLIP text tower" if has_head else r"has no fitting head\.probe: .* needs a full SigLIP"
    with pytest.raises(InputError, match=words):
        tower.provide({TEXT})
    assert tower.needs == frozenset()


def test_a_checkpoint_that_holds_its_siglip_is_refused_by_what_it_is(siglips, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_llava(tmp_path / "held", str(siglips / "hf"), unfreeze_mm_vision_tower=True)
    weights = load_file(folder / "model.safetensors")
    vision = load_file(siglips / "hf/model.safetensors")
    own = {f"model.vision_tower.vision_tower.{key}": value for key, value in vision.items() if "vision_model" in key}
    save_file(weights | own, folder / "model.safetensors")
    with pytest.raises(InputError, match="holds a SigLIP vision tower in its own weights"):
        load_pretrained_model(str(folder), device="cpu")
