"""Original positions (`position_ids=original`): tokens stand where they would if nothing had left."""

import pytest
import torch
from transformers import LlamaForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.generation import GreedyDecoder
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.image_tokens import CropMerge, find_positions
from llava.model.token_reduction import REDUCERS, parse_reducer
from llava.model.token_reduction.base import ReducedTokens, make_example

OPTIONS = {"HiPrune": ",object_layer=2"}
NEW_TOKENS = 5
PINPOINTS = [[84, 168], [168, 84], [168, 168]]
GRID, CROP_SIZE, IMAGE_SIZE = (6, 6), 84, (200, 150)  # a base view and 2 x 2 tiles


def original(name: str, budget: str) -> str:
    return f"{name}:{budget}{OPTIONS.get(name, '')},position_ids=original"


@pytest.fixture
def loaded(checkpoints):
    tokenizer, model, _, _ = load_pretrained_model("llava-v1.5-tiny84-TRIM", device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(3, 3, 6, 6, generator=generator), size=84, mode="bilinear")
    return model, tokenizer, images


def make_prompts(tokenizer, questions) -> list[torch.Tensor]:
    prompts = [f"A chat. USER: <image>\n{question} ASSISTANT:" for question in questions]
    return [tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for prompt in prompts]


def decode_masked(model, prompt, image, kept) -> list[int]:
    """Greedy ids of the whole prompt, whose dropped patches no token ever attends to; each token from one pass."""
    model.set_token_reduction(None)
    batch = model.embed_prompts(prompt[None], images=image[None])
    embeds, mask = batch.embeds, batch.attention_mask.clone()
    mask[batch.image_of >= 0] = kept
    answer = []
    for _ in range(NEW_TOKENS):
        positions = torch.arange(embeds.shape[1])[None]
        read = LlamaForCausalLM.forward(model, inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        answer.append(int(read.logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[answer[-1]]]))], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
    return answer[: answer.index(2)] if 2 in answer else answer


@pytest.mark.parametrize("name", ["FasterVLM", "Random", "DivPrune", "SCOPE", "HiPrune"])
@pytest.mark.parametrize("behind", ["", "|FastV:1.0,layer=1"])
def test_a_model_answers_as_if_dropped_patches_were_masked(loaded, name, behind):
    model, tokenizer, images = loaded
    prompts = make_prompts(tokenizer, ["what is red?", "is there a big bus near the sign?", "why?"])
    spec = original(name, "0.3") + behind
    model.set_token_reduction(spec)
    tokens = [model.encode_images(image[None], ["what is red?"]) for image in images]
    masked = [
        decode_masked(model, prompt, image, own[0].kept[0])
        for prompt, image, own in zip(prompts, images, tokens, strict=True)
    ]
    model.set_token_reduction(spec)
    assert GreedyDecoder(model).decode(prompts, tokens, NEW_TOKENS) == masked
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])
    found = model.generate(
        ids,
        attention_mask=mask,
        image_tokens=[own[0] for own in tokens],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert [row[: row.index(2)] if 2 in row else row for row in found.tolist()] == masked


def test_questions_that_share_an_image_read_it_at_its_own_positions(loaded):
    model, tokenizer, images = loaded
    prompts = make_prompts(tokenizer, ["what is red?", "is there a big bus near the sign?", "why?", "where?"])
    model.set_token_reduction(original("FasterVLM", "0.3"))
    tokens = [model.encode_images(images[:1], [""])] * 4
    decoder = GreedyDecoder(model)
    together = decoder.decode(prompts, tokens, NEW_TOKENS)
    alone = [decoder.decode([prompt], [own], NEW_TOKENS)[0] for prompt, own in zip(prompts, tokens, strict=True)]
    assert together == alone


@pytest.mark.parametrize("name", REDUCERS)
def test_the_text_behind_an_image_stands_where_it_stands_without_reduction(loaded, name):
    model, tokenizer, images = loaded
    (prompt,) = make_prompts(tokenizer, ["what is red?"])
    model.set_token_reduction(None)
    whole = model.embed_prompts(prompt[None], images=images[:1])
    model.set_token_reduction(original(name, "0.3"))
    tokens = model.encode_images(images[:1], ["what is red?"])
    batch = model.embed_prompts(prompt[None], image_tokens=tokens)
    assert torch.equal(batch.position_ids[batch.image_of < 0], whole.position_ids[whole.image_of < 0])
    first = int(whole.position_ids[whole.image_of == 0][0])
    own = batch.position_ids[batch.image_of == 0] - first
    assert own.min() >= 0 and own.max() < 36
    if tokens[0].kept is not None:
        numbers = tokens[0].kept[0].nonzero().flatten()
        assert set(numbers.tolist()) <= set(own.tolist())
    if tokens[0].centres is not None:
        assert set(tokens[0].centres[0].nonzero().flatten().tolist()) <= set(own.tolist())


def test_pooled_cells_stand_at_their_middle_patches():
    reduced = parse_reducer("Pool:4")(make_example([], (6, 6)))
    assert reduced.places.tolist() == [[1 * 6 + 1, 1 * 6 + 4, 4 * 6 + 1, 4 * 6 + 4]]


def test_patches_are_read_in_the_order_of_the_method_at_their_own_positions():
    kept = torch.tensor([[True, False, True, True]])
    order = torch.tensor([[2, 0, 1, 3]])
    reduced = ReducedTokens(torch.zeros(1, 4, 2), torch.tensor([4]), kept, order=order)
    positions = find_positions(reduced, CropMerge(), (2, 2), None)
    assert positions.offsets.tolist() == [3, 0, 2, 3]  # the row that is no patch stands at the last one
    assert positions.num_positions == 4


@pytest.mark.parametrize(("kind", "length"), [("flat", 180), ("spatial", 180), ("spatial_unpad", 166)])
def test_patches_of_several_crops_stand_where_the_whole_image_has_them(kind, length):
    newline = torch.tensor([-1.0]) if kind == "spatial_unpad" else None
    merge = CropMerge(kind, PINPOINTS, CROP_SIZE, newline)
    everything = torch.ones(5, 36, dtype=torch.bool)
    whole = find_positions(
        ReducedTokens(torch.zeros(5, 36, 1), torch.full((5,), 36), everything), merge, GRID, IMAGE_SIZE
    )
    assert whole.offsets.tolist() == list(range(length)) and whole.num_positions == length
    # Features that are the patches' own numbers, merged, say which patch each position has.
    numbers = torch.arange(180.0).view(5, 36, 1)
    layout = merge(list(numbers), everything, GRID, IMAGE_SIZE).flatten().tolist()
    kept = torch.rand(5, 36, generator=torch.Generator().manual_seed(3)) < 0.3
    counts = kept.sum(dim=1)
    rows = torch.nn.utils.rnn.pad_sequence(
        [own[mask] for own, mask in zip(numbers, kept, strict=True)], batch_first=True
    )
    found = find_positions(ReducedTokens(rows, counts, kept), merge, GRID, IMAGE_SIZE)
    merged = merge([row[:count] for row, count in zip(rows, counts, strict=True)], kept, GRID, IMAGE_SIZE)
    assert found.num_positions == length and len(found.offsets) == len(merged)
    patches = [(place, number) for place, number in zip(found.offsets, merged.flatten(), strict=True) if number >= 0]
    assert len(patches) == counts[0] + sum(number in layout for number in numbers[1:][kept[1:]])
    assert all(layout[place] == number for place, number in patches)
    assert found.offsets.diff().min() > 0


def test_a_method_that_does_not_say_what_its_tokens_stand_for_is_refused():
    reduced = ReducedTokens(torch.zeros(1, 4, 2), torch.tensor([4]))
    with pytest.raises(InputError, match="position_ids=original: this method does not say"):
        find_positions(reduced, CropMerge(), (2, 2), None)


def test_flash_attention_is_refused_because_it_reads_gaps_as_borders(loaded):
    model = loaded[0]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 takes for the borders of packed sequences"):
        model.set_token_reduction("TRIM:-1,position_ids=original")


def test_a_prompt_whose_positions_do_not_fit_is_refused_although_its_tokens_would(loaded):
    model, tokenizer, images = loaded
    (prompt,) = make_prompts(tokenizer, ["what is red?"])
    model.set_token_reduction(original("FasterVLM", "0.3"))
    tokens = model.encode_images(images[:1], [""])
    model.config.max_position_embeddings = len(prompt) + 20
    with pytest.raises(InputError, match="positions with its image tokens"):
        model.generate(prompt[None], image_tokens=tokens, max_new_tokens=1)
