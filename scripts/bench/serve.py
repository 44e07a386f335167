"""The server under load: requests per second, time to the first token and latencies, with and without reduction.

Clients ask mixed questions, several about each image, through OpenAI's SDK with streaming. The plain loop beside it is
the same model behind a lock, one `Llava.ask` at a time, in this process, without HTTP. Every run has images of its own,
so that no cache is warm; greedy answers of both are compared.

    python -m scripts.bench.serve --reduce TRIM:-1 none --clients 1 4 16
    python -m scripts.bench.serve --model-path liuhaotian/llava-v1.5-7b --device cuda --requests 512 --max-tokens 64
"""
# ruff: noqa: T201

import argparse
import asyncio
import base64
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.cli import ModelSpec, add_model_options, positive
from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    add_model_options(parser, several=True, required=False)
    parser.set_defaults(model_path=str(side_by_side.CHECKPOINT), reduce=["TRIM:-1", "none"])
    parser.add_argument("--engine", default="torch", help="of the server (default: %(default)s)")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16], help="at a time (default: 1 4 16)")
    parser.add_argument("--requests", type=positive, default=256, help="of each run (default: %(default)s)")
    parser.add_argument("--questions-per-image", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument("--max-batch", type=positive, default=16, help="answers of the engine at once (default: 16)")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import numpy as np
import openai

from llava.assistant import Llava
from llava.errors import InputError, run_command
from llava.eval.benchmark import Question

PLAIN, SERVER = "plain loop", "server"
SEED = 0


@dataclass(frozen=True)
class Reply:
    """What one request got.

    Attributes:
        text: the answer.
        first_seconds: from the request to the first token.
        seconds: from the request to the end.
        num_tokens: of the prompt, after reduction; None where the plain loop does not tell.
    """

    text: str
    first_seconds: float
    seconds: float
    num_tokens: int | None = None


@dataclass(frozen=True)
class Run:
    """The figures of one row of the table."""

    source: str
    reduce: str
    clients: int
    requests_per_second: float
    first_ms: Sequence[float]
    latency_ms: Sequence[float]
    prompt_tokens: float | None


SHARES = (50, 95, 99)
"""Percentiles of both times."""


def main() -> None:
    """Measure as the options say."""
    args = make_parser().parse_args()
    cells = [(reduce, clients) for reduce in args.reduce for clients in args.clients]
    with tempfile.TemporaryDirectory() as folder:
        # 1. Questions of each run, in the same mixed order for both.
        num_images = -(-args.requests // args.questions_per_image)
        drawn = side_by_side.draw_questions(Path(folder), num_images * len(cells), args.questions_per_image)
        size = num_images * args.questions_per_image
        work = {cell: drawn[i * size : (i + 1) * size][: args.requests] for i, cell in enumerate(cells)}
        for questions in work.values():
            random.Random(SEED).shuffle(questions)
        # 2. One source after the other, so that each has the machine for itself.
        answers = {PLAIN: measure_plain(args, work)}
        with start_server(args) as address:
            answers[SERVER] = {cell: ask_server(address, *cell, args, questions) for cell, questions in work.items()}
    runs = [summarise(source, *cell, *answers[source][cell]) for cell in cells for source in (PLAIN, SERVER)]
    tell(runs)
    differing = sum(
        mine.text.strip() != other.text.strip()
        for cell in cells
        for mine, other in zip(answers[PLAIN][cell][1], answers[SERVER][cell][1], strict=True)
    )
    print(f"answers that differ between the two: {differing} of {len(cells) * args.requests}")
    side_by_side.write_figures({"runs": [asdict(run) for run in runs], "answers_differing": differing}, args.json)


Measured = tuple[float, list[Reply]]
"""Seconds of a run, and its replies."""
Cell = tuple[str, int]


# ---------------------------------------------------------------------------------------------------------- plain loop
def measure_plain(args: argparse.Namespace, work: Mapping[Cell, Sequence[Question]]) -> dict[Cell, Measured]:
    """Answer all questions by a model behind a lock."""
    spec = ModelSpec.from_options(args, reduce=None, calibrated=None)
    llava = Llava(*spec.load(quiet=True))
    lock = threading.Lock()

    def ask(question: Question) -> Reply:
        start, first = time.perf_counter(), []

        def note(_: str) -> None:
            first.append(time.perf_counter() - start)

        with lock:
            answer = llava.ask(list(question.images), question.prompt, max_new_tokens=args.max_tokens, stream=note)
        seconds = time.perf_counter() - start
        return Reply(answer.text, first[0] if first else seconds, seconds)

    measured = {}
    for (reduce, clients), questions in work.items():
        llava.model.set_token_reduction(reduce)
        ask(questions[0])
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            replies = list(pool.map(ask, questions))
        measured[reduce, clients] = time.perf_counter() - start, replies
    return measured


# -------------------------------------------------------------------------------------------------------------- server
@contextmanager
def start_server(args: argparse.Namespace) -> Iterator[str]:
    """Start the server in a process of its own; yields its address."""
    options = {
        "--model-path": args.model_path,
        "--model-base": args.model_base,
        "--device": args.device,
        "--dtype": args.dtype,
        "--tower-dtype": args.tower_dtype,
        "--attn-implementation": args.attn_implementation,
        "--engine": args.engine,
        "--max-batch": str(args.max_batch),
        "--port": "0",
        "--served-model-name": "bench",
    }
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    command = [sys.executable, "-m", "llava.serve.api", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if " at http" not in line:
                raise InputError("the server has ended before it was ready; its own line says why")
            yield line.rpartition(" at ")[2].strip()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def ask_server(
    address: str, reduce: str, clients: int, args: argparse.Namespace, questions: Sequence[Question]
) -> Measured:
    """Answer all questions by so many clients at a time."""
    return asyncio.run(_ask_all(address, reduce, clients, args.max_tokens, questions))


async def _ask_all(address: str, reduce: str, clients: int, max_tokens: int, questions: Sequence[Question]) -> Measured:
    places = asyncio.Semaphore(clients)
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:

        async def ask(question: Question) -> Reply:
            messages = [{"role": "user", "content": [*map(_show, question.images), _say(question.prompt)]}]
            async with places:
                start, first, texts, usage = time.perf_counter(), None, [], None
                stream = await client.chat.completions.create(
                    model="bench", messages=messages, temperature=0, max_tokens=max_tokens, stream=True,
                    stream_options={"include_usage": True}, extra_body={"reduce": reduce},
                )  # fmt: skip
                async for event in stream:
                    for choice in event.choices:
                        if choice.delta.content:
                            first = first or time.perf_counter() - start
                            texts.append(choice.delta.content)
                    usage = event.usage or usage
            seconds = time.perf_counter() - start
            return Reply("".join(texts), first or seconds, seconds, usage.prompt_tokens)

        await ask(questions[0])
        start = time.perf_counter()
        replies = await asyncio.gather(*map(ask, questions))
        return time.perf_counter() - start, replies


def _show(path: Path) -> dict[str, Any]:
    content = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def _say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


# --------------------------------------------------------------------------------------------------------------- table
def summarise(source: str, reduce: str, clients: int, seconds: float, replies: Sequence[Reply]) -> Run:
    """Sum one run up."""
    counted = [reply.num_tokens for reply in replies if reply.num_tokens is not None]
    first, whole = (
        [1e3 * float(value) for value in np.percentile(times, SHARES)]
        for times in ([reply.first_seconds for reply in replies], [reply.seconds for reply in replies])
    )
    mean = sum(counted) / len(counted) if counted else None
    return Run(source, reduce, clients, len(replies) / seconds, first, whole, mean)


def tell(runs: Sequence[Run]) -> None:
    """Print the table, as Markdown."""
    print(
        "| | reduction | clients | requests/s | first token, ms: 50 / 95 / 99 % | answer, ms: 50 / 95 / 99 % | prompt |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for run in runs:
        first, whole = (" / ".join(f"{value:.0f}" for value in times) for times in (run.first_ms, run.latency_ms))
        prompt = "" if run.prompt_tokens is None else f"{run.prompt_tokens:.1f}"
        rate = f"{run.requests_per_second:.1f}"
        print(f"| {run.source} | {run.reduce} | {run.clients} | {rate} | {first} | {whole} | {prompt} |")


if __name__ == "__main__":
    run_command(main)
