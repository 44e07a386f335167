"""A benchmark's questions to another language-model engine: `python -m llava.eval answer ... --engine vllm`.

A run starts a server of `llava.serve` for itself, asks it as `llava.eval.remote` asks any server, and ends it. Model,
template and reduction are those of the plain run, images come pixel by pixel, and the query is sent: prompts are the
same, and so are greedy answers, but for rounding. The engine is part of what the answers depend on (`FILE.run.json`):
an answers file never holds answers of two of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llava.cli import EngineSpec, ModelSpec
from llava.errors import InputError
from llava.eval.benchmark import Question, index_questions
from llava.eval.predict import Fault, Outcome, Settings, Sink, describe_run, keep_answers
from llava.eval.predictions import check_workers
from llava.eval.remote import Client, RemoteModel, ask_by_units
from llava.files import explain_errors, read_bytes
from llava.prompt import choose_conv_mode
from llava.signals import PARENT_VARIABLE

DEFAULT_REQUESTS = 64
"""Questions under way at a time: the engine fills its batches with them."""
PATIENCE = {"max_tries": 1, "timeout_seconds": 86400.0, "deadline_seconds": 86400.0}
"""A server of one's own is waited for, however slow the machine; whether it still runs is known."""
UNLIMITED = 10**9
"""Of pixels and MiB: the images are the user's own."""
DRAIN_SECONDS = 1
"""How long a server that is to end waits for answers; at the end of a run there are none."""
END_SECONDS = 60
"""How long it may take to free what it holds."""


def ask_engine(
    spec: ModelSpec,
    engine: EngineSpec,
    questions: Sequence[Question],
    answers_file: Path,
    settings: Settings,
    key_fields: Sequence[str],
    *,
    limit: int | None = None,
    worker: int = 0,
    notify: Callable[[str], None],
) -> Outcome:
    """Answer questions into a file, as `predict.make_answers` does; other arguments as there.

    Args:
        spec: the model.
        engine: what runs its language model.

    Raises:
        InputError: as `make_answers`; beams; the server does not start, or ends before the run.
    """
    if settings.sampling.num_beams != 1:
        raise InputError(f"--num-beams {settings.sampling.num_beams}: --engine {engine.name} searches without beams")
    check_workers(settings.num_workers)
    index_questions(questions, key_fields)
    spec = spec.resolve()
    run = describe_run(spec, questions, settings, key_fields) | describe_engine(engine)
    batch_size = settings.batch_size or DEFAULT_REQUESTS
    log = answers_file.with_name(f"{answers_file.name}.engine_{worker}.log")
    conv_mode = choose_conv_mode(settings.conv_mode, settings.model_id)
    with ExitStack() as stack:

        def load() -> Server:
            notify(f"starting the engine {engine.name}; its messages: {log}")
            limits = {
                "--max-running": batch_size,
                "--max-images": max((len(question.images) for question in questions), default=0),
            }
            names = {"--served-model-name": settings.model_id, "--conv-mode": conv_mode}
            options = [*list_model_options(spec), *list_engine_options(engine), *list_pairs(names | limits)]
            return stack.enter_context(start_server(options, engine.name, log))

        def ask(server: Server, asked: list[Question], sink: Sink, model_id: str) -> list[Fault]:
            model = RemoteModel(server.address, settings.model_id, takes_query=True)
            client = Client(model, settings.sampling, **PATIENCE)
            with server.explaining_its_end():
                return ask_by_units(
                    client, asked, sink, model_id, batch_size=batch_size, num_workers=settings.num_workers
                )

        return keep_answers(
            run, questions, answers_file, key_fields, limit=limit, worker=worker, notify=notify, load=load, ask=ask
        )


def describe_engine(engine: EngineSpec) -> dict[str, object]:
    """What answers depend on: settings of vLLM's may change them, the number of accelerators does not."""
    return {"engine": engine.name} | ({"vllm_options": dict(engine.options)} if engine.options else {})


def list_engine_options(engine: EngineSpec) -> list[str]:
    """Return the options of `cli.add_engine_options` that mean a spec."""
    return list_pairs(
        {
            "--engine": engine.name,
            "--tensor-parallel": engine.tensor_parallel,
            "--gpu-memory-utilization": engine.gpu_memory_utilization,
            "--vllm-options": json.dumps(engine.options) if engine.options else None,
        }
    )


def list_model_options(spec: ModelSpec) -> list[str]:
    """Return the options of `cli.add_model_options` that mean a resolved spec."""
    return list_pairs(
        {
            "--model-path": spec.path,
            "--model-base": spec.base,
            "--reduce": spec.reduce,
            "--device": spec.device,
            "--dtype": spec.dtype,
            "--tower-dtype": spec.tower_dtype,
            "--attn-implementation": spec.attn_implementation,
        }
    )


def list_pairs(options: Mapping[str, object]) -> list[str]:
    """Return options and their values as arguments, those without a value left out."""
    return [f"{name}={value}" for name, value in options.items() if value is not None]


# ---------------------------------------------------------------------------------------------------------- the server
@dataclass(frozen=True)
class Server:
    """A server that belongs to this run.

    Attributes:
        process: the server.
        address: where it is asked.
        engine: name of its engine.
        log: file of its messages.
    """

    process: subprocess.Popen
    address: str
    engine: str
    log: Path

    @contextmanager
    def explaining_its_end(self) -> Iterator[None]:
        """Where questions fail because the server is gone, say why it is.

        Raises:
            InputError: it is gone; or the questions' own error.
        """
        try:
            yield
        except InputError:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=DRAIN_SECONDS)
            if self.process.returncode is None:
                raise
            reason = describe_end(self.process, self.engine, self.log)
            kept = "answers so far are kept: the same command goes on from there"
            raise InputError(f"{reason}; {kept}") from None


@contextmanager
def start_server(options: Sequence[str], engine: str, log: Path) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it behind the block; it also ends when this process is gone.

    Args:
        options: of `python -m llava.serve.api`, but for its address and limits.
        engine: name of its engine.
        log: file of its messages.

    Raises:
        InputError: it ends before it is ready; the line says why.
    """
    own = {
        "--host": "127.0.0.1",
        "--port": 0,
        "--max-pixels": UNLIMITED,
        "--max-body-mib": UNLIMITED,
        "--max-seconds": int(PATIENCE["timeout_seconds"]),
        "--drain-seconds": DRAIN_SECONDS,
    }
    command = [sys.executable, "-m", "llava.serve.api", *options, *list_pairs(own)]
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    with explain_errors("write", log), log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=file, encoding="utf-8", errors="replace"
        )
    with process.stdout:
        try:
            line = next((line for line in process.stdout if " at http" in line), None)
            if line is None:
                process.wait()
                raise InputError(describe_end(process, engine, log))
            yield Server(process, line.rpartition(" at ")[2].strip(), engine, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def describe_end(process: subprocess.Popen, engine: str, log: Path) -> str:
    """Say with which code a server has ended, and what its last error or its last line says."""
    lines = [line for line in read_bytes(log).decode("utf-8", "replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), (lines or ["it says nothing"])[-1])
    return f"--engine {engine}: its server ended with code {process.returncode}: {said.removeprefix('error: ')} ({log})"
