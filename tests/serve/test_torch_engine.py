"""Answers written together are those written alone, whatever joins, leaves, fails or is given up beside them."""

import asyncio
import gc
import random
import time
from contextlib import aclosing

import pytest
import torch

from llava.chat import ChatSession
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.sampling import Sampling
from llava.serve.engine import FINISHED_BY_LENGTH, FINISHED_BY_STOP, Prompt, Search
from llava.serve.front import Front, Message
from llava.serve.torch_engine import TorchEngine, _Answer
from tests.families import FAMILIES, WIDTH, write_checkpoint

SPECS = (None, "none", "TRIM:0.25", "FasterVLM:0.25", "Pool:16")
COLOR, LONG = "What color is the circle?", "Describe the image in detail."
QUESTIONS = (COLOR, LONG, "Is there a red square?", "How many objects are there?")


def user(*parts):
    return Message("user", parts)


def greedy(max_new_tokens=12, **options):
    return Search(Sampling(max_new_tokens=max_new_tokens), **options)


def run(work, model, tokenizer, **options):
    """Run `work(engine)` with an engine that is started and closed."""

    async def serve():
        engine = TorchEngine(model, tokenizer, **options)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(serve())


async def collect(engine, prompt, search):
    """Return the pieces of an answer."""
    return [piece async for piece in engine.answer(prompt, search)]


def ids_of(pieces):
    return [token for piece in pieces for token in piece.token_ids]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def prepare(llava, *requests):
    """Make the prompts of `(messages, spec)` each."""

    async def serve():
        front = Front(llava)
        prompts = await asyncio.gather(*(front.prepare(*request) for request in requests))
        await front.close()
        return prompts

    return asyncio.run(serve())


def generate(model, prompt, max_new_tokens=12):
    """The ids that transformers' generate gives for a prompt alone."""
    mask = torch.ones(1, prompt.num_tokens, dtype=torch.bool)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(inputs_embeds=prompt.embeds[None], attention_mask=mask, **options)[0].tolist()


# -------------------------------------------------------------------------------------------------------- many at once
def test_two_hundred_mixed_requests_eight_at_a_time_get_their_own_answers(llava, images):
    draw = random.Random(0)
    requests = []
    for number in range(200):
        shown = draw.sample(images, k=number % 4)
        requests.append(([user(*shown, draw.choice(QUESTIONS))], draw.choice(SPECS)))

    async def work(engine):
        front, gate = Front(llava), asyncio.Semaphore(8)

        async def ask(messages, spec):
            async with gate:
                prompt = await front.prepare(messages, spec)
                return prompt, await collect(engine, prompt, greedy(6))

        answers = await asyncio.gather(*(ask(*request) for request in requests))
        await front.close()
        return answers

    expected = {}
    for (messages, spec), (prompt, pieces) in zip(requests, run(work, llava.model, llava.tokenizer), strict=True):
        if prompt.key not in expected:
            # The prompt made alone, and its answer alone.
            (alone,) = prepare(llava, (messages, spec))
            assert alone.key == prompt.key
            expected[prompt.key] = generate(llava.model, alone, 6)
        assert ids_of(pieces) == expected[prompt.key]
        assert len(prompt.images) == sum(not isinstance(part, str) for part in messages[0].parts)
    assert len(expected) > 100


def test_a_served_question_is_answered_as_ask_answers_it(llava, images):
    requests = [([user(image, question)], None) for image in images[:4] for question in QUESTIONS]
    prompts = prepare(llava, *requests)

    async def work(engine):
        return await asyncio.gather(*(collect(engine, prompt, greedy(32)) for prompt in prompts))

    for (messages, _), pieces in zip(requests, run(work, llava.model, llava.tokenizer), strict=True):
        assert text_of(pieces).strip() == llava.ask(*messages[0].parts, max_new_tokens=32).text


def test_a_served_dialogue_is_answered_as_a_chat_answers_it(llava, images):
    session = ChatSession(llava.model, llava.tokenizer, llava.image_processor, llava.conv_mode)
    session.show(images[:2])
    turns = [session.ask(question, Sampling(max_new_tokens=24)).text for question in QUESTIONS]

    async def work(engine):
        front, messages, answers = Front(llava), [], []
        for number, question in enumerate(QUESTIONS):
            messages.append(user(*images[:2], question) if number == 0 else user(question))
            answers.append(text_of(await collect(engine, await front.prepare(messages), greedy(24))))
            messages.append(Message("assistant", (answers[-1],)))
        await front.close()
        return answers

    assert [text.strip() for text in run(work, llava.model, llava.tokenizer)] == turns


@pytest.mark.parametrize("name", FAMILIES)
def test_every_language_model_answers_rows_as_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, model, _, _ = load_pretrained_model(str(write_checkpoint(tmp_path / "model", name)), device="cpu")
    lengths = [40, 7, 23, 1, 60, 11]
    draw = torch.Generator().manual_seed(0)
    prompts = [Prompt(torch.randn(length, WIDTH, generator=draw), (), str(length)) for length in lengths]

    async def work(engine):
        limits = [30, 4, 12, 70, 8, 20]
        return await asyncio.gather(
            *(collect(engine, *pair) for pair in zip(prompts, map(greedy, limits), strict=True))
        ), limits

    answers, limits = run(work, model, tokenizer, max_batch=3)
    for prompt, pieces, limit in zip(prompts, answers, limits, strict=True):
        assert ids_of(pieces) == generate(model, prompt, limit)


# ------------------------------------------------------------------------------------------------- joining and leaving
def test_an_answer_that_is_given_up_frees_its_place(llava, images):
    prompts = prepare(llava, *(([user(image, LONG)], "none") for image in images))

    async def work(engine):
        first = engine.answer(prompts[0], greedy(1500))
        async with aclosing(first):
            assert (await anext(first)).finish_reason is None
            # The only place is taken: these wait, and two of them are given up before their turn.
            waiting = [asyncio.create_task(collect(engine, prompt, greedy(4))) for prompt in prompts[1:5]]
            await asyncio.sleep(0)
            assert engine.count_waiting() == 4
            for task in waiting[:2]:
                task.cancel()
            await asyncio.sleep(0.01)
            assert engine.count_waiting() == 2
        answers = await asyncio.gather(*waiting[2:])
        assert engine.count_waiting() == 0
        return answers

    assert [len(ids_of(pieces)) for pieces in run(work, _endless(llava), llava.tokenizer, max_batch=1)] == [4, 4]


def _endless(llava):
    """The model with an end token that never comes, for the lifetime of one engine."""

    class Endless:
        generation_config = type(llava.model.generation_config)(eos_token_id=[])

        def __getattr__(self, name):
            return getattr(llava.model, name)

        def __call__(self, **inputs):
            return llava.model(**inputs)

    return Endless()


def test_what_a_long_prompt_took_is_given_back_when_it_leaves(llava, images):
    long, short = prepare(llava, ([user(*images, LONG)], "none"), ([user("Hi")], "none"))
    widths = []

    async def work(engine):
        other = asyncio.create_task(collect(engine, long, greedy(3)))
        async for _ in engine.answer(short, greedy(30)):
            if engine._rows is not None:
                widths.append(engine._rows.mask.shape[1])
        await other

    run(work, _endless(llava), llava.tokenizer)
    assert max(widths) > long.num_tokens > 500
    assert widths[-1] <= short.num_tokens + 31


def test_where_memory_does_not_last_answers_go_on_in_fewer_places(llava, images):
    prompts = prepare(llava, *(([user(image, LONG)], None) for image in images))

    class Small(type(_endless(llava))):
        generation_config = llava.model.generation_config
        refused = 0

        def __call__(self, attention_mask, **inputs):
            # Three prompts fit, but only two that have grown.
            if len(attention_mask) > 3 or (
                len(attention_mask) == 3 and attention_mask.shape[1] > prompts[0].num_tokens + 9
            ):
                Small.refused += 1
                raise torch.OutOfMemoryError("full")
            return llava.model(attention_mask=attention_mask, **inputs)

    async def work(engine):
        return await asyncio.gather(*(collect(engine, prompt, greedy(16)) for prompt in prompts))

    answers = run(work, Small(), llava.tokenizer)
    assert Small.refused > 2
    for prompt, pieces in zip(prompts, answers, strict=True):
        assert ids_of(pieces) == generate(llava.model, prompt, 16)


def test_a_prompt_that_does_not_fit_into_memory_even_alone_is_refused_alone(llava, images):
    long, *prompts = prepare(
        llava, ([user(*images, COLOR)], "none"), *(([user(image, COLOR)], None) for image in images)
    )

    class Small(type(_endless(llava))):
        generation_config = llava.model.generation_config

        def __call__(self, attention_mask, **inputs):
            if attention_mask.shape[1] > 300:
                raise torch.OutOfMemoryError("full")
            return llava.model(attention_mask=attention_mask, **inputs)

    async def work(engine):
        tasks = [collect(engine, prompt, greedy()) for prompt in (*prompts[:4], long, *prompts[4:])]
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = run(work, Small(), llava.tokenizer)
    assert isinstance(answers.pop(4), InputError)
    for prompt, pieces in zip(prompts, answers, strict=True):
        assert ids_of(pieces) == generate(llava.model, prompt)


def test_an_error_of_one_row_ends_that_row_alone(llava, images):
    prompts = prepare(llava, *(([user(image, COLOR)], None) for image in images[:3]))
    broken = Prompt(torch.zeros(5, 7), (), "of another width")
    undrawable = Prompt(torch.full_like(prompts[0].embeds, float("nan")), (), "not a number")

    async def work(engine):
        drawn = Search(Sampling(temperature=1.0, max_new_tokens=4))
        tasks = [collect(engine, prompt, greedy()) for prompt in prompts]
        tasks += [collect(engine, broken, greedy()), collect(engine, undrawable, drawn)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answers, first, second = run(work, llava.model, llava.tokenizer)
    assert isinstance(first, RuntimeError) and isinstance(second, RuntimeError)
    for prompt, pieces in zip(prompts, answers, strict=True):
        assert ids_of(pieces) == generate(llava.model, prompt)


def find_alive():
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, (_Answer, Prompt))]


def test_nothing_of_an_answer_stays_behind(llava, images):
    # Errors that pytest has recorded of other tests hold on to the prompts of these.
    others = find_alive()

    def count_left():
        return sum(all(each is not other for other in others) for each in find_alive())

    async def work(engine):
        front = Front(llava, cache_bytes=10**6)
        for _ in range(3):
            prompts = await asyncio.gather(*(front.prepare([user(image, COLOR)]) for image in images))
            await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in prompts))
        del prompts
        end = time.monotonic() + 10  # threads let go of their last work in their own time
        while (left := count_left()) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await front.close()
        return left, engine._rows

    assert run(work, llava.model, llava.tokenizer) == (0, None)


def test_closing_ends_answers_that_are_being_written(llava, images):
    (prompt,) = prepare(llava, ([user(images[0], LONG)], None))

    async def work(engine):
        tasks = [asyncio.create_task(collect(engine, prompt, greedy(1500))) for _ in range(3)]
        while engine.count_waiting():
            await asyncio.sleep(0.01)
        await engine.close()
        return await asyncio.gather(*tasks)

    answers = run(work, _endless(llava), llava.tokenizer, max_batch=2)
    assert all(pieces[-1].finish_reason is None if pieces else True for pieces in answers)


# ------------------------------------------------------------------------------------------------------ one answer
def test_reasons_limits_and_end_tokens(llava, images):
    (prompt,) = prepare(llava, ([user(images[0], COLOR)], None))

    async def work(engine):
        return [
            await collect(engine, prompt, search) for search in (greedy(50), greedy(2), greedy(50, stop=("circle",)))
        ]

    whole, cut, stopped = run(work, llava.model, llava.tokenizer)
    assert whole[-1].finish_reason == FINISHED_BY_STOP and ids_of(whole)[-1] == 2 and "</s>" not in text_of(whole)
    assert cut[-1].finish_reason == FINISHED_BY_LENGTH and ids_of(cut) == ids_of(whole)[:2]
    assert stopped[-1].finish_reason == FINISHED_BY_STOP and text_of(stopped) == text_of(whole).split("circle")[0]
    assert [piece.finish_reason for piece in whole[:-1]] == [None] * (len(whole) - 1)


def test_an_answer_ends_with_the_models_positions(llava):
    limit = llava.model.config.max_position_embeddings
    width = llava.model.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    nearly, full = (Prompt(torch.randn(size, width, generator=draw), (), "") for size in (limit - 3, limit))

    async def work(engine):
        with pytest.raises(InputError, match="none is left for an answer"):
            await collect(engine, full, greedy())
        return await collect(engine, nearly, greedy(100))

    pieces = run(work, _endless(llava), llava.tokenizer)
    assert len(ids_of(pieces)) == 3 and pieces[-1].finish_reason == FINISHED_BY_LENGTH


@pytest.mark.parametrize("end", ["circle", "</s>"])
def test_the_templates_end_of_turn_ends_the_answer_as_a_text_or_as_a_token(llava, images, end):
    (prompt,) = prepare(llava, ([user(images[0], COLOR)], None))
    ended = Prompt(prompt.embeds, prompt.images, prompt.key, end)

    async def work(engine):
        return await collect(engine, ended, greedy(30))

    pieces = run(work, _endless(llava), llava.tokenizer)
    assert pieces[-1].finish_reason == FINISHED_BY_STOP and end not in text_of(pieces)


def test_a_seeded_answer_does_not_depend_on_what_is_answered_beside_it(llava, images):
    prompts = prepare(llava, *(([user(image, COLOR)], None) for image in images))
    searches = [
        Search(Sampling(temperature=3.0, top_p=top_p, seed=seed, max_new_tokens=10))
        for top_p, seed in zip((None, 0.9) * 4, (1, 2, 3, 2**64 - 1, 5, 6, 7, 8), strict=True)
    ]
    pairs = list(zip(prompts, searches, strict=True))

    async def together(engine):
        return await asyncio.gather(*(collect(engine, *pair) for pair in pairs))

    async def alone(engine):
        return [await collect(engine, *pair) for pair in reversed(pairs)]

    first = [ids_of(pieces) for pieces in run(together, llava.model, llava.tokenizer)]
    second = [ids_of(pieces) for pieces in run(alone, llava.model, llava.tokenizer)]
    assert first == second[::-1]


def test_without_a_seed_draws_differ(llava, images):
    (prompt,) = prepare(llava, ([user(images[0], COLOR)], None))
    search = Search(Sampling(temperature=5.0, max_new_tokens=8))

    async def work(engine):
        return await asyncio.gather(*(collect(engine, prompt, search) for _ in range(4)))

    assert len({tuple(ids_of(pieces)) for pieces in run(work, llava.model, llava.tokenizer)}) > 1


def test_draws_follow_temperature_and_top_p(llava):
    """Of 0.6, 0.3 and 0.1, temperature 0.5 makes 36 : 9 : 1, and top_p 0.9 leaves the first two."""
    logits = torch.tensor([0.1, 0.6, 0.3]).log()

    async def draw(**options):
        answer = _Answer(Prompt(torch.zeros(1, 1), (), ""), Search(Sampling(seed=0, **options)), frozenset(), None, 1)
        return torch.tensor([answer.draw(logits) for _ in range(4000)]).bincount(minlength=3) / 4000

    drawn = asyncio.run(draw(temperature=0.5))
    torch.testing.assert_close(drawn, torch.tensor([1, 36, 9]) / 46, atol=0.02, rtol=0)
    drawn = asyncio.run(draw(temperature=1.0, top_p=0.85))
    torch.testing.assert_close(drawn, torch.tensor([0, 2, 1]) / 3, atol=0.02, rtol=0)


def test_logprobs_are_the_models_before_temperature(llava, images):
    (prompt,) = prepare(llava, ([user(images[0], COLOR)], None))
    search = Search(Sampling(temperature=2.0, seed=1, max_new_tokens=6), num_logprobs=3)

    async def work(engine):
        return await collect(engine, prompt, search)

    pieces = run(work, llava.model, llava.tokenizer)
    ids = ids_of(pieces)
    with torch.inference_mode():
        table = llava.model.get_input_embeddings()
        embeds = torch.cat([prompt.embeds, table(torch.tensor(ids[:-1]))])[None]
        mask = torch.ones(embeds.shape[:2])
        logits = llava.model(inputs_embeds=embeds, attention_mask=mask).logits[0, prompt.num_tokens - 1 :]
    expected = logits.log_softmax(dim=-1)
    told = [record for piece in pieces for record in piece.logprobs]
    assert [record.token_id for record in told] == ids
    for record, row in zip(told, expected, strict=True):
        assert record.logprob == pytest.approx(float(row[record.token_id]), abs=1e-4)
        assert [token for token, _, _ in record.top] == row.topk(3).indices.tolist()
    text = "".join(record.text for record in told)
    assert text.strip().startswith(text_of(pieces).strip()[:8])


def test_a_checkpoint_that_asks_for_another_search_is_refused(llava):
    model = _endless(llava)
    model.generation_config = type(llava.model.generation_config)(repetition_penalty=1.2, eos_token_id=2)
    with pytest.raises(InputError, match="repetition_penalty"):
        TorchEngine(model, llava.tokenizer)
