"""The server as it is started: the pocket model's answers under load, its end, several servers, users' mistakes."""

import asyncio
import base64
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import openai
import pytest

from playground.shapes import sentence
from playground.shapes.world import draw_scene

ROOT = Path(__file__).parents[2]
POCKET = "playground/shapes/checkpoints/llava-shapes-trim"
SPECS = (None, "none", "TRIM:9", "FasterVLM:16")
QUESTIONS = ("What color is the circle?", "Describe the image.", "How many objects are there?")
BROKEN = (
    ({"model": "other"}, 404),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, 400),
    ({"extra_body": {"reduce": "TRIM:"}}, 400),
    ({"n": 0}, 400),
    ({"messages": []}, 400),
)
CONCURRENT = 16
SERVER_SECONDS = 120
"""How long a server may take to start or to end on a busy machine."""


class Server:
    """A server in a process of its own."""

    def __init__(self, *options, port=0, count=1):
        command = [sys.executable, "-m", "llava.serve.api", "--model-path", POCKET, "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--served-model-name", "pocket", "--port", str(port), *options],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines = []
        for _ in range(count):  # a line for each server, and one for all
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

    def __enter__(self):
        return self

    def __exit__(self, *args):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def images():
    """Six images, and each as a data URL."""
    drawn = [draw_scene(7, 7, number)[0] for number in range(6)]
    urls = []
    for image in drawn:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        urls.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return list(zip(drawn, urls, strict=True))


@pytest.fixture(scope="module")
def solo(pocket, images):
    """What each question is answered alone, by image numbers, question and reduction; asked once each."""
    answers, own = {}, pocket.model.token_reducer

    def answer(numbers, question, spec):
        key = numbers, question, spec
        if key not in answers:
            pocket.model.set_token_reduction(spec or own.spec())
            try:
                reply = pocket.ask([images[number][0] for number in numbers], question, max_new_tokens=24)
            finally:
                pocket.model.set_token_reduction(own.spec())
            answers[key] = reply.text, reply.num_tokens
        return answers[key]

    return answer


@pytest.fixture(scope="module")
def server():
    """One for the tests that leave it running."""
    with Server() as server:
        yield server
        assert server.end()[0] == 0


def to_messages(images, numbers, question):
    parts = [{"type": "image_url", "image_url": {"url": images[number][1]}} for number in numbers]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def scrape(url):
    text = httpx2.get(url.replace("/v1", "/metrics")).text
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def resident_bytes(process):
    """Memory of a process that is not backed by files."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) * 1024


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
@pytest.mark.parametrize("count", [80, pytest.param(500, marks=pytest.mark.slow)])
def test_mixed_requests_beside_broken_and_cancelled_ones_are_answered_as_alone(images, solo, count):
    """A tenth is broken, a tenth leaves midway; afterwards nothing is left of them, and memory is what it was."""
    chance, memory, answered, outcomes = random.Random(count), [], [], {"refused": 0, "left": 0, "drawn": 0}
    places = asyncio.Semaphore(CONCURRENT)

    async def ask(client, number):
        numbers = tuple(chance.sample(range(len(images)), chance.randint(0, 2)))
        question, spec = chance.choice(QUESTIONS), chance.choice(SPECS)
        options = {"model": "pocket", "messages": to_messages(images, numbers, question), "max_tokens": 24}
        options |= {"temperature": 0, "extra_body": {"reduce": spec} if spec else {}}
        is_streamed, kind, delay = chance.random() < 0.5, number % 10, chance.uniform(0, 0.5)
        async with places:
            if kind == 3:
                wrong, status = BROKEN[number // 10 % len(BROKEN)]
                with pytest.raises(openai.APIStatusError) as caught:
                    await read_reply(client, is_streamed, **(options | wrong))
                assert caught.value.status_code == status
                outcomes["refused"] += 1
            elif kind == 7:
                options |= {"temperature": 5, "max_tokens": 500}
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(delay):
                        while True:  # a draw may end of itself; the one that is under way when the time is up is left
                            await read_reply(client, is_streamed, **options)
                            outcomes["drawn"] += 1
                outcomes["left"] += 1
            else:
                text, usage = await read_reply(client, is_streamed, **options)
                answered.append(((numbers, question, spec), text.strip(), usage.prompt_tokens_details.image_tokens))
            memory.append(resident_bytes(server.process.pid))

    async def run():
        async with server.client() as client:
            await asyncio.gather(*(ask(client, number) for number in range(count)))

    with Server("--cache-mib", "4") as server:
        asyncio.run(run())
        assert outcomes["refused"] == outcomes["left"] == count // 10 and len(answered) == count * 8 // 10
        end = time.monotonic() + 30
        while any(scrape(server.url)[f"llava_{name}"] for name in ("requests_running", "engine_waiting")):
            assert time.monotonic() < end, "a request is stuck"
            time.sleep(0.2)
        counts = scrape(server.url)
        # A client may leave before the server has read its request, or while the last byte is on its way.
        ended = [counts.get(f'llava_requests_total{{status="{status}"}}', 0) for status in ("200", "cancelled")]
        whole = len(answered) + outcomes["drawn"]
        assert ended[0] >= whole and whole < sum(ended) <= whole + outcomes["left"]
        assert counts["llava_image_cache_bytes"] <= 4 * 2**20
        if count > 100:
            middle, last = (sorted(part)[len(part) // 2] for part in (memory[150:250], memory[-100:]))
            assert last - middle < 20e6, f"grew by {(last - middle) / 1e6:.1f} MB over {count - 250} requests"
        assert server.end()[0] == 0
    for asked, *got in answered:
        assert got == list(solo(*asked))


def test_a_dialogue_is_answered_as_by_a_chat(pocket, images, server):
    chat, turns = pocket.chat(images[0][0]), []

    async def run():
        async with server.client() as client:
            for question in QUESTIONS:
                turns.extend(to_messages(images, (0,) if not turns else (), question))
                text, _ = await read_reply(client, True, model="pocket", messages=turns, temperature=0, max_tokens=24)
                assert text.strip() == chat.ask(question, max_new_tokens=24).text
                turns.append({"role": "assistant", "content": text})

    asyncio.run(run())


def test_stop_seed_and_probabilities_reach_the_engine(images, server):
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


def test_the_python_of_the_document_runs(server, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    exec(block.replace("http://127.0.0.1:8000/v1", server.url).replace("llava-v1.5-7b", "pocket"), {})
    written = capsys.readouterr().out
    assert "blue" in written and "image_tokens=17" in written and "image_patches=64" in written


def test_the_page_asks_the_server(server, images, solo, tmp_path):
    from llava.serve.page_endpoint import Endpoint

    images[0][0].save(tmp_path / "shapes.png")
    *pieces, result = Endpoint(server.url, 24).ask(tmp_path / "shapes.png", QUESTIONS[0], "TRIM:9")
    assert (result.text, result.num_tokens) == solo((0,), QUESTIONS[0], "TRIM:9") and pieces[-1].strip() == result.text


# --------------------------------------------------------------------------------------------------- evaluation clients
@pytest.mark.parametrize("first", ["text", "image"])
def test_the_requests_of_evaluation_toolkits_get_the_runners_answers(pocket, first, server):
    """lmms-eval sends PNG in either order; both it and VLMEvalKit send `n`, `temperature` 0 and a generous length."""
    questions = []
    for number in range(6):
        image, _ = draw_scene(11, 3, number)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        for name in sentence.ALL_NAMES[number : number + 4]:
            questions.append((image, url, sentence.ask_presence(name) + sentence.SUFFIX))
    expected = [answer.text for answer in pocket.ask_many([(image, text) for image, _, text in questions])]

    async def ask(client, url, text):
        shown = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
        said = {"type": "text", "text": text}
        content = [said, shown] if first == "text" else [shown, said]
        messages = [{"role": "user", "content": content}]
        options = {"n": 1, "temperature": 0, "max_tokens": 2048}
        return (await read_reply(client, False, model="pocket", messages=messages, **options))[0].strip()

    async def run():
        async with server.client() as client:
            return await asyncio.gather(*(ask(client, url, text) for _, url, text in questions))

    assert asyncio.run(run()) == expected


# ------------------------------------------------------------------------------------------------------------- the end
async def load(server, is_over, begun, ended, refused):
    """Keep asking, 16 at a time; notes which answers began, ended, and were refused with which status."""

    async def ask(client):
        while not is_over():
            options = {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 5, "max_tokens": 40}
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

    async with server.client() as client:
        await asyncio.gather(*(ask(client) for _ in range(CONCURRENT)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_lets_answers_end_and_leaves_with_0(number):
    begun, ended, refused, start = set(), set(), [], time.monotonic()

    async def run():
        asking = asyncio.create_task(load(server, lambda: time.monotonic() - start > 60, begun, ended, refused))
        while len(ended) < CONCURRENT:
            await asyncio.sleep(0.05)
        server.process.send_signal(number)
        await asking

    with Server() as server:
        asyncio.run(run())
        _, errors = server.process.communicate(timeout=SERVER_SECONDS)
        assert server.process.returncode == 0 and "Traceback" not in errors
    assert begun == ended and set(refused) <= {503}


def test_a_second_signal_ends_the_server_at_once():
    async def run():
        async with server.client() as client:
            options = {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 5, "max_tokens": 2000}
            stream = await client.chat.completions.create(model="pocket", stream=True, n=8, **options)
            await anext(aiter(stream))
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.process.wait, SERVER_SECONDS)

    with Server() as server:
        asyncio.run(run())
        assert server.process.returncode == 128 + signal.SIGTERM
        assert server.process.stderr.read().endswith("stopped by SIGTERM\n")


def test_what_is_not_answered_when_the_drain_ends_is_cut_off_and_told():
    async def run():
        async with server.client() as client:
            options = {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 5, "max_tokens": 2000}
            stream = await client.chat.completions.create(model="pocket", stream=True, n=16, **options)
            await anext(aiter(stream))
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.process.wait, SERVER_SECONDS)

    with Server("--drain-seconds", "1") as server:
        asyncio.run(run())
        assert server.process.returncode == 128 + signal.SIGTERM
        assert "SIGTERM: 1 requests are cut off\n" in server.process.stderr.read()


# ----------------------------------------------------------------------------------------------------- several servers
def find_ports(count):
    """Return the first of so many ports in a row that are free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for number in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except (OSError, OverflowError):
            continue
        return first


def test_two_servers_behind_one_address_share_the_work_and_end_together(images, solo):
    port = find_ports(3)

    async def run():
        async with server.client() as client:

            async def ask(number):
                options = {"messages": to_messages(images, (number % 6,), QUESTIONS[number % 3]), "max_tokens": 24}
                text, _ = await read_reply(client, number % 2 == 0, model="pocket", temperature=0, **options)
                assert text.strip() == solo((number % 6,), QUESTIONS[number % 3], None)[0]

            await asyncio.gather(*map(ask, range(24)))

    with Server("--data-parallel", "2", port=port, count=3) as server:
        assert server.lines[-1] == f"2 servers at http://127.0.0.1:{port}/v1\n"
        asyncio.run(run())
        done = [scrape(f"http://127.0.0.1:{port + i}/v1")['llava_requests_total{status="200"}'] for i in (1, 2)]
        assert sum(done) == 24 and min(done) >= 6
        code, errors = server.end()
        assert code == 0 and "Traceback" not in errors
    for number in (port, port + 1, port + 2):
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", number), timeout=1)


@pytest.mark.parametrize("victim", ["a server", "the dealer"])
def test_if_one_of_them_dies_all_end(victim):
    port = find_ports(3)
    with Server("--data-parallel", "2", port=port, count=3) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 2
        if victim == "a server":
            os.kill(int(children[0]), signal.SIGKILL)
            _, errors = server.process.communicate(timeout=SERVER_SECONDS)
            assert server.process.returncode == 2
            assert "error: a server has ended, and with it all: exit codes [-9, " in errors
        else:
            server.process.kill()
        end = time.monotonic() + SERVER_SECONDS
        while any(Path(f"/proc/{child}/fd").exists() and is_running(child) for child in children):
            assert time.monotonic() < end
            time.sleep(0.1)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "a port is at most 65535, not 70000"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1 --port 8000: "),
        (["--api-key-file", "/dev/null"], "/dev/null is a device, not a regular file"),
        (["--allow-files", "no_such"], "--allow-files no_such: there is no such folder"),
        (["--tensor-parallel", "2"], "--tensor-parallel: only with --engine vllm"),
        (["--max-positions", "99"], "--max-positions: only with --engine vllm"),
        (["--engine", "vllm", "--vllm-options", "3"], "--vllm-options: a JSON object is needed, not int"),
        (["--conv-mode", "vicuna"], 'no conversation template "vicuna"'),
        (["--data-parallel", "2", "--device", "cuda:1"], "--device cuda:1 names one accelerator"),
        (["--port", "0", "--reduce", "FastV:0.5,layer=2"], "works inside the language model"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message):
    command = [sys.executable, "-m", "llava.serve.api", "--model-path", POCKET, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SERVER_SECONDS)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert re.search(r"error: .*\n$", done.stderr)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_told_before_the_model_is_loaded(package):
    code = f"""import runpy, sys
sys.modules[{package!r}] = None
sys.argv = ["api", "--model-path", "no/such/model", "--port", "0"]
runpy.run_module("llava.serve.api", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    install = "pip install -e '.[serve]'"
    assert done.stderr == f"error: this needs the package {package}, which is not installed: {install}\n"
    assert done.returncode == 2


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "llava.serve.api", "--model-path", "no/such/model", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SERVER_SECONDS)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another address\n",
    )


def test_accelerators_are_shared_out_in_turn(monkeypatch):
    from llava.errors import InputError
    from llava.serve.data_parallel import share_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert share_devices(2, 2, None) == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert share_devices(2, 1, "cpu") == [{}, {}]
    with pytest.raises(InputError, match="--data-parallel 5: 5 accelerators are needed, there are 4"):
        share_devices(5, 1, "cuda")
