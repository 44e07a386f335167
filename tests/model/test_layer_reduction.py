"""Methods inside the language model: the decoder in stretches against slow readings of the same prompts."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.generation import Generator, GreedyDecoder
from llava.model.image_tokens import ImageTokens
from llava.model.language_model.layer_reduction import SampleView, find_images, find_text
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.token_reduction import LAYER_REDUCERS, parse_reduction
from llava.sampling import Sampling

NUM_LAYERS, WIDTH, VOCABULARY = 8, 32, 64
EVERYTHING = {name: f"{name}:1.0" for name in LAYER_REDUCERS}
DROPPING = {
    "FastV": "FastV:0.3,layer=2",
    "FastV, early": "FastV:7,layer=1",
    "FastV, packed": "FastV:0.5,position_ids=packed",
    "PyramidDrop": "PyramidDrop:0.5",
    "PyramidDrop, stages": "PyramidDrop:0.4,stages=1/3/4/7",
    "PyramidDrop, original": "PyramidDrop:0.5,position_ids=original",
    "PyramidDrop, mean": "PyramidDrop:14",
    "SparseVLM": "SparseVLM:0.2",
    "SparseVLM+": "SparseVLM+:0.2",
    "DART": "DART:16,pivot_image=2,pivot_text=2",
    "DART, packed": "DART:0.5,layer=3,pivot_image=3,position_ids=packed",
}


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    """Eight random layers with grouped keys, far from initialisation: attention is not flat, answers vary."""
    torch.manual_seed(0)
    config = LlavaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlavaLlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.15 * torch.randn_like(weight))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.fixture
def reduced(model):
    """The model with a method; without one again afterwards."""
    yield lambda spec: model.take_reduction(parse_reduction(spec)) or model
    model.take_reduction(parse_reduction(None))


def make_samples(count: int, seed: int = 0, num_images: int = 1) -> list[tuple[Tensor, list[ImageTokens]]]:
    """Prompts of several lengths, each with images of several sizes."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples = []
    for _ in range(count):
        images = [torch.randn(number(20, 40), WIDTH, generator=generator) for _ in range(num_images)]
        ids = [torch.randint(1, VOCABULARY, (number(1, 6),), generator=generator)]
        for _ in images:
            text = torch.randint(1, VOCABULARY, (number(3, 9),), generator=generator)
            ids += [torch.tensor([IMAGE_TOKEN_INDEX]), text]
        samples.append((torch.cat(ids), [ImageTokens(features, len(features)) for features in images]))
    return samples


def embed(model, sample) -> tuple[Tensor, list[slice]]:
    """One prompt `[L, E]` and where its images are."""
    ids, images = sample
    batch = model.embed_prompts(ids[None], image_tokens=images)
    return batch.embeds[0], find_images(batch.image_of[0])


def attend_slowly(layer, hidden: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One decoder layer from its formulae: `[L, E]` to the same, its attention map `[H, L, L]` and keys `[h, L, d]`."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    queries, keys, values = (
        getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for name in "qkv"
    )
    queries, keys = (each[0] for each in apply_rotary_pos_emb(queries[None], keys[None], cos, sin))
    repeated, values = (each.repeat_interleave(len(queries) // len(each), dim=0) for each in (keys, values))
    products = queries @ repeated.transpose(-1, -2) / attention.head_dim**0.5
    weights = products.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    mixed = (weights @ values).transpose(0, 1).flatten(1)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights, keys


def read_masked(model, method, sample, answer: Tensor) -> Tensor:
    """Logits for each token of an answer, from one pass over prompt and answer: dropped tokens stay, unseen.

    From the layer on before which a token is dropped, nobody reads it any more. Positions are those of the whole
    sequence. What is dropped is decided on the whole attention maps of the layers.
    """
    embeds, images = embed(model, sample)
    num_prompt = len(embeds)
    hidden = torch.cat([embeds, model.get_input_embeddings()(answer)])
    length = len(hidden)
    cos, sin = model.model.rotary_emb(hidden[None], position_ids=torch.arange(length)[None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    alive, maps = torch.ones(length, dtype=torch.bool), []
    drops = method.layers(NUM_LAYERS)
    for number, layer in enumerate(model.model.layers):
        if number in drops:
            before = alive.clone()
            for image in images:
                view = SlowView(model, maps, hidden[:num_prompt], before[:num_prompt], number, image, embeds, cos, sin)
                view.text = [int((before[:place]).sum()) for place in find_text(num_prompt, images, image)]
                view.input_text = find_text(num_prompt, images, image)
                left = method.reduce(view)
                assert left.merged is None
                places = torch.arange(image.start, image.stop)[before[image]]
                alive[places] = False
                alive[places[left.kept]] = True
        # A dropped token still sees itself: its row needs something to attend to, and nobody reads the row.
        allowed = causal & (alive[None, :] | torch.eye(length, dtype=torch.bool))
        hidden, *looked_at = attend_slowly(layer, hidden, cos, sin, allowed)
        maps.append(looked_at)
    return model.lm_head(model.model.norm(hidden))[num_prompt - 1 : -1]


@dataclasses.dataclass
class SlowView:
    """What a method looks at, cut out of whole maps over the whole prompt."""

    model: LlavaLlamaForCausalLM
    maps: list[list[Tensor]]
    whole: Tensor
    alive: Tensor
    layer: int
    input_image: slice
    inputs: Tensor
    cos: Tensor
    sin: Tensor
    num_layers: int = NUM_LAYERS

    def __post_init__(self):
        self.places = self.alive.nonzero().flatten()
        inside = (self.places >= self.input_image.start) & (self.places < self.input_image.stop)
        start = int((self.places < self.input_image.start).sum())
        self.image = slice(start, start + int(inside.sum()))
        self.num_original = self.input_image.stop - self.input_image.start
        self.hidden, self.positions = self.whole[self.places], self.places
        self.text = self.input_text = None
        self.frequencies = self.model.model.rotary_emb.inv_freq

    def past_attention(self, rows):
        rows = self.places[list(rows)]
        return self.maps[self.layer - 1][0][:, rows][:, :, self.places]

    def next_attention(self, rows):
        length = len(self.places)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        cos, sin = self.cos[:, self.places], self.sin[:, self.places]
        _, weights, _ = attend_slowly(self.model.model.layers[self.layer], self.hidden, cos, sin, causal)
        return weights[:, list(rows)]

    def past_keys(self):
        return self.maps[self.layer - 1][1][:, self.places]

    def normed(self):
        return self.model.model.norm(self.hidden)


def read_shortened(model, method, sample, answer: Tensor) -> Tensor:
    """Logits for each token of an answer: every one from a pass of its own, over really shortened sequences.

    Positions are those that the method asks for. What is dropped is decided while the prompt alone is read.
    """
    logits, decisions = [], []
    for num_new in range(len(answer)):
        logits.append(_read_once(model, method, sample, answer[:num_new], decisions))
    return torch.stack(logits)


def _read_once(model, method, sample, answer: Tensor, decisions: list) -> Tensor:
    embeds, images = embed(model, sample)
    inputs, spans = embeds, list(images)
    hidden = torch.cat([embeds, model.get_input_embeddings()(answer)])
    positions = torch.arange(len(hidden))
    decided, num_drop = bool(decisions), 0
    behind = keys_before = None
    for number, layer in enumerate(model.model.layers):
        if number in method.layers(NUM_LAYERS):
            if not decided:
                end = len(hidden) - len(answer)
                views = [
                    OneView(
                        *(model.model, None, 0, number, behind[:end], hidden[:end], positions[:end], torch.arange(end)),
                        *(span, find_text(end, spans, span), inputs, image, find_text(len(inputs), images, image)),
                    )
                    for span, image in zip(spans, images, strict=True)
                ]
                for view in views:
                    object.__setattr__(view, "keys", keys_before[:, :end])
                decisions.append([method.reduce(view) for view in views])
            pieces, places, moved, start, length = [], [], [], 0, 0
            for span, left in zip(spans, decisions[num_drop], strict=True):
                merged = hidden[:0] if left.merged is None else left.merged
                own = [hidden[start : span.start], hidden[span][left.kept], merged]
                pieces += own
                places += [positions[start : span.start], positions[span][left.kept], torch.zeros(len(merged)).long()]
                length += len(own[0])
                moved.append(slice(length, length + len(own[1]) + len(merged)))
                length, start = moved[-1].stop, span.stop
            hidden, spans = torch.cat([*pieces, hidden[start:]]), moved
            positions = torch.cat([*places, positions[start:]])
            if method.position_ids == "packed":
                positions = torch.arange(len(hidden))
            num_drop += 1
        behind = hidden
        cos, sin = model.model.rotary_emb(hidden[None], position_ids=positions[None])
        causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
        hidden, _, keys_before = attend_slowly(layer, hidden, cos, sin, causal)
    return model.lm_head(model.model.norm(hidden))[-1]


class OneView(SampleView):
    """The view of a prompt without a cache."""

    def past_keys(self):
        return self.keys


def answer_together(model, samples, num_new: int) -> tuple[list[list[int]], Tensor]:
    """Greedy ids of a batch by `generate`, and the logits they come from, `[S, num_new, V]`."""
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(own) for own, _ in samples])
    mask = torch.arange(ids.shape[1]) >= (ids.shape[1] - lengths)[:, None]
    images = [image for _, own in samples for image in own]
    found = model.generate(
        ids,
        attention_mask=mask,
        image_tokens=images,
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences.tolist(), torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_with_nothing_dropped_logits_are_those_of_the_plain_model(model, reduced, spec):
    samples = make_samples(8)
    model.take_reduction(parse_reduction(None))
    plain_ids, plain = answer_together(model, samples, 6)
    ids, logits = answer_together(reduced(spec), samples, 6)
    assert ids == plain_ids
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", [name for name, spec in DROPPING.items() if parse_reduction(spec).inside.position_ids == "original"]
)
def test_dropping_equals_masking_the_dropped_tokens_from_those_layers_on(model, reduced, name):
    method = parse_reduction(DROPPING[name]).inside
    samples = make_samples(64, seed=1)
    together = [answer_together(reduced(DROPPING[name]), samples[start : start + 8], 32) for start in range(0, 64, 8)]
    ids = [row for rows, _ in together for row in rows]
    logits = torch.cat([own for _, own in together])
    for number, (sample, own) in enumerate(zip(samples, ids, strict=True)):
        expected = read_masked(model, method, sample, torch.tensor(own))
        torch.testing.assert_close(logits[number], expected, atol=1e-4, rtol=0)
    alone = [answer_together(model, [sample], 32)[0][0] for sample in samples[:16]]
    assert alone == ids[:16]


@pytest.mark.parametrize("name", DROPPING)
def test_dropping_equals_reading_shortened_sequences_token_by_token(model, reduced, name):
    method = parse_reduction(DROPPING[name]).inside
    samples = make_samples(8, seed=2) + make_samples(4, seed=3, num_images=2)
    ids, logits = answer_together(reduced(DROPPING[name]), samples, 5)
    for sample, own, row in zip(samples, ids, logits, strict=True):
        expected = read_shortened(model, method, sample, torch.tensor(own))
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DROPPING)
def test_the_cache_holds_the_counts_that_the_method_names(model, reduced, name):
    method = parse_reduction(DROPPING[name]).inside
    sample = make_samples(1, seed=4)[0]
    batch = model.embed_prompts(sample[0][None], image_tokens=sample[1], padding_side="left")
    cache = reduced(DROPPING[name]).make_cache(batch)
    model(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, past_key_values=cache)
    num_tokens = sample[1][0].num_tokens
    num_text = len(sample[0]) - 1
    counts = (num_tokens, *method.counts(num_tokens, NUM_LAYERS))
    firsts = (0, *method.layers(NUM_LAYERS))
    expected = [counts[sum(first <= layer for first in firsts) - 1] for layer in range(NUM_LAYERS)]
    assert [layer.keys.shape[2] - num_text for layer in cache.layers] == expected
    assert expected[-1] < num_tokens
    assert method.mean_tokens(num_tokens, NUM_LAYERS) == pytest.approx(sum(expected) / NUM_LAYERS)


@pytest.mark.parametrize("name", DROPPING)
def test_an_answer_does_not_depend_on_its_batch_and_both_decoders_give_it(model, reduced, name):
    samples = make_samples(5, seed=5) + make_samples(3, seed=6, num_images=2)
    reduced(DROPPING[name])
    together, _ = answer_together(model, samples, 8)
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    shuffled, _ = answer_together(model, [samples[place] for place in order], 8)
    assert shuffled == [together[place] for place in order]
    alone = [answer_together(model, [sample], 8)[0][0] for sample in samples]
    assert alone == together
    decoded = GreedyDecoder(model).decode([ids for ids, _ in samples], [images for _, images in samples], 8)
    assert decoded == together


def test_rows_that_finish_early_leave_the_others_as_they_are(model, reduced):
    samples = make_samples(6, seed=7)
    reduced(DROPPING["SparseVLM"])
    whole, _ = answer_together(model, samples, 8)
    ends = {row[index] for index, row in enumerate(whole)}
    decoder = GreedyDecoder(model, ends)
    found = decoder.decode([ids for ids, _ in samples], [images for _, images in samples], 8)
    cut = [row[: next((place for place, token in enumerate(row) if token in ends), 8)] for row in whole]
    assert found == cut
    assert len({len(row) for row in cut}) > 1


def test_beams_go_on_from_their_own_samples(model, reduced):
    samples = make_samples(3, seed=8)
    reduced(DROPPING["PyramidDrop"])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    alone = [model.generate(ids[None], image_tokens=images, **options)[0].tolist() for ids, images in samples]
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True, padding_side="left")
    images = [image for _, own in samples for image in own]
    assert model.generate(ids, image_tokens=images, **options).tolist() == alone


def test_a_prompt_without_an_image_is_answered_as_without_a_method(model, reduced):
    text = (torch.tensor([5, 6, 7, 8]), [])
    samples = [text, *make_samples(2, seed=9)]
    plain, _ = answer_together(model, [text], 6)
    together, _ = answer_together(reduced(DROPPING["SparseVLM"]), samples, 6)
    assert together[0] == plain[0]


def test_a_forward_pass_reads_what_generate_reads_and_labels_switch_the_method_off(model, reduced):
    ids, images = make_samples(1, seed=10)[0]
    images = [image.features for image in images]
    model.take_reduction(parse_reduction(None))
    whole = model.embed_prompts(ids[None], image_tokens=[ImageTokens(each, len(each)) for each in images])
    plain = model(inputs_embeds=whole.embeds, attention_mask=whole.attention_mask).logits
    _, expected = answer_together(reduced(DROPPING["FastV"]), [(ids, [ImageTokens(images[0], 1)])], 1)
    cache = model.make_cache(whole)
    found = model(inputs_embeds=whole.embeds, attention_mask=whole.attention_mask, past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], expected[:, 0], atol=1e-5, rtol=0)
    assert found.shape[1] < plain.shape[1]


def test_prompts_are_not_read_ahead_where_what_leaves_depends_on_them(model, reduced):
    samples = make_samples(1, seed=11) * 4
    tokens = [images for _, images in samples]
    sampling = Sampling(max_new_tokens=4)
    reduced(None)
    assert Generator(model, None).shares_images(tokens, sampling)
    assert not Generator(reduced(DROPPING["FastV"]), None).shares_images(tokens, sampling)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("FastV:0.5,layer=0", "before layer 0: use 1 to 7"),
        ("FastV:0.5,layer=8", "before layer 8: use 1 to 7"),
        ("PyramidDrop:0.5,stages=2/9", "before layer 9: use 1 to 7"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_named(model, spec, says):
    with pytest.raises(InputError, match=says):
        model.take_reduction(parse_reduction(spec))
    assert model.layer_reducer is None


def test_an_average_below_what_the_first_layers_read_is_refused():
    method = parse_reduction("PyramidDrop:64").inside
    with pytest.raises(InputError, match=r"at least 14[45] on average: use earlier layers"):
        method.counts(576, 32)


@pytest.mark.parametrize(
    ("spec", "num_layers", "counts", "mean"),
    [
        ("FastV:64", 32, (64,), 96),
        ("FastV:0.5", 32, (288,), 306),
        ("PyramidDrop", 32, (288, 144, 72), 270),
        ("SparseVLM:192", 32, (309, 204, 113), 206.5),
        ("SparseVLM:128", 32, (312, 117, 39), 145.4),
        ("SparseVLM:64", 32, (82, 32, 18), 82.25),
        ("SparseVLM+:64", 32, (66, 34, 20), None),
        ("DART:128", 32, (132,), None),
        ("DART:64", 32, (68,), None),
    ],
)
def test_published_settings_leave_the_published_counts(spec, num_layers, counts, mean):
    method = parse_reduction(spec).inside
    assert method.counts(576, num_layers) == counts
    if mean is not None:
        assert method.mean_tokens(576, num_layers) == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize("name", LAYER_REDUCERS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 36, 64, 576])
@pytest.mark.parametrize("num_layers", [3, 6, 32, 40])
def test_every_image_keeps_a_token_at_every_size(name, num_tokens, num_layers):
    for budget in ("0.001", "0.3", "1.0"):
        method = parse_reduction(f"{name}:{budget}").inside
        counts = method.counts(num_tokens, num_layers)
        layers = method.layers(num_layers)
        assert len(counts) == len(layers) and list(layers) == sorted(set(layers)) and layers[0] >= 1
        assert layers[-1] < num_layers
        assert all(1 <= after <= before for before, after in zip((num_tokens, *counts), counts, strict=False))
        assert budget != "1.0" or counts == (num_tokens,) * len(layers)


@pytest.mark.parametrize("spec", [*DROPPING.values(), *EVERYTHING.values()])
def test_a_spec_parses_back_alone_and_behind_another(spec):
    reduction = parse_reduction(spec)
    assert parse_reduction(reduction.spec()) == reduction
    composed = parse_reduction(f"TRIM:-1 | {spec}")
    assert composed.before == parse_reduction("TRIM:-1").before and composed.inside == reduction.inside
    assert parse_reduction(composed.spec()) == composed and composed.spec().startswith("TRIM:-1|")
