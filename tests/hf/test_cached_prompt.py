"""Caches that outlive a call under `reduce_tokens`: dialogues go on from them, or they are refused."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llava.errors import InputError
from llava.hf import reduce_tokens

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
SPECS = ["TRIM:0.25", "FasterVLM:9", "Pool:9", None]
INSIDE = ["FastV:0.5,layer=1", "TRIM:0.5|FastV:0.5,layer=1"]
NEXT = torch.tensor([[29871, 13, 11889, 29901, 825, 29973, 319, 1799, 9047, 13566, 29901]]) % 900 + 20


@pytest.fixture(params=SPECS, ids=str)
def reduction(request, pair, clip):
    """With one text for all prompts, so that a dialogue read anew keeps the same patches."""
    held, _, tokenizer = pair
    return reduce_tokens(held, request.param, clip=clip, texts="the red circle", tokenizer=tokenizer)


@pytest.fixture
def plain(pair, clip):
    """A reduction whose method does not matter."""
    return reduce_tokens(pair[0], "FasterVLM:9")


def make_cache(held, kind: str):
    config = held.config.text_config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=600)


def go_on(whole: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
    """The next turn, as transformers has it: the dialogue up to now with a new question, and its mask."""
    ids = torch.cat([whole, NEXT.expand(len(whole), -1)], dim=1)
    behind = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], behind], dim=1)}


@pytest.mark.parametrize(("filled_by", "num_samples"), [("generate", 1), ("generate", 4), ("forward", 4)])
def test_a_dialogue_goes_on_from_its_cache_as_if_it_were_read_anew(
    held, reduction, samples, lay_out, filled_by, num_samples
):
    inputs = lay_out.inputs(held, samples[:num_samples])
    with reduction:
        if filled_by == "generate":
            first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            whole, cache = first.sequences, first.past_key_values
        else:
            whole = inputs["input_ids"]
            with torch.no_grad():
                cache = held(**inputs, use_cache=True).past_key_values
        turn = go_on(whole, inputs)
        images = {name: value for name, value in inputs.items() if name not in turn}
        expected = held.generate(**turn, **images, **GREEDY)
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            found = held.generate(**turn, **GREEDY, past_key_values=each)
            assert torch.equal(found, expected)
        # A third turn, without a mask where no row is padded.
        third = go_on(expected, inputs)
        expected = held.generate(**third, **images, **GREEDY)
        if num_samples == 1:
            del third["attention_mask"]
        assert torch.equal(held.generate(**third, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("spec", INSIDE)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_where_tokens_leave_between_layers_a_turn_is_read_as_token_by_token(
    pair, samples, lay_out, clip, spec, num_samples
):
    """Read anew, other tokens would leave: the last word of the whole dialogue would choose."""
    held, _, tokenizer = pair
    inputs = lay_out.inputs(held, samples[:num_samples])
    with reduce_tokens(held, spec, clip=clip, texts="the red circle", tokenizer=tokenizer):
        first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        turn, cache = go_on(first.sequences, inputs), copy.deepcopy(first.past_key_values)
        found = held.generate(**turn, **GREEDY, past_key_values=first.past_key_values)
        new = turn["input_ids"][:, first.sequences.shape[1] - 1 :]  # the last id of the answer was not read yet
        with torch.no_grad():
            for token in new.split(1, dim=1):
                output = held(input_ids=token, past_key_values=cache)
            answer = []
            for _ in range(GREEDY["max_new_tokens"]):
                answer.append(output.logits[:, -1:].argmax(dim=-1))
                output = held(input_ids=answer[-1], past_key_values=cache)
    assert torch.equal(found[:, turn["input_ids"].shape[1] :], torch.cat(answer, dim=1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_callers_own_takes_several_turns(held, plain, samples, lay_out, kind):
    inputs = lay_out.inputs(held, samples[:1])
    cache = make_cache(held, kind)
    with plain:
        turn = go_on(held.generate(**inputs, **GREEDY, past_key_values=cache), inputs)
        images = {name: value for name, value in inputs.items() if name not in turn}
        expected = held.generate(**turn, **images, **GREEDY)
        assert torch.equal(held.generate(**turn, **GREEDY, past_key_values=cache), expected)


def test_a_cache_of_one_prompt_serves_several_sequences(held, plain, samples, lay_out):
    inputs = lay_out.inputs(held, samples[:1])
    with plain:
        first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        turn = go_on(first.sequences, inputs)
        images = {name: value for name, value in inputs.items() if name not in turn}
        expected = held.generate(**turn, **images, **GREEDY)
        first.past_key_values.batch_repeat_interleave(3)
        turn = {name: value.repeat(3, 1) for name, value in turn.items()}
        found = held.generate(**turn, **GREEDY, past_key_values=first.past_key_values)
        assert torch.equal(found, expected.repeat(3, 1))


def test_an_interrupted_answer_leaves_a_cache_to_go_on_from(held, plain, samples, lay_out):
    class Interrupting:
        """A streamer whose reader is gone at the third call."""

        def __init__(self):
            self.calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

        def end(self):
            pass

    inputs = lay_out.inputs(held, samples[:1])
    cache = make_cache(held, "dynamic")
    with plain:
        answer = held.generate(**inputs, **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            held.generate(**inputs, **GREEDY, past_key_values=cache, streamer=Interrupting())
        turn = go_on(answer, inputs)
        images = {name: value for name, value in inputs.items() if name not in turn}
        expected = held.generate(**turn, **images, **GREEDY)
        assert torch.equal(held.generate(**turn, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_cache_of_a_reduced_prompt_is_refused_where_nobody_knows_of_it(held, plain, samples, lay_out, is_copied):
    inputs = lay_out.inputs(held, samples[:1])
    with plain:
        first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values) if is_copied else first.past_key_values
    turn = go_on(first.sequences, inputs)
    says = "go on inside the block that filled it"
    with pytest.raises(InputError, match=says):
        held.generate(**turn, **GREEDY, past_key_values=cache)
    with torch.no_grad(), pytest.raises(InputError, match=says):
        held(input_ids=NEXT, past_key_values=cache)
    with reduce_tokens(held, "FasterVLM:20"), pytest.raises(InputError, match=says):
        held.generate(**turn, **GREEDY, past_key_values=cache)
    with plain:
        held.generate(**turn, **GREEDY, past_key_values=cache)


def test_a_dialogue_that_the_cache_does_not_hold_is_refused_in_one_line(held, plain, samples, lay_out):
    inputs = lay_out.inputs(held, samples[:2])
    with plain:
        first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache, turn = first.past_key_values, go_on(first.sequences, inputs)
        other = turn["input_ids"].clone()
        other[:, 5] += 1
        embeds = held.get_input_embeddings()(turn["input_ids"])
        cases = [
            (turn | {"input_ids": other}, "do not begin with the prompts that the cache holds"),
            ({"input_ids": NEXT.repeat(2, 1)}, "do not begin with the prompts that the cache holds"),
            ({name: value[:1] for name, value in turn.items()}, "do not begin with the prompts that the cache holds"),
            ({"input_ids": first.sequences[:, :-1]}, "give what follows them as well"),
            (turn | {"attention_mask": inputs["attention_mask"]}, "this prompt and what follows it take"),
            ({"inputs_embeds": embeds}, "go on with input_ids of the whole dialogue"),
            (turn | {"prefill_chunk_size": 8}, "leave out prefill_chunk_size"),
        ]
        for wrong, says in cases:
            with pytest.raises(InputError, match=says) as raised:
                held.generate(**wrong, **GREEDY, past_key_values=cache)
            assert "\n" not in str(raised.value)
        cache.crop(5 - cache.get_seq_length())
        with pytest.raises(InputError, match="cut within a reduced prompt"):
            held.generate(**turn, **GREEDY, past_key_values=cache)


def test_a_cache_that_was_reset_is_like_a_new_one(held, plain, samples, lay_out):
    inputs, text = lay_out.inputs(held, samples[:1]), {"input_ids": NEXT, "attention_mask": torch.ones_like(NEXT)}
    expected = held.generate(**text, **GREEDY)
    cache = make_cache(held, "static")
    with plain:
        held.generate(**inputs, **GREEDY, past_key_values=cache)
        cache.reset()
        assert torch.equal(held.generate(**text, **GREEDY, past_key_values=cache), expected)
        cache.reset()
        held.generate(**inputs, **GREEDY, past_key_values=cache)
    cache.reset()
    assert torch.equal(held.generate(**text, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("spec", ["FasterVLM:9", "FastV:0.5,layer=1"])
def test_a_cache_is_freed_with_its_last_user(held, samples, lay_out, spec):
    """Not only when Python looks for cycles: it may hold gigabytes of a device."""
    inputs = lay_out.inputs(held, samples[:1])
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), reduce_tokens(held, spec):
            caches = [ref(held(**inputs, use_cache=True).past_key_values)]
            caches.append(ref(held.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values))
            before = sum(isinstance(each, DynamicCache) for each in gc.get_objects())
            held.generate(**inputs, **GREEDY)
            assert sum(isinstance(each, DynamicCache) for each in gc.get_objects()) == before
        assert [each() for each in caches] == [None, None]
    finally:
        gc.enable()


def test_a_cache_from_a_file_is_refused_in_words(held, plain, samples, lay_out):
    inputs = lay_out.inputs(held, samples[:1])
    with plain:
        first = held.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = pickle.loads(pickle.dumps(first.past_key_values))
        assert cache.get_seq_length() == first.past_key_values.get_seq_length()
        with pytest.raises(InputError, match="go on inside the block that filled it"):
            held.generate(**go_on(first.sequences, inputs), **GREEDY, past_key_values=cache)


def test_text_in_the_cache_goes_on_as_without_reduction(held, plain):
    text = {"input_ids": NEXT, "attention_mask": torch.ones_like(NEXT)}
    cache = make_cache(held, "dynamic")
    with plain:
        turn = go_on(held.generate(**text, **GREEDY, past_key_values=cache), text)
        found = held.generate(**turn, **GREEDY, past_key_values=cache)
    assert torch.equal(found, held.generate(**turn, **GREEDY))
