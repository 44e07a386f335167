"""The server on vLLM does what it does on the torch engine; scripts/test_vllm.sh runs this in its environment.

One server answers the pocket model with wider heads (`playground.shapes.wide_heads`).
"""

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import openai

from llava import Llava
from playground.shapes.wide_heads import write_wide_heads
from tests.serve.acceptance import (
    MIXED_OPTIONS,
    Server,
    answer_alone,
    check_dialogue,
    check_end_under_load,
    check_mixed_requests,
    check_search,
    draw_images,
    list_processes,
    read_reply,
)

NUM_BLOCKS = 128
"""Of 32 positions: so few that the load has filled vLLM's cache before memory is compared."""
OPTIONS = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": NUM_BLOCKS}
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""On a CPU oneDNN keeps kernels for each length of a batch, 1,024 of them: memory grows for thousands of requests."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "pocket"
    write_wide_heads(folder)
    return folder


@pytest.fixture(scope="module")
def pocket(checkpoint: Path) -> Llava:
    return Llava.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    """One for all tests; the last of them ends it."""
    options = ("--engine", "vllm", "--vllm-options", json.dumps(OPTIONS), *MIXED_OPTIONS)
    with Server(*options, checkpoint=checkpoint, environment=KERNELS) as server:
        assert "(engine vllm) at http" in server.lines[0]
        yield server


def test_a_dialogue_is_answered_as_by_a_chat(server: Server, pocket: Llava) -> None:
    check_dialogue(server, pocket, draw_images())


def test_stop_seed_and_probabilities_reach_the_engine(server: Server) -> None:
    check_search(server, draw_images())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_search_that_vllm_refuses_is_400(server: Server, is_streamed: bool) -> None:
    async def run() -> None:
        async with server.client() as client:
            options = {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 3}
            with pytest.raises(openai.BadRequestError, match="vLLM refuses the search: temperature must be in"):
                await read_reply(client, is_streamed, model="pocket", **options)

    asyncio.run(run())


def test_500_mixed_requests_beside_broken_and_cancelled_ones_are_answered_as_alone(
    server: Server, pocket: Llava
) -> None:
    images = draw_images()
    check_mixed_requests(server, images, answer_alone(pocket, images), 500)


def test_sigterm_under_load_lets_answers_end_and_ends_vllms_processes(server: Server) -> None:
    assert len(list_processes(server.process.pid)) > 1
    check_end_under_load(server, signal.SIGTERM)
