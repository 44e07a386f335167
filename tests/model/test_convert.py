"""Checkpoints in transformers' layout: read as they are, written and converted back, and equal to transformers' own."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers import LlavaConfig as HfConfig
from transformers import LlavaNextConfig as HfNextConfig

from llava import convert as convert_module
from llava.check import CheckpointCheck
from llava.conversation import conv_templates
from llava.convert import convert
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.hf_layout import NAMES, rename
from llava.model.multimodal_encoder import stored_encoder
from llava.model.stored_weights import iterate_tensors, list_weight_files
from llava.model.tokenizer import load_tokenizer
from llava.processor import LlavaProcessor
from tests.families import write_checkpoint

NAME = "llava-v1.5-tiny84"
CLIP = "openai/clip-vit-tiny-patch14-84"
SHAPES = Path(__file__).parents[2] / "playground/shapes/checkpoints"


@pytest.fixture
def place(golden, tmp_path, monkeypatch) -> Path:
    """A checkpoint (float16, two .bin shards) beside its vision tower, in the working directory."""
    shutil.copytree(golden / "checkpoints" / NAME, tmp_path / NAME)
    shutil.copytree(golden / "checkpoints" / "openai", tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, **values) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def read_weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: value for file in list_weight_files(str(folder)) for name, value in iterate_tensors(file)}


def read_own(folder: Path | str) -> dict[str, torch.Tensor]:
    """What a checkpoint says of itself: neither towers nor the frequencies that old ones have, which are computed."""
    others = ("model.vision_tower.", "rotary_emb.inv_freq")
    return {name: value for name, value in read_weights(folder).items() if not any(part in name for part in others)}


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def make_image(seed: int, width: int = 100, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def our_logits(folder: Path | str, image: Image.Image, prompt: str, **settings) -> torch.Tensor:
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu", dtype="float32", **settings)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config)
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, image_sizes=[image.size], texts=["a bus"]).logits[0]


def their_logits(folder: Path | str, image: Image.Image, prompt: str, kind: type = LlavaForConditionalGeneration):
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(**processor(images=[image], text=[prompt], return_tensors="pt")).logits[0]


def refused(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


# ------------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize(
    "source", [NAME, f"{NAME}-TRIM-trained", SHAPES / "llava-shapes", SHAPES / "llava-shapes-trim"]
)
def test_there_and_back_gives_the_same_bits_and_the_same_answers(place, golden, source):
    if source == f"{NAME}-TRIM-trained":
        shutil.copytree(golden / "checkpoints" / source, source)
    convert(str(source), "there", "llava-hf")
    convert("there", "back", "llava")
    assert same_bits(read_own(source), read_weights("back"))
    image = make_image(0)
    assert torch.equal(our_logits(source, image, PROMPT), our_logits("back", image, PROMPT))
    old, new = (json.loads((Path(folder) / "config.json").read_text()) for folder in (source, "back"))
    assert {key: old[key] for key in old.keys() & new.keys() - {"mm_vision_tower", "model_type"}}.items() <= new.items()


def write_digits_tokenizer(folder: Path) -> None:
    """Bytes with digits apart, as SmolLM2's tokenizer: neither Llama's sentencepiece nor Qwen2's words."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["What shape is red?", "12 12 12 of 1212"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 2048}))


def test_a_tokenizer_of_neither_llama_nor_qwen_keeps_its_ids_there_and_back(place):
    write_checkpoint(place / "other", "llama")
    for file in ("tokenizer.model", "special_tokens_map.json"):
        (place / "other" / file).unlink()
    write_digits_tokenizer(place / "other")
    convert("other", "there", "llava-hf")
    convert("there", "back", "llava")
    text = "What shape is red? 1212 of 12, it's\n 3"
    ids = load_tokenizer("other")(text).input_ids
    assert len(ids) > len(text.split()) and load_tokenizer("back")(text).input_ids == ids
    assert AutoProcessor.from_pretrained("there", backend="pil").tokenizer(text).input_ids == ids
    assert load_tokenizer("back").eos_token == "<|im_end|>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_keeps_its_bits(place, dtype):
    weights = {name: value.to(dtype) for name, value in read_own(NAME).items()}
    for file in Path(NAME).glob("pytorch_model*"):
        file.unlink()
    save_file(weights, Path(NAME) / "model.safetensors", metadata={"format": "pt"})
    convert(NAME, "there", "llava-hf")
    convert("there", "back", "llava")
    assert same_bits(weights, read_weights("back"))
    assert {value.dtype for name, value in read_weights("there").items() if "language_model" in name} == {dtype}


def test_large_checkpoints_are_written_in_shards_with_an_index(place, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 200_000)
    assert " files;" in convert(NAME, "there", "llava-hf")
    assert (place / "there/model.safetensors.index.json").is_file()
    assert len(list(place.glob("there/model-*.safetensors"))) > 2
    convert("there", "back", "llava")
    assert same_bits(read_own(NAME), read_weights("back"))
    model = LlavaForConditionalGeneration.from_pretrained("there")
    assert model.config.image_token_index == 1000


# ------------------------------------------------------------------------------------------------ equal to transformers
@pytest.mark.parametrize("source", [NAME, SHAPES / "llava-shapes"])
def test_logits_are_equal_three_ways(place, source):
    convert(str(source), "there", "llava-hf")
    for seed in range(3):
        image = make_image(seed, *((90, 60), (84, 84), (31, 118))[seed])
        ours, read, theirs = (
            our_logits(source, image, PROMPT),
            our_logits("there", image, PROMPT),
            their_logits("there", image, PROMPT),
        )
        size = ours.shape[-1]
        assert torch.equal(ours, read[:, :size])
        assert (ours - theirs[:, :size]).abs().max() < 1e-5
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()  # no added token is ever the likeliest


def test_processor_gives_our_ids_and_pixels_for_20_prompts_and_images(place):
    convert(str(SHAPES / "llava-shapes"), "there", "llava-hf")
    tokenizer, model, image_processor, _ = load_pretrained_model(str(SHAPES / "llava-shapes"), device="cpu")
    processor = AutoProcessor.from_pretrained("there", backend="pil")
    image_token, num_patches = processor.image_token_id, 64
    questions = [
        "What is it?",
        "Is there a red circle?\nAnswer the question using a single word or phrase.",
        " 请 ",
        "é\n",
    ]
    for number in range(20):
        question = f"{questions[number % 4]} {number}"
        conv = conv_templates["vicuna_v1"].copy()
        messages = []
        if number >= 10:  # a second turn
            for role, text in zip(conv.roles, (f"<image>\n{question}", "yes"), strict=True):
                conv.append_message(role, text)
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
            conv.append_message(conv.roles[0], "why?")
            messages.append({"role": "user", "content": "why?"})
        else:
            conv.append_message(conv.roles[0], f"<image>\n{question}")
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": parts}]
        conv.append_message(conv.roles[1], None)
        image = make_image(number, 40 + 13 * number, 150 - 5 * number)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == conv.get_prompt()
        theirs = processor(images=[image], text=[text], return_tensors="pt")
        ours = tokenizer_image_token(conv.get_prompt(), tokenizer)
        spread = [token for own in ours for token in ([image_token] * num_patches if own == -200 else [own])]
        assert theirs["input_ids"][0].tolist() == spread
        assert torch.equal(theirs["pixel_values"], process_images([image], image_processor, model.config))


def test_both_layouts_processors_give_the_same_ids_for_every_shape_of_dialogue(place):
    convert(str(SHAPES / "llava-shapes"), "there", "llava-hf")
    ours = AutoProcessor.from_pretrained(SHAPES / "llava-shapes")
    theirs = AutoProcessor.from_pretrained("there", backend="pil")
    look, what = ({"type": "text", "text": text} for text in ("look", "what?"))
    image = {"type": "image", "image": make_image(1)}
    there = {"type": "text", "text": "here: <image>"}
    users = ["what?", [look, what], [look, image, what], [image, look, image, what], [image, there, what]]
    for content in users:
        for others in ([], [[look, what], [image, what, look]]):
            for system in ([], ["Be brief."], [[look, what]]):
                roles = ["system"] * len(system) + ["user", "assistant", "user"]
                contents = [*system, content, *others]
                dialogue = [{"role": role, "content": part} for role, part in zip(roles, contents, strict=False)]
                options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
                expected = theirs.apply_chat_template(dialogue, **options)["input_ids"][0].tolist()
                found = ours.apply_chat_template(dialogue, **options)["input_ids"][0].tolist()
                assert [
                    i for id_ in found for i in ([theirs.image_token_id] * 64 if id_ == -200 else [id_])
                ] == expected


def test_a_processor_of_a_checkpoint_that_holds_its_tower_is_saved_with_its_image_processor(place):
    convert(str(SHAPES / "llava-shapes"), "there", "llava-hf")
    given = LlavaProcessor.from_pretrained("there")
    given.save_pretrained("alone")
    found, image = AutoProcessor.from_pretrained("alone"), make_image(1)
    assert type(found) is LlavaProcessor
    assert torch.equal(found(image, "<image>")["images"], given(image, "<image>")["images"])
    with pytest.raises(InputError, match="in the layout of llava-hf, which has its own processor"):
        given.save_pretrained("there")


VISION = CLIPVisionConfig(
    hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=14,
    projection_dim=24,
)  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
LANGUAGES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=30),
    "qwen2": Qwen2Config(**SIZES),
}


def make_foreign(place: Path, names: str, is_next: bool = False, language: str = "llama") -> Path:
    """A folder as transformers writes it, with random weights under the names of its files or of its memory."""
    convert(NAME, "model", "llava-hf")  # tokenizer and processor files
    folder = place / "model"
    torch.manual_seed(0)
    if is_next:
        config = HfNextConfig(
            vision_config=VISION, text_config=LANGUAGES[language], image_token_index=1000,
            image_grid_pinpoints=[[84, 168], [168, 84], [168, 168], [252, 84]],
        )  # fmt: skip
        model = LlavaNextForConditionalGeneration(config)
        model.model.image_newline.data = torch.randn_like(model.model.image_newline)
        images = {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }
        edit(folder / "preprocessor_config.json", **images, do_pad=True)
        edit(folder / "processor_config.json", processor_class="LlavaNextProcessor")
    else:
        model = LlavaForConditionalGeneration(
            HfConfig(vision_config=VISION, text_config=LANGUAGES[language], image_token_index=1000)
        )
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    if names == "saved":
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", model_type=model.config.model_type)
    return folder


@pytest.mark.parametrize("names", ["saved", "memory"])
def test_folders_that_transformers_wrote_are_read(place, names):
    folder = make_foreign(place, names)
    image = make_image(1)
    ours, theirs = our_logits(folder, image, PROMPT), their_logits(folder, image, PROMPT)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5
    convert(str(folder), "ours", "llava")
    back = our_logits("ours", image, PROMPT)
    assert back.shape[-1] == 1000  # without <image>, <pad> and the rows behind them
    assert (ours[:, :1000] - back).abs().max() < 1e-6


def test_processors_saved_by_transformers_5_in_one_file_are_read(place):
    convert(NAME, "there", "llava-hf")
    processor = AutoProcessor.from_pretrained("there", backend="pil")
    expected = our_logits("there", make_image(5), PROMPT)
    for file in ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model"):
        Path("there", file).unlink()
    processor.save_pretrained("there")
    assert not Path("there/preprocessor_config.json").exists()
    assert torch.equal(our_logits("there", make_image(5), PROMPT), expected)


def test_tokenizers_of_published_folders_give_llavas_ids(place):
    """Llama's class by name, the prefix as a normaliser, the two tokens among the added ones, no tokenizer.model."""
    convert(NAME, "there", "llava-hf")
    content = json.loads(Path("there/tokenizer.json").read_text())
    prefix, blank = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content |= {"normalizer": {"type": "Sequence", "normalizers": [prefix, blank]}, "pre_tokenizer": None}
    for token in content["added_tokens"]:
        token["normalized"] = False
    Path("there/tokenizer.json").write_text(json.dumps(content))
    edit(Path("there/tokenizer_config.json"), tokenizer_class="LlamaTokenizer", legacy=False, extra_special_tokens=...)
    edit(Path("there/config.json"), llava_vocab_size=...)
    Path("there/tokenizer.model").unlink()
    prompts = [PROMPT, "<image>\n<image>\nWhy?</s>USER: no", " blank", "请 é"]
    expected = [tokenizer_image_token(prompt, load_tokenizer(NAME)) for prompt in prompts]
    assert [tokenizer_image_token(prompt, load_tokenizer("there")) for prompt in prompts] == expected
    convert("there", "back", "llava")
    assert [tokenizer_image_token(prompt, load_tokenizer("back")) for prompt in prompts] == expected
    assert json.loads(Path("back/config.json").read_text())["vocab_size"] == 1000


def test_a_folder_whose_headers_are_not_at_hand_loads(place, monkeypatch):
    """As from the hub, where transformers fetches the files."""
    convert(NAME, "there", "llava-hf")
    expected = our_logits("there", make_image(6), PROMPT)
    monkeypatch.setattr("llava.model.multimodal_encoder.loading.holds_weights", lambda folder: False)
    assert torch.equal(our_logits("there", make_image(6), PROMPT), expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_multi_crop_folders_are_read_with_transformers_logits(place, language):
    folder = make_foreign(place, "saved", is_next=True, language=language)
    for size in ((100, 70), (60, 150), (84, 84), (230, 70)):
        image = make_image(2, *size)
        ours = our_logits(folder, image, PROMPT)
        theirs = their_logits(folder, image, PROMPT, LlavaNextForConditionalGeneration)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("language", ["llama", "mistral"])
def test_multi_crop_checkpoints_go_there_and_back(place, language):
    """LLaVA-1.6: several crops, its own tower, Vicuna or Mistral."""
    convert(str(make_foreign(place, "saved", is_next=True, language=language)), "first", "llava")
    config = json.loads(Path("first/config.json").read_text())
    assert config["model_type"] == f"llava_{language}"
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    convert("first", "there", "llava-hf")
    convert("there", "second", "llava")
    assert same_bits(read_weights("first"), read_weights("second"))
    image = make_image(2, 150, 60)
    assert torch.equal(our_logits("first", image, PROMPT), our_logits("second", image, PROMPT))
    theirs = their_logits("there", image, PROMPT, LlavaNextForConditionalGeneration)
    assert (our_logits("first", image, PROMPT) - theirs[:, :1000]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------- the tower in a checkpoint
def test_trim_reads_the_text_half_of_the_clip_that_the_folder_names(place):
    convert(NAME, "there", "llava-hf")
    image = make_image(3)
    for spec in ("TRIM:0.25", "TRIM:-1"):
        ours, read = our_logits(NAME, image, PROMPT, reduce=spec), our_logits("there", image, PROMPT, reduce=spec)
        assert torch.equal(ours, read[:, : ours.shape[-1]])


def test_without_its_clip_a_folder_answers_and_refuses_trim_in_one_line(place):
    convert(NAME, "there", "llava-hf")
    image = make_image(3)
    expected = our_logits("there", image, PROMPT)
    shutil.rmtree("openai")
    assert torch.equal(our_logits("there", image, PROMPT), expected)
    message = refused(lambda: our_logits("there", image, PROMPT, reduce="TRIM:-1"))
    assert "there does not hold: set mm_vision_tower in its config.json to the CLIP" in message
    model = load_pretrained_model("there", device="cpu")[1]
    assert "set mm_vision_tower" in refused(model.set_token_reduction, "TRIM:-1")
    assert model.token_reducer is None


def test_a_clip_of_another_joint_space_is_refused(place):
    convert(NAME, "there", "llava-hf")
    weights = load_file(Path(CLIP) / "model.safetensors") if (Path(CLIP) / "model.safetensors").is_file() else None
    weights = weights or read_weights(CLIP)
    weights["visual_projection.weight"] = torch.zeros(5, 64)
    for file in (*Path(CLIP).glob("*.bin"), *Path(CLIP).glob("*.safetensors")):
        file.unlink()
    save_file({name: value.contiguous() for name, value in weights.items()}, Path(CLIP) / "model.safetensors")
    message = refused(lambda: load_pretrained_model("there", device="cpu", reduce="TRIM:-1"))
    assert "has no fitting visual_projection.weight: text-guided token reduction needs a full CLIP" in message


def disturb_tower(file: Path | str, share: float) -> None:
    """Move the layers of the vision half that a weight file holds, by a share of their deviation."""
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if "vision_model.encoder" in name and value.dim() == 2:
            weights[name] = value + share * value.std() * torch.randn(value.shape, generator=generator).to(value)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["llava-hf", "llava"])
def test_a_clip_with_other_weights_than_the_tower_is_refused_where_text_is_read(place, layout):
    convert(NAME, "there", "llava-hf")
    disturb_tower("there/model.safetensors", 4)
    if layout == "llava":
        convert("there", "back", "llava")
    folder = "there" if layout == "llava-hf" else "back"
    words = (
        f"mm_vision_tower .*{CLIP} is not the CLIP that the vision tower of {folder} comes from: .* differ by \\d{{3}}%"
    )
    with pytest.raises(InputError, match=words):
        load_pretrained_model(folder, device="cpu", reduce="TRIM:-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_encoder, "check_origin", None)  # not looked at
        model = load_pretrained_model(folder, device="cpu", reduce="FasterVLM:0.25")[1]
    with pytest.raises(InputError, match=words):
        model.set_token_reduction("TRIM:-1")
    finding = next(each for each in CheckpointCheck(folder).findings() if each.subject == "text tower")
    assert "is not the CLIP that" in finding.text


def test_a_tower_that_was_trained_further_reads_text_with_one_warning_that_says_how_far_it_is(place, caplog):
    convert(NAME, "there", "llava-hf")
    disturb_tower("there/model.safetensors", 0.1)
    model = load_pretrained_model("there", device="cpu", reduce="TRIM:-1")[1]
    for question in ("a bus", "a cat"):
        model.get_vision_tower().embed_text([question])
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("origin")]
    assert re.search(r"the vision tower of there differs from mm_vision_tower .* by \d\d % on a probe image", line)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_to_16_bits_is_no_other_tower(place, dtype, caplog):
    convert(NAME, "there", "llava-hf")
    load_pretrained_model("there", device="cpu", reduce="TRIM:-1", tower_dtype=dtype)
    assert not [record for record in caplog.records if record.name.endswith("origin")]


def test_a_tower_that_was_trained_with_the_model_is_the_one_that_is_used(place):
    """LLaVA-1.6's `unfreeze_mm_vision_tower`: the checkpoint's tower counts, not the CLIP that it comes from."""
    convert(NAME, "there", "llava-hf")
    weights = load_file("there/model.safetensors")
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    weights[name] = weights[name] + 0.1
    save_file(weights, "there/model.safetensors", metadata={"format": "pt"})
    convert("there", "tuned", "llava")
    assert json.loads(Path("tuned/config.json").read_text())["unfreeze_mm_vision_tower"] is True
    image = make_image(4)
    tuned = our_logits("tuned", image, PROMPT)
    assert torch.equal(tuned, our_logits("there", image, PROMPT)[:, : tuned.shape[-1]])
    assert not torch.equal(tuned, our_logits(NAME, image, PROMPT))
    # It is saved with the model, all layers of it. As LLaVA-1.6 has it, the CLIP has the settings.
    for folder in ("with/settings", "without/settings"):
        load_pretrained_model("tuned", device="cpu", dtype="float16")[1].save_pretrained(folder)
        for file in Path("tuned").glob("tokenizer*"):
            shutil.copy(file, folder)
        assert read_weights(folder).keys() == read_weights("tuned").keys()
        assert torch.equal(tuned, our_logits(folder, image, PROMPT))
        edit(Path("tuned/config.json"), vision_config=...)
        assert torch.equal(tuned, our_logits("tuned", image, PROMPT))


@pytest.mark.parametrize("tower", [CLIP, f"../{CLIP}", None])
def test_a_model_saved_elsewhere_finds_its_tower(place, monkeypatch, tower):
    edit(Path(NAME) / "config.json", mm_vision_tower=tower or str(place / CLIP))
    tokenizer, model, _, _ = load_pretrained_model(NAME, device="cpu")
    for folder in ("a/b/saved", "saved"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert model.config.mm_vision_tower == (tower or str(place / CLIP))
        monkeypatch.chdir(place / "openai")
        load_pretrained_model(str(place / folder), device="cpu")
        monkeypatch.chdir(place)


# ----------------------------------------------------------------------------------------------------- what is refused
def test_damaged_folders_are_refused_as_llavas_are(place):
    convert(NAME, "there", "llava-hf")
    good = load_file("there/model.safetensors")
    layer = "language_model.model.layers.1.self_attn.q_proj.weight"
    faults = {
        "checkpoint there lacks 1 weight model.norm.weight": {"language_model.model.norm.weight": None},
        "lacks 1 weight model.mm_projector.0.bias": {"multi_modal_projector.linear_1.bias": None},
        "holds 1 weight that its config.json has no place for, first model.resampler.query": {
            "model.resampler.query": torch.zeros(3)
        },
        "model.layers.1.self_attn.q_proj.weight has shape [2, 2], the config asks for [64, 64]": {
            layer: torch.zeros(2, 2)
        },
        "model.layers.1.self_attn.q_proj.weight holds inf or NaN": {layer: torch.full((64, 64), torch.nan)},
        "lacks 1 weight vision_model.embeddings.class_embedding": {
            "vision_tower.vision_model.embeddings.class_embedding": None
        },
        "vision_model.embeddings.class_embedding holds inf or NaN": {
            "vision_tower.vision_model.embeddings.class_embedding": torch.full((64,), torch.inf)
        },
    }
    for expected, changes in faults.items():
        weights = {name: value for name, value in (good | changes).items() if value is not None}
        save_file(weights, "there/model.safetensors", metadata={"format": "pt"})
        assert expected in refused(lambda: load_pretrained_model("there", device="cpu"))
        assert expected.removeprefix("checkpoint there ") in refused(convert, "there", "back", "llava")
        assert not Path("back").exists()
    assert not list(place.glob(".*.partial"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("projector_hidden_act", "relu", 'projector_hidden_act is "relu"; expected "gelu"'),
        ("multimodal_projector_bias", False, "multimodal_projector_bias is false; expected true"),
        ("vision_feature_layer", [-2, -3], "vision_feature_layer is [-2, -3]; expected a whole number"),
        ("vision_feature_select_strategy", "all", "vision_feature_select_strategy is"),
        (
            "text_config",
            {"model_type": "gemma"},
            'text_config.model_type is "gemma"; expected one of llama, mistral, qwen2',
        ),
        ("text_config", {"model_type": ["llama"]}, "text_config.model_type is ['llama']; expected one of"),
        ("text_config", None, "has no text_config"),
        (
            "vision_config",
            {"model_type": "siglip_vision_model"},
            'is "siglip_vision_model"; expected "clip_vision_mode',
        ),
        ("vision_config", {"hidden_size": -3}, "vision_config.hidden_size is -3; expected a whole number"),
    ],
)
def test_settings_that_are_read_otherwise_are_refused_by_name(place, key, value, expected):
    convert(NAME, "there", "llava-hf")
    edit(Path("there/config.json"), **{key: value})
    message = refused(lambda: load_pretrained_model("there", device="cpu"))
    assert "there/config.json" in message
    assert expected in message


def test_conversions_that_make_no_sense_are_refused_and_leave_nothing(place, golden):
    convert(NAME, "there", "llava-hf")
    assert "has the layout of llava-hf already" in refused(convert, "there", "new", "llava-hf")
    assert "does not have the layout of llava-hf" in refused(convert, NAME, "new", "llava")
    assert "holds files already" in refused(convert, NAME, "there", "llava-hf")
    assert "config.json is not a folder" in refused(convert, NAME, f"{NAME}/config.json", "llava-hf")
    assert "checkpoint folder ./absent is not there" in refused(convert, "./absent", "new", "llava-hf")
    pretrained = golden / "checkpoints/liuhaotian/llava-v1.5-mlp2x-tiny-pretrain"
    assert "holds projector weights only" in refused(convert, str(pretrained), "new", "llava-hf")
    edit(Path(NAME) / "config.json", mm_projector_type="mlp3x_gelu")
    assert 'mm_projector_type is "mlp3x_gelu"; expected "mlp2x_gelu"' in refused(convert, NAME, "new", "llava-hf")
    edit(Path(NAME) / "config.json", mm_projector_type="mlp2x_gelu", mm_use_im_start_end=True)
    assert "mm_use_im_start_end is true; expected false" in refused(convert, NAME, "new", "llava-hf")
    assert not Path("new").exists()
    assert not list(place.glob(".*.partial"))


def test_an_interrupted_conversion_leaves_nothing(place, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_processor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(NAME, "there", "llava-hf")
    assert sorted(path.name for path in place.iterdir()) == [NAME, "openai"]


def test_the_row_of_cls_is_kept_where_the_checkpoint_has_it(place):
    edit(Path(NAME) / "config.json", mm_vision_select_feature="cls_patch")
    convert(NAME, "there", "llava-hf")
    image = make_image(7)
    ours, theirs = our_logits(NAME, image, PROMPT), their_logits("there", image, PROMPT)
    assert (ours - theirs[:, : ours.shape[-1]]).abs().max() < 1e-5


def test_our_names_are_nobody_elses():
    ours = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    ours += ("model.mm_projector.0.bias", "model.image_newline", "model.vision_tower.vision_tower.vision_model.a")
    ours += ("model.vision_tower.text_tower.model.b",)
    assert all(rename(name, NAMES) == name for name in ours)
