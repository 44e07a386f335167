"""vLLM behind the front gives the answers of our own `generate`; scripts/test_vllm.sh runs this in its environment."""

import asyncio
import base64
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")

import openai

from llava import Llava
from llava.cli import ModelSpec
from llava.errors import InputError
from llava.mm_utils import process_images
from llava.sampling import Sampling
from llava.serve.dialogue import Message, read_dialogue
from llava.serve.engine import FINISHED_BY_LENGTH, FINISHED_BY_STOP, Piece, Prompt, Search
from llava.serve.front import Front
from llava.serve.vllm_engine import VllmEngine
from playground.shapes.world import draw_scene
from tests.families import FAMILIES, write_checkpoint

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024}
"""vLLM's attention on a CPU has no smaller heads than 32, and two ranks share two of them."""
ENDS = [2, *range(300, 340)]
"""So many end tokens that some answers of a random model end before the limit."""
BLOCK = 32
OPTIONS = {"enforce_eager": True, "block_size": BLOCK}
SPECS = (None, "none", "TRIM:-1", "TRIM:0.25", "TRIM:7", "FasterVLM:0.5", "DivPrune:9", "Pool:9", "PruMerge+:0.25")
QUESTIONS = [
    f"{verb} the {thing}{end}"
    for verb in ("What color is", "Where is", "Describe", "How large is")
    for thing in ("circle", "square to the left", "triangle", "small thing above the red square")
    for end in ("?", " in one word.")
]
LENGTH = 24

Request = tuple[tuple[Message, ...], str | None]


@dataclass
class Served:
    """A checkpoint, whole for reference answers, and with its layers in vLLM."""

    llava: Llava
    front: Front
    engine: VllmEngine
    runner: asyncio.Runner

    def run(self, work):
        return self.runner.run(work)

    async def answer(self, request: Request, **settings) -> tuple[list[int], str, str | None]:
        """The ids, text and finish reason of an answer."""
        prompt = await self.front.prepare(*request)
        return join([piece async for piece in self.engine.answer(prompt, search(**settings))])

    @torch.inference_mode()
    def expect(self, request: Request, length: int = LENGTH) -> list[int]:
        """The ids of our own `generate` for this request alone."""
        messages, spec = request
        dialogue = read_dialogue(messages, self.front._template, self.llava.tokenizer)
        model, images = self.llava.model, list(dialogue.images)
        model.set_token_reduction("TRIM:-1" if spec is None else spec)
        pixels = process_images(images, self.llava.image_processor, model.config) if images else None
        ids = torch.tensor([dialogue.input_ids])
        return model.generate(ids, images=pixels, texts=[dialogue.query], max_new_tokens=length)[0].tolist()


def search(num_logprobs: int | None = None, stop: tuple[str, ...] = (), **sampling) -> Search:
    return Search(Sampling(**{"max_new_tokens": LENGTH, **sampling}), stop, num_logprobs)


def join(pieces: list[Piece]) -> tuple[list[int], str, str | None]:
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    ids = [number for piece in pieces for number in piece.token_ids]
    return ids, "".join(piece.text for piece in pieces), pieces[-1].finish_reason


def user(*parts: str | Image.Image) -> Message:
    return Message("user", parts)


@contextmanager
def serve(folder: Path, name: str = "llama", **options) -> Iterator[Served]:
    """Start vLLM on a random model of a family; end it afterwards."""
    checkpoint = str(write_checkpoint(folder / "model", name, **SIZES))
    (folder / "model/generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    whole = Llava.from_pretrained(checkpoint, device="cpu", reduce="TRIM:-1", conv_mode=FAMILIES[name][4])
    spec = ModelSpec(checkpoint, reduce="TRIM:-1", device="cpu")
    loaded = spec.load(without_layers=True)
    front = Front(Llava(loaded.tokenizer, loaded.model, loaded.image_processor, whole.conv_mode, spec))
    engine = VllmEngine(checkpoint, dtype="float32", options=OPTIONS, **options)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        try:
            yield Served(whole, front, engine, runner)
        finally:
            runner.run(engine.close())
            runner.run(front.close())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [draw_scene(1, 2, number)[0] for number in range(8)]


def draw_requests(images: list[Image.Image], count: int, seed: int = 0) -> list[Request]:
    """Questions about none to three images, each to be reduced in its own way; images and questions come again."""
    draw = random.Random(seed)
    return [
        ((user(*draw.sample(images, draw.choice((0, 1, 1, 2, 3))), draw.choice(QUESTIONS)),), draw.choice(SPECS))
        for _ in range(count)
    ]


async def answer_all(served: Served, requests: list[Request], at_a_time: int = 8) -> list[tuple[list[int], str, str]]:
    places = asyncio.Semaphore(at_a_time)

    async def answer(request: Request):
        async with places:
            return await served.answer(request)

    return await asyncio.gather(*map(answer, requests))


# ------------------------------------------------------------------------------------------------------------- answers
def test_200_mixed_requests_eight_at_a_time_get_the_answers_of_generate(served: Served, images) -> None:
    requests = draw_requests(images, 208)
    answers = served.run(answer_all(served, requests))
    for number, (request, (ids, text, reason)) in enumerate(zip(requests, answers, strict=True)):
        assert ids == served.expect(request), f"request {number}"
        assert reason == (FINISHED_BY_STOP if ids[-1] in ENDS else FINISHED_BY_LENGTH)
        shown = served.llava.tokenizer.decode(ids[:-1] if ids[-1] in ENDS else ids, skip_special_tokens=True)
        assert text == shown or "\N{REPLACEMENT CHARACTER}" in shown  # of bytes that are no characters
    assert len({tuple(ids) for ids, _, _ in answers}) > 150
    assert 20 < sum(reason == FINISHED_BY_STOP for _, _, reason in answers) < 188
    assert served.engine.count_waiting() == 0


def test_the_prefix_cache_never_mixes_questions_and_reductions_of_an_image(served: Served, images) -> None:
    draw = random.Random(1)
    for number in range(100):
        image = images[number % len(images)]
        questions, specs = draw.sample(QUESTIONS, 2), draw.sample(SPECS[1:], 2)
        pair = [((user(image, question),), spec) for question, spec in zip(questions, specs, strict=True)]
        for request in pair:
            assert served.run(served.answer(request))[0] == served.expect(request), f"pair {number}"


def test_prompts_share_the_blocks_that_they_have_in_common_and_no_others(served: Served, images) -> None:
    async def count_cached(prompt: Prompt) -> int:
        """Positions of a prompt that vLLM found in its cache."""
        from vllm import SamplingParams
        from vllm.inputs import embeds_input

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        outputs = served.engine._llm.generate(embeds_input(prompt_embeds=prompt.embeds), params, "cached")
        return [output.num_cached_tokens async for output in outputs][-1]

    async def run() -> list[int]:
        await served.engine._llm.reset_prefix_cache()
        embeds = 0.1 * torch.randn(4 * BLOCK + 5, 64, generator=torch.Generator().manual_seed(0))
        changed = embeds.clone()
        changed[2 * BLOCK + 3, 7] += 1e-6
        # Their placeholder ids are the same in all of them: only the embeddings tell them apart.
        return [await count_cached(Prompt(each, (), "same")) for each in (embeds, embeds, changed, changed, embeds)]

    assert served.run(run()) == [0, 4 * BLOCK, 2 * BLOCK, 4 * BLOCK, 4 * BLOCK]


async def close_while_answering(served: Served) -> list[Piece]:
    """Pieces of an answer that would take 700 tokens, from the first on."""
    prompt = await served.front.prepare((user(QUESTIONS[0]),))
    pieces = served.engine.answer(prompt, search(max_new_tokens=700, temperature=1.0))
    first = await anext(pieces)
    await served.engine.close()
    return [first, *[piece async for piece in pieces]]


@pytest.mark.parametrize("name", ["mistral", "mistral-window", "qwen2", "qwen"])
def test_other_language_models_give_the_answers_of_generate(name: str, images, tmp_path: Path) -> None:
    with serve(tmp_path, name) as served:
        requests = draw_requests(images, 24, seed=2)
        answers = served.run(answer_all(served, requests))
        assert [ids for ids, _, _ in answers] == [served.expect(request) for request in requests]


def test_two_tensor_parallel_ranks_give_the_answers_of_generate_and_end_when_told(images, tmp_path: Path) -> None:
    with serve(tmp_path, tensor_parallel_size=2) as served:
        requests = draw_requests(images, 64, seed=3)
        answers = served.run(answer_all(served, requests))
        assert [ids for ids, _, _ in answers] == [served.expect(request) for request in requests]
        ids, _, reason = join(served.run(close_while_answering(served)))
        assert len(ids) < 700 and (reason is None or ids[-1] in ENDS)


# -------------------------------------------------------------------------------------------------------------- search
def test_a_seeded_draw_is_the_same_alone_and_among_others(served: Served, images) -> None:
    request = ((user(images[0], QUESTIONS[0]),), "TRIM:-1")
    settings = {"temperature": 0.8, "top_p": 0.9}

    async def run():
        alone = await served.answer(request, seed=7, **settings)
        others = [served.answer(each, temperature=1.0) for each in draw_requests(images, 7, seed=4)]
        among, *_ = await asyncio.gather(served.answer(request, seed=7, **settings), *others)
        return alone, among, [await served.answer(request, seed=seed, **settings) for seed in (8, 9, 2**64 - 1)]

    alone, among, seeds = served.run(run())
    assert alone == among
    assert len({tuple(ids) for ids, _, _ in [alone, *seeds]}) == 4


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(served: Served, images) -> None:
    requests = draw_requests(images, 40, seed=5)
    whole = served.run(answer_all(served, requests))
    request, text = next((each, text) for each, (_, text, _) in zip(requests, whole, strict=True) if len(text) > 30)
    stop = text[11:15]  # begins and ends anywhere in tokens
    ids, short, reason = served.run(served.answer(request, stop=(stop, "never")))
    assert short == text[: text.index(stop)] and reason == FINISHED_BY_STOP
    assert ids == served.expect(request)[: len(ids)] and len(ids) < LENGTH


def test_the_templates_end_ends_an_answer_where_it_is_no_end_token(served: Served, images) -> None:
    prompt = served.run(served.front.prepare((user(images[0], QUESTIONS[0]),)))

    async def run(end: str | None) -> tuple[list[int], str, str | None]:
        ending = Prompt(prompt.embeds, prompt.images, prompt.key, end)
        return join([piece async for piece in served.engine.answer(ending, search())])

    ids, text, _ = served.run(run(None))
    begun, before, reason = served.run(run(text[5:8]))
    assert before == text[: text.index(text[5:8])] and begun == ids[: len(begun)] and reason == FINISHED_BY_STOP


@torch.inference_mode()
def test_logprobs_are_the_models_own_before_temperature(served: Served, images) -> None:
    request = ((user(images[1], QUESTIONS[3]),), "TRIM:0.25")

    async def run(**settings) -> tuple[Prompt, list[Piece]]:
        prompt = await served.front.prepare(*request)
        return prompt, [piece async for piece in served.engine.answer(prompt, search(**settings))]

    prompt, pieces = served.run(run(num_logprobs=3, temperature=0.5, seed=0))
    ids, model = join(pieces)[0], served.llava.model
    embeds = torch.cat([prompt.embeds, model.get_input_embeddings()(torch.tensor(ids))])
    logits = model(inputs_embeds=embeds[None]).logits[0, prompt.num_tokens - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    records = [record for piece in pieces for record in piece.logprobs]
    assert [record.token_id for record in records] == ids
    for record, row in zip(records, expected, strict=True):
        assert record.logprob == pytest.approx(float(row[record.token_id]), abs=1e-3)
        values, tokens = row.topk(3)
        assert [number for number, _, _ in record.top] == tokens.tolist()
        assert [value for _, _, value in record.top] == pytest.approx(values.tolist(), abs=1e-3)
    _, pieces = served.run(run(num_logprobs=0))
    assert all(record.top == () for piece in pieces for record in piece.logprobs)
    _, pieces = served.run(run())
    assert all(piece.logprobs == () for piece in pieces)


# ------------------------------------------------------------------------------------------------------------- command
def test_one_command_serves_a_model_by_vllm_and_ends_with_0(images, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", **SIZES)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    llava = Llava.from_pretrained(checkpoint, device="cpu", reduce="TRIM:0.25", conv_mode="vicuna_v1")
    answers = ((each, llava.ask(images[0], each, max_new_tokens=LENGTH)) for each in QUESTIONS)
    question, answer = next(each for each in answers if "\N{REPLACEMENT CHARACTER}" not in each[1].text)
    command = [sys.executable, "-m", "llava.serve.api", "--engine", "vllm", "--model-path", str(checkpoint)]
    options = ["--device", "cpu", "--conv-mode", "vicuna_v1", "--port", "0", "--vllm-options", json.dumps(OPTIONS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *options], cwd=ROOT, text=True, **pipes) as server:
        line = server.stdout.readline()
        assert "(engine vllm) at http" in line, server.communicate()
        client = openai.OpenAI(base_url=line.rpartition(" at ")[2].strip(), api_key="none", max_retries=0)
        picture = io.BytesIO()
        images[0].save(picture, format="png")
        address = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
        reply = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": content}], max_tokens=LENGTH, temperature=0,
            extra_body={"reduce": "TRIM:0.25"},
        )  # fmt: skip
        server.terminate()
        _, errors = server.communicate(timeout=120)
    assert server.returncode == 0 and "Traceback" not in errors, errors
    assert reply.choices[0].message.content.strip() == answer.text and answer.text
    assert reply.usage.prompt_tokens_details.image_tokens == answer.num_tokens


# ------------------------------------------------------------------------------------------------- limits and the rest
def test_an_answer_that_nobody_reads_any_more_is_given_up(served: Served, images) -> None:
    async def run() -> list[int]:
        prompt = await served.front.prepare((user(images[0], QUESTIONS[0]),))
        async with aclosing(served.engine.answer(prompt, search(max_new_tokens=700, temperature=1.0))) as pieces:
            await anext(pieces)
        counts = [served.engine._llm.get_num_unfinished_requests()]
        reader = asyncio.create_task(served.answer(((user(QUESTIONS[0]),), None), max_new_tokens=700, temperature=1.0))
        while not served.engine._open:
            await asyncio.sleep(0.01)
        reader.cancel()
        await asyncio.wait([reader])
        return [*counts, served.engine._llm.get_num_unfinished_requests(), served.engine.count_waiting()]

    assert served.run(run()) == [0, 0, 0]


def test_an_answer_ends_where_the_positions_end(served: Served) -> None:
    limit = served.engine.max_positions
    assert limit == SIZES["max_position_embeddings"]
    embeds = 0.1 * torch.randn(limit, 64, generator=torch.Generator().manual_seed(1))

    async def run(length: int) -> tuple[list[int], str, str | None]:
        prompt = Prompt(embeds[:length], (), "long")
        return join([piece async for piece in served.engine.answer(prompt, search(max_new_tokens=50))])

    ids, _, reason = served.run(run(limit - 1))
    assert len(ids) == 1 and reason == (FINISHED_BY_STOP if ids[0] in ENDS else FINISHED_BY_LENGTH)
    with pytest.raises(InputError, match=f"the prompt takes {limit} positions .*, the engine has {limit}: shorten"):
        served.run(run(limit))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_positions": 1}, "max_positions 1: expected 2 to 1024"),
        ({"max_positions": 1025}, "max_positions 1025: expected 2 to 1024"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3: expected a divisor of 2 heads"),
        ({"options": {"max_model_len": 7}}, "options: max_model_len is not free: it has an argument of its own"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization 1.5: expected a number above 0, at most 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(options: dict, says: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", **SIZES)
    with pytest.raises(InputError, match=says):
        VllmEngine(str(checkpoint), **options)


def test_what_vllm_refuses_is_one_line(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", **SIZES)
    with pytest.raises(InputError, match=r"vLLM does not start: .*no_such_option"):
        asyncio.run(VllmEngine(str(checkpoint), options={"no_such_option": 1}).start())
