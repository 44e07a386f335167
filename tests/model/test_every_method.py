"""Every method of the registry through a whole model: towers of both libraries, dtypes, batches, both decoders."""

import random

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.generation import GreedyDecoder
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, parse_reduction

CHECKPOINT = "llava-v1.5-tiny84-TRIM"
NEW_TOKENS = 5
# Options that a tower of 4 layers and a language model of 3 layers need.
OPTIONS = {"HiPrune": ",object_layer=2", "FastV": ",layer=1", "DART": ",layer=1,pivot_image=2,pivot_text=2"}
SPECS = [f"{name}:0.3{OPTIONS.get(name, '')}" for name in [*REDUCERS, *LAYER_REDUCERS]]
SPECS += [f"{name}:-1" for name, method in REDUCERS.items() if method.has_automatic_budget]
SPECS += ["Random:avg=9.5", "HoloV:avg=9.5", "DivPrune:avg=9.5|FastV:0.5,layer=1", "Pool:avg=9.5"]
SPECS += ["TRIM:-1|FastV:0.5,layer=1", "VisionZip:9,contextual=4|SparseVLM:0.3", "HoloV:12|PyramidDrop:0.5"]


@pytest.fixture(scope="module", params=["hf", "open_clip"])
def model_and_tokenizer(request, golden, clips):
    if request.param == "open_clip":
        pytest.importorskip("open_clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        tokenizer, model, _, _ = load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32", reduce="none")
        if request.param == "open_clip":
            tower = build_named_tower("open_clip:local-dir:oc", folder=clips)
            tower.load_model()
            model.get_model().vision_tower = tower
        yield model, tokenizer


def make_samples(tokenizer) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """(ids, images, query) with one, two or no images and questions of different lengths."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    words = ["what", "is", "the", "color", "of", "the", "big", "red", "circle", "near", "the", "sign"]
    samples = []
    for index in range(8):
        num_images = (1, 1, 2, 1, 0, 1, 1, 1)[index]
        question = " ".join(draw.choice(words) for _ in range(draw.randint(2, 20))) + "?"
        prompt = "A chat. USER: " + "<image>\n" * num_images + question + " ASSISTANT:"
        images = torch.randn(num_images, 3, 6, 6, generator=generator)
        images = torch.nn.functional.interpolate(images, size=84, mode="bilinear")
        samples.append(
            (tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"), images, question)
        )
    return samples


def answer(model, samples) -> list[list[int]]:
    """Ids of a batch by `generate`, from pixels."""
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _, _ in samples], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(own)] for own, _, _ in samples])
    images = [image for _, own, _ in samples for image in own]
    texts = [text for _, _, text in samples]
    found = model.generate(
        ids, attention_mask=mask, images=images or None, texts=texts, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return [row[: row.index(2)] if 2 in row else row for row in found.tolist()]


@pytest.mark.parametrize("spec", SPECS)
def test_an_answer_does_not_depend_on_its_batch(model_and_tokenizer, spec):
    model, tokenizer = model_and_tokenizer
    samples = make_samples(tokenizer)
    model.set_token_reduction(spec)
    alone = [answer(model, [sample])[0] for sample in samples]
    assert answer(model, samples) == alone
    pairs = [answer(model, samples[start : start + 2]) for start in range(0, 8, 2)]
    assert [row for pair in pairs for row in pair] == alone
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    assert answer(model, [samples[place] for place in order]) == [alone[place] for place in order]
    # The evaluation's decoder gives the same.
    tokens = [model.encode_images(list(images), [text] * len(images)) for _, images, text in samples]
    assert GreedyDecoder(model).decode([ids for ids, _, _ in samples], tokens, NEW_TOKENS) == alone


@pytest.mark.parametrize("spec", SPECS)
def test_the_number_of_tokens_is_that_of_the_method(model_and_tokenizer, spec):
    model, tokenizer = model_and_tokenizer
    images = torch.cat([images for _, images, _ in make_samples(tokenizer)])
    model.set_token_reduction(spec)
    before = parse_reduction(spec).before
    is_fixed = before is not None and not before.budget.is_automatic
    most_tokens = max(part.most_tokens(36) for part in before.parts((6, 6))) if is_fixed else 36
    tokens = model.encode_images(images, ["what is red?"] * len(images))
    for each in tokens:
        assert each.features.isfinite().all()
        assert before is None or before.budget.is_automatic or each.num_tokens <= most_tokens
        assert (before is None) == (each.num_tokens == 36) or before.budget.is_automatic


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_in_bfloat16_reads_as_many_tokens(golden, clips, spec, monkeypatch):
    monkeypatch.chdir(golden / "checkpoints")
    tokenizer, model, _, _ = load_pretrained_model(CHECKPOINT, device="cpu", dtype="bfloat16", reduce=spec)
    samples = make_samples(tokenizer)[:3]
    found = answer(model, samples)
    assert len(found) == 3 and any(found)
    exact = load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32", reduce=spec)[1]
    for _, images, text in samples:
        counts = [
            [tokens.num_tokens for tokens in own.encode_images(images, [text] * len(images))] for own in (model, exact)
        ]
        assert counts[0] == counts[1]
