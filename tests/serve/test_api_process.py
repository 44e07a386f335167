"""The server as it is started: the pocket model's answers under load, its end, several servers, users' mistakes."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.signals import is_alive
from playground.shapes import sentence
from playground.shapes.world import draw_scene
from tests.serve.acceptance import (
    MIXED_OPTIONS,
    POCKET,
    QUESTIONS,
    ROOT,
    SERVER_SECONDS,
    Server,
    answer_alone,
    check_dialogue,
    check_end_under_load,
    check_mixed_requests,
    check_search,
    draw_images,
    read_reply,
    scrape,
    to_messages,
    to_url,
)


@pytest.fixture(scope="module")
def images():
    return draw_images()


@pytest.fixture(scope="module")
def solo(pocket, images):
    return answer_alone(pocket, images)


@pytest.fixture(scope="module")
def server():
    """One for the tests that leave it running."""
    with Server() as server:
        yield server
        assert server.end()[0] == 0


# ------------------------------------------------------------------------------------------------------------ the load
@pytest.mark.parametrize("count", [80, pytest.param(500, marks=pytest.mark.slow)])
def test_mixed_requests_beside_broken_and_cancelled_ones_are_answered_as_alone(images, solo, count):
    with Server(*MIXED_OPTIONS) as server:
        check_mixed_requests(server, images, solo, count)
        assert server.end()[0] == 0


def test_a_dialogue_is_answered_as_by_a_chat(pocket, images, server):
    check_dialogue(server, pocket, images)


def test_stop_seed_and_probabilities_reach_the_engine(images, server):
    check_search(server, images)


def test_the_python_of_the_document_runs(server, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    exec(block.replace("http://127.0.0.1:8000/v1", server.url).replace("llava-v1.5-7b", "pocket"), {})
    written = capsys.readouterr().out
    assert "white" in written and "image_tokens=17" in written and "image_patches=64" in written


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
        for name in sentence.ALL_NAMES[number : number + 4]:
            questions.append((image, to_url(image), sentence.ask_presence(name) + sentence.SUFFIX))
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
ENDLESS = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "Hello?"}],
    "stream": True,
    "temperature": 100,
    "max_tokens": 2000,
}
"""A request that goes on for seconds: at this temperature the token that ends an answer is one of 640 equals."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_lets_answers_end_and_leaves_with_0(number):
    with Server() as server:
        check_end_under_load(server, number)


def test_a_second_signal_ends_the_server_at_once():
    async def run():
        async with server.client() as client:
            stream = await client.chat.completions.create(n=8, **ENDLESS)
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
            stream = await client.chat.completions.create(n=16, **ENDLESS)
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
        while any(is_alive(int(child)) for child in children):
            assert time.monotonic() < end
            time.sleep(0.1)


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
