"""What a server does whatever engine is behind it: the checks that `test_api_process.py` and `tests/engines` share."""

import asyncio
import base64
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import openai
import pytest

from llava.signals import is_alive
from playground.shapes.world import draw_scene

ROOT = Path(__file__).parents[2]
POCKET = "playground/shapes/checkpoints/llava-shapes-trim"
SPECS = (None, "none", "TRIM:9", "FasterVLM:16")
QUESTIONS = ("What color is the circle?", "Describe the image.", "How many objects are there?")
CONCURRENT = 16
MAX_TOKENS = 24
SERVER_SECONDS = 120
"""How long a server may take to end on a busy machine."""
MIXED_OPTIONS = ("--cache-mib", "4", "--max-body-mib", "1", "--max-images", "3")
"""Of the server that `check_mixed_requests` asks."""
MAX_GROWTH = 20e6
"""Bytes that a server may grow by after its first 250 requests: the memory of its allocator comes and goes."""


def show(url):
    return {"type": "image_url", "image_url": {"url": url}}


def show_only(*urls):
    return {"messages": [{"role": "user", "content": [show(url) for url in urls]}]}


BROKEN = (
    ({"model": "other"}, 404, "'other' is not served here: expected 'pocket'"),
    (show_only("data:image/png;base64,@@@@"), 400, "the data URL is not base64"),
    (show_only("data:image/png;base64,SGVsbG8="), 400, "not an image in a known format"),
    (show_only("http://127.0.0.1:9/a.png"), 400, "the address is not public"),
    (show_only(*["data:,"] * 4), 400, "4 images; a request has 3 at most"),
    ({"extra_body": {"reduce": "TRIMM:9"}}, 400, "TRIMM"),
    ({"messages": [{"role": "user", "content": "x" * 2**21}]}, 413, "larger than 1 MiB"),
    ({"messages": [{"role": "user", "content": "circle " * 3000}]}, 400, "positions with its image tokens"),
    ({"n": 0}, 400, "n 0: expected 1 to 16"),
    ({"messages": []}, 400, "messages: the list is empty"),
)
"""What is wrong with a request to a server with `MIXED_OPTIONS`, the status, and words of the message."""


class Server:
    """A server in a process of its own.

    Attributes:
        process: the server; it may have processes of its own.
        lines: what it wrote when it was ready, a line for each server and one for all.
        url: its address.
    """

    def __init__(self, *options, checkpoint=POCKET, port=0, count=1, environment=()):
        command = [sys.executable, "-m", "llava.serve.api", "--model-path", str(checkpoint), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
        self.process = subprocess.Popen(
            [*command, "--served-model-name", "pocket", "--port", str(port), *options],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines = []
        for _ in range(count):
            self.lines.append(self.process.stdout.readline())
            assert " at http" in self.lines[-1], self.process.communicate()
        self.url = self.lines[-1].rpartition(" at ")[2].strip()

    def client(self):
        return openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def end(self, number=signal.SIGTERM):
        """Send a signal; returns the exit code and what was written to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=SERVER_SECONDS)
        return self.process.returncode, errors

    def count_bytes(self):
        """Memory of all its processes that is not backed by files."""
        texts = [Path(f"/proc/{number}/status").read_text() for number in list_processes(self.process.pid)]
        return sum(int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024 for text in texts)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        if self.process.poll() is None:
            for process in list_processes(self.process.pid):  # vLLM's outlive a server that is killed
                os.kill(process, signal.SIGKILL)
        self.process.communicate()


def list_processes(process):
    """A process and all below it."""
    found = [process]
    for number in found:
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def draw_images():
    """Six images, and each as a data URL."""
    drawn = [draw_scene(7, 7, number)[0] for number in range(6)]
    return [(image, to_url(image)) for image in drawn]


def to_url(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def answer_alone(llava, images):
    """Make a function of image numbers, question and reduction, to text and image tokens of the answer on its own."""
    answers, own = {}, llava.model.token_reducer

    def answer(numbers, question, spec):
        key = numbers, question, spec
        if key not in answers:
            llava.model.set_token_reduction(spec or own.spec())
            try:
                reply = llava.ask([images[number][0] for number in numbers], question, max_new_tokens=MAX_TOKENS)
            finally:
                llava.model.set_token_reduction(own.spec())
            answers[key] = reply.text, reply.num_tokens
        return answers[key]

    return answer


def to_messages(images, numbers, question):
    parts = [show(images[number][1]) for number in numbers]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def scrape(url):
    text = httpx2.get(url.replace("/v1", "/metrics")).text
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


async def read_reply(client, is_streamed, **options):
    """Ask; returns the text and the usage."""
    if not is_streamed:
        reply = await client.chat.completions.create(**options)
        return reply.choices[0].message.content, reply.usage
    texts, usage = [], None
    options["stream_options"] = {"include_usage": True}
    async for event in await client.chat.completions.create(stream=True, **options):
        texts += [choice.delta.content or "" for choice in event.choices]
        usage = event.usage or usage
    return "".join(texts), usage


# ------------------------------------------------------------------------------------------------------------ the load
def check_mixed_requests(server, images, solo, count):
    """Ask texts and images, 16 at a time, streamed or not; a tenth is broken, a tenth leaves midway.

    The others get the answers that they get alone; afterwards nothing is left of any, and memory is what it was.
    """
    chance, memory, answered, outcomes = random.Random(count), [], [], {"refused": 0, "left": 0, "drawn": 0}
    places = asyncio.Semaphore(CONCURRENT)

    async def ask(client, number):
        numbers = tuple(chance.sample(range(len(images)), chance.randint(0, 2)))
        question, spec = chance.choice(QUESTIONS), chance.choice(SPECS)
        options = {"model": "pocket", "messages": to_messages(images, numbers, question), "max_tokens": MAX_TOKENS}
        options |= {"temperature": 0, "extra_body": {"reduce": spec} if spec else {}}
        is_streamed, kind, delay = chance.random() < 0.5, number % 10, chance.uniform(0, 0.5)
        async with places:
            if kind == 3:
                wrong, status, message = BROKEN[number // 10 % len(BROKEN)]
                with pytest.raises(openai.APIStatusError) as caught:
                    await read_reply(client, is_streamed, **(options | wrong))
                assert caught.value.status_code == status and message in caught.value.message
                outcomes["refused"] += 1
            elif kind == 7:
                options |= {"temperature": 2, "max_tokens": 500}
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(delay):
                        while True:  # a draw may end of itself; the one that is under way when the time is up is left
                            await read_reply(client, is_streamed, **options)
                            outcomes["drawn"] += 1
                outcomes["left"] += 1
            else:
                text, usage = await read_reply(client, is_streamed, **options)
                answered.append(((numbers, question, spec), text.strip(), usage.prompt_tokens_details.image_tokens))
            memory.append(server.count_bytes())

    async def run():
        async with server.client() as client:
            await asyncio.gather(*(ask(client, number) for number in range(count)))

    before = scrape(server.url)
    asyncio.run(run())
    assert outcomes["refused"] == outcomes["left"] == count // 10 and len(answered) == count * 8 // 10
    end = time.monotonic() + 30
    while any(scrape(server.url)[f"llava_{name}"] for name in ("requests_running", "engine_waiting")):
        assert time.monotonic() < end, "a request is stuck"
        time.sleep(0.2)
    counts = scrape(server.url)
    # A client may leave before the server has read its request, or while the last byte is on its way.
    names = [f'llava_requests_total{{status="{status}"}}' for status in ("200", "cancelled")]
    ended = [counts.get(name, 0) - before.get(name, 0) for name in names]
    whole = len(answered) + outcomes["drawn"]
    assert ended[0] >= whole and whole < sum(ended) <= whole + outcomes["left"]
    assert counts["llava_image_cache_bytes"] <= 4 * 2**20
    if count > 100:
        middle, last = (sorted(part)[len(part) // 2] for part in (memory[150:250], memory[-100:]))
        grown = last - middle
        assert grown < MAX_GROWTH, f"grew by {grown / 1e6:.1f} MB over {count - 250} requests"
    for asked, *got in answered:
        assert got == list(solo(*asked))


# ------------------------------------------------------------------------------------------------ several turns, search
def check_dialogue(server, llava, images):
    """A dialogue of several turns, streamed, is answered as `Llava.chat` answers it."""
    chat, turns = llava.chat(images[0][0]), []

    async def run():
        async with server.client() as client:
            for question in QUESTIONS:
                turns.extend(to_messages(images, (0,) if not turns else (), question))
                options = {"messages": turns, "temperature": 0, "max_tokens": MAX_TOKENS}
                text, _ = await read_reply(client, True, model="pocket", **options)
                assert text.strip() == chat.ask(question, max_new_tokens=MAX_TOKENS).text
                turns.append({"role": "assistant", "content": text})

    asyncio.run(run())


def check_search(server, images):
    """Stop texts, seeds, several choices and probabilities reach the engine."""
    options = {"model": "pocket", "messages": to_messages(images, (0,), QUESTIONS[1]), "max_tokens": 12}

    async def run():
        async with server.client() as client:
            whole, _ = await read_reply(client, False, **options, temperature=0)
            word = whole.split()[1]
            short = await client.chat.completions.create(**options, temperature=0, stop=[word])
            assert short.choices[0].message.content == whole.partition(word)[0]
            assert short.choices[0].finish_reason == "stop"
            drawn = [await read_reply(client, True, **options, temperature=2, seed=seed) for seed in (1, 1, 2)]
            assert drawn[0][0] == drawn[1][0] != drawn[2][0]
            several = await client.chat.completions.create(**options, temperature=2, seed=1, n=2)
            assert [choice.message.content for choice in several.choices] == [drawn[0][0], drawn[2][0]]
            told = await client.chat.completions.create(**options, temperature=0, logprobs=True, top_logprobs=3)
            for token in told.choices[0].logprobs.content:
                assert token.logprob == token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 3

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------------------- the end
def check_end_under_load(server, number):
    """A signal under load: answers that were begun end, new requests get 503, and all processes are gone afterwards."""
    begun, ended, refused, start = set(), set(), [], time.monotonic()

    async def ask(client):
        while time.monotonic() - start < 60:
            options = {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 2, "max_tokens": 40}
            key = object()
            try:
                stream = await client.chat.completions.create(model="pocket", stream=True, **options)
                async for event in stream:
                    begun.add(key)
                    if event.choices[0].finish_reason:
                        ended.add(key)
            except openai.APIStatusError as error:
                refused.append(error.status_code)
                await asyncio.sleep(0.02)
            except openai.APIConnectionError:
                return

    async def run():
        async with server.client() as client:
            asking = [asyncio.create_task(ask(client)) for _ in range(CONCURRENT)]
            while len(ended) < CONCURRENT:
                await asyncio.sleep(0.05)
            server.process.send_signal(number)
            await asyncio.gather(*asking)

    processes = list_processes(server.process.pid)
    asyncio.run(run())
    _, errors = server.process.communicate(timeout=SERVER_SECONDS)
    assert server.process.returncode == 0 and "Traceback" not in errors, errors
    assert begun == ended and set(refused) <= {503}
    end = time.monotonic() + 30
    while any(map(is_alive, processes)):  # the last one may still hand its memory back
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.1)
