"""Samples laid end to end in rows: the loss and the gradients are those of a row each."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, modeling_flash_attention_utils

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.packing import find_even_width, plan_rows
from llava.model.splice import Targets
from tests.families import write_checkpoint

LIMIT = 64
# Text alone, one image, several; short and long, one longer than the limit; the second learns its first token.
LENGTHS, NUM_IMAGES = (5, 9, 30, 12, 90, 3, 20), (0, 1, 0, 2, 1, 0, 0)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.nn.Module]:
    """Load a family's model, in training mode, with its tower frozen and sequences cut at the limit."""
    folder, known = tmp_path_factory.mktemp("families"), {}

    def load_family(name: str, reduce: str = "TRIM:6", attention: str = "sdpa") -> torch.nn.Module:
        if name not in known:
            changes = {}
            if name == "qwen-window":  # the first layer attends to all, the others to a window
                changes = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}
            path = write_checkpoint(folder / name, "qwen2" if changes else name, **changes)
            known[name] = load_pretrained_model(str(path), device="cpu")[1].train()
            known[name].config.tokenizer_model_max_length = LIMIT
            known[name].get_vision_tower().freeze()
        model = known[name]
        model.set_token_reduction(reduce)
        model.config._attn_implementation = attention
        return model

    return load_family


@pytest.fixture(scope="module")
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]
    for own, count in zip(ids, NUM_IMAGES, strict=True):
        own[2 : 2 + 2 * count : 2] = IMAGE_TOKEN_INDEX
    labels = [torch.where(own == IMAGE_TOKEN_INDEX, IGNORE_INDEX, own) for own in ids]
    labels[0][:3] = labels[2][:20] = labels[3][:] = IGNORE_INDEX
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": stack(ids, batch_first=True),
        "labels": stack(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": stack([torch.ones_like(own, dtype=torch.bool) for own in ids], batch_first=True),
        "images": torch.randn(sum(NUM_IMAGES), 3, 84, 84, generator=generator),
        "texts": [f"thing {row}" for row in range(len(ids))],
    }


def learn(model: torch.nn.Module, batch: dict, **options: object) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step and the gradients of all weights."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_step(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-5, rtol=1e-4), name


# ---------------------------------------------------------------------------------------------- the loss is the same
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mistral-window", "qwen2", "qwen-window"])
def test_loss_and_gradients_are_those_of_a_row_for_each_sample(load, batch, family: str, attention: str):
    model = load(family, attention=attention)
    assert_same_step(learn(model, batch, packing=True), learn(model, batch))


@pytest.mark.parametrize("reduce", ["none", "TRIM:-1", "Pool:4", "TRIM:6|FastV:0.5,layer=1", "DART:0.5,layer=1"])
def test_every_kind_of_reduction_can_be_packed(load, batch, reduce: str):
    model = load("llama", reduce)
    assert_same_step(learn(model, batch, packing=True), learn(model, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_goes_with_packing(load, batch, reentrant: bool):
    model = load("mistral-window")
    expected = learn(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        assert_same_step(learn(model, batch, packing=True), expected)
    finally:
        model.gradient_checkpointing_disable()


def test_a_batch_of_text_alone_and_a_batch_of_one_can_be_packed(load, batch):
    model = load("llama")
    text = [row for row, count in enumerate(NUM_IMAGES) if not count]
    for rows in (text, text[2:3]):
        own = {key: batch[key][rows] for key in ("input_ids", "labels", "attention_mask")} | {"images": None}
        assert_same_step(learn(model, own, packing=True), learn(model, own))


def attend_by_sample(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, scale: float, window: int | None, longest: int,
) -> torch.Tensor:  # fmt: skip
    """What flash attention computes of `[tokens, heads, width]`, sequence by sequence."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == longest and cu_seqlens_q[-1] == len(queries)
    outputs = []
    for own in zip(*(each.split(cu_seqlens_q.diff().tolist()) for each in (queries, keys, values)), strict=True):
        heads = [each.transpose(0, 1) for each in own]
        distance = torch.arange(len(own[0]))[:, None] - torch.arange(len(own[0]))
        mask = (distance >= 0) & (distance < (window or len(own[0])))
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs.append(attend(*heads, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
def test_flash_attention_is_told_where_samples_begin(load, batch, family: str, monkeypatch: pytest.MonkeyPatch):
    def choose_options(softmax_scale: float, sliding_window: int | None, max_seqlen_q: int, **rest: object) -> dict:
        return {"scale": softmax_scale, "window": sliding_window, "longest": max_seqlen_q}

    # transformers 5.17 gives one function for the options, later versions a pair.
    is_pair = hasattr(modeling_flash_attention_utils, "_process_with_kvcache_kwargs_fn")
    choose = (choose_options, None) if is_pair else choose_options
    functions = ((None, attend_by_sample, None, None, None), choose)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: functions)
    expected = learn(load(family), batch)
    assert_same_step(learn(load(family, attention="flash_attention_2"), batch, packing=True), expected)


def test_changing_one_sample_changes_nothing_of_its_neighbours(load, batch):
    model = load("llama")
    borders = model.embed_prompts(
        **{key: batch[key] for key in ("input_ids", "labels", "attention_mask", "images", "texts")}, packing=True
    ).borders.tolist()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][2, 0] += 1
    with torch.no_grad():
        before, after = (model(**one, packing=True).logits.flatten(0, 1) for one in (batch, changed))
    moved = [float((before[first:end] - after[first:end]).abs().max()) > 0 for first, end in pairwise(borders)]
    assert len(moved) == len(LENGTHS) and sum(moved) == 1


# ------------------------------------------------------------------------------------------------------------- rows
def test_positions_begin_anew_and_padding_belongs_to_the_last_sample_of_its_row(load, batch):
    model = load("llama")
    inputs = {key: batch[key] for key in ("input_ids", "labels", "attention_mask", "images", "texts")}
    packed, plain = model.embed_prompts(**inputs, packing=True), model.embed_prompts(**inputs)
    assert packed.embeds.shape[0] < len(LENGTHS) and packed.embeds.shape[1] <= LIMIT
    assert packed.attention_mask.sum() == plain.attention_mask.sum()
    starts = (packed.position_ids.flatten() == 0).nonzero().flatten()
    assert starts.tolist() == packed.borders[:-1].tolist()
    assert (packed.labels.flatten()[starts] == IGNORE_INDEX).all()
    lengths = sorted(plain.attention_mask.sum(dim=1).tolist())
    extents = packed.borders.diff().tolist()
    padding = (~packed.attention_mask).sum()
    assert sum(extents) == sum(lengths) + padding == packed.attention_mask.numel()
    counts = torch.nn.functional.pad(packed.attention_mask.flatten().cumsum(dim=0), (1, 0))[packed.borders]
    assert sorted(counts.diff().tolist()) == lengths


@pytest.mark.parametrize(
    ("lengths", "limit", "even_width", "rows"),
    [
        ([5, 5, 5], 100, math.inf, [[0], [1], [2]]),  # nothing to gain: rows stay short
        ([10, 4, 6], 100, math.inf, [[0], [1, 2]]),
        ([10, 4, 5], 100, math.inf, [[0, 1, 2]]),  # one row has no padding at all
        ([10, 4, 5], 12, math.inf, [[0], [1, 2]]),  # but is too long
        ([10, 4, 5], 100, 20.0, [[0], [1, 2]]),  # or attention in it too dear
        ([10, 4, 5], None, math.inf, [[0, 1, 2]]),
        ([7], 7, 1.0, [[0]]),
    ],
)
def test_rows_are_as_long_as_pays(lengths: list, limit: int | None, even_width: float, rows: list):
    assert plan_rows(lengths, limit, even_width) == rows


def test_rows_keep_the_limit_and_take_fewer_positions_than_a_row_for_each_sample():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 101, (16,), generator=generator).tolist()
        rows = plan_rows(lengths, 100, 1e4)
        loads = [sum(lengths[sample] for sample in row) for row in rows]
        assert sorted(sample for row in rows for sample in row) == list(range(16))
        assert max(loads) <= 100
        assert len(rows) * max(loads) <= 16 * max(lengths)
        assert sum(lengths) > 0.75 * len(rows) * max(loads)


def test_attention_is_even_with_the_rest_of_a_layer_where_their_flops_are():
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_attention_heads=8, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    matrices = 64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 160
    assert find_even_width(config) * 2 * 64 == matrices
    config._attn_implementation = "flash_attention_2"
    assert find_even_width(config) == math.inf


def test_the_tokens_to_learn_are_counted_for_each_sample_of_a_row():
    rows = torch.full((2, 6), IGNORE_INDEX)
    rows[0, 1] = rows[1, 4] = rows[1, 5] = 7
    targets = Targets.of(rows, torch.device("cpu"), torch.tensor([0, 2, 6, 9, 12]))
    assert targets.counts.tolist() == [1, 0, 0, 2] and targets.owners.tolist() == [0, 3, 3]


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_packed_is_one_line(load, batch):
    with pytest.raises(InputError, match=r"packing keeps attention within a sample with sdpa, .* not with flex_att"):
        load("llama", attention="flex_attention")(**batch, packing=True)
    with pytest.raises(InputError, match=r"packing takes the gaps that TRIM:6,position_ids=original leaves"):
        load("llama", "TRIM:6,position_ids=original")(**batch, packing=True)
    embeds = torch.zeros(1, 4, load("llama").config.hidden_size)
    for inputs in ({**batch, "labels": None}, {"inputs_embeds": embeds, "labels": torch.ones(1, 4, dtype=torch.long)}):
        with pytest.raises(InputError, match="packing is for training: give input_ids and labels"):
            load("llama")(**inputs, packing=True)
