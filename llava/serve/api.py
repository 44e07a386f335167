"""Serve a model to OpenAI's clients: `python -m llava.serve.api --model-path ...` ([serving](../../docs/serving.md)).

Chat completions over HTTP with text, images, several turns and streaming. Our towers and the token reduction make the
prompts, for each request its own (`"reduce": "TRIM:0.25"`); an engine runs the language model.
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import (
    EngineSpec,
    ModelSpec,
    add_engine_options,
    add_model_options,
    choose_template,
    natural,
    positive,
    user_path,
)
from llava.errors import InputError, run_command
from llava.files import read_lines
from llava.prompt import check_conv_mode
from llava.signals import watch_starter

if TYPE_CHECKING:
    from llava.serve.engine import Engine
    from llava.serve.front import Front


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the server's options."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.api", description="Serve a model to clients of OpenAI's chat completions."
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--conv-mode", metavar="NAME", help="conversation template (default: from the checkpoint's name)")
    add("--load-8bit", action="store_true", help="quantise to 8 bit (needs bitsandbytes)")
    add("--load-4bit", action="store_true", help="quantise to 4 bit (needs bitsandbytes)")
    group = parser.add_argument_group("engine")
    add_engine_options(group)
    add = group.add_argument
    add("--max-batch", type=positive, default=16, help="answers of the torch engine at once (default: %(default)s)")
    add("--cache-mib", type=natural, default=1024, help="kept features of images, in MiB (default: %(default)s)")
    add("--data-parallel", type=positive, default=1, metavar="N", help="one server per accelerator, N in all")
    add("--max-positions", type=positive, metavar="N", help="of prompt and answer, with vllm (default: the model's)")
    group = parser.add_argument_group("address")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0: any that is free (default: %(default)s)")
    add("--served-model-name", metavar="NAME", help="the model's name in requests (default: the checkpoint's)")
    add("--api-key-file", type=user_path, metavar="FILE", help="keys, one a line, one of which a request needs")
    add("--access-log", action="store_true", help="write a line for each request")
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add("--max-new-tokens", type=positive, default=512, help="of a request without a limit (default: %(default)s)")
    add("--max-images", type=natural, default=8, help="of a request (default: %(default)s)")
    add("--max-pixels", type=positive, default=50_000_000, help="of an image, width x height (default: %(default)s)")
    add("--max-body-mib", type=positive, default=32, help="of a request (default: %(default)s)")
    add("--max-running", type=positive, default=64, help="requests that are worked on at once (default: %(default)s)")
    add("--max-waiting", type=natural, default=256, help="further ones; more get status 429 (default: %(default)s)")
    add("--max-seconds", type=positive, default=600, help="from request to end of answer (default: %(default)s)")
    add("--drain-seconds", type=positive, default=60, help="on SIGTERM, to finish answers (default: %(default)s)")
    add("--allow-files", type=user_path, metavar="DIR", help="read image addresses file://... inside DIR")
    add("--allow-private-urls", action="store_true", help="read image addresses of private networks and this machine")
    return parser


def _port(text: str) -> int:
    number = natural(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"a port is at most 65535, not {text}")
    return number


def read_keys(path: Path | None) -> list[str]:
    """Read the API keys of a file.

    Raises:
        InputError: it cannot be read, or holds no key. The line holds no key.
    """
    if path is None:
        return []
    keys = [line.strip() for _, line in read_lines(path)]
    if not keys:
        raise InputError(f"{path} holds no key: write one a line")
    return keys


def main() -> None:
    """Serve as the options say."""
    args = build_parser().parse_args()
    # 1. What needs no library: options out of place, files.
    spec = ModelSpec.from_options(args)
    if args.conv_mode:
        check_conv_mode(args.conv_mode)
    engine_spec = EngineSpec.from_options(args)
    if args.allow_files and not args.allow_files.is_dir():
        raise InputError(f"--allow-files {args.allow_files}: there is no such folder")
    keys = read_keys(args.api_key_file)
    # 2. The server's packages and its port before the model: what is missing or taken is told at once.
    from llava.serve.listener import Listener, bind

    door = bind(args.host, args.port)
    if args.data_parallel > 1:
        from llava.serve.data_parallel import run_workers

        run_workers(sys.argv[1:], door, args.data_parallel, args.tensor_parallel, args.device)
        return
    from llava.serve.app import Completions, make_app
    from llava.serve.limits import Limits
    from llava.serve.remote_images import ImageReader

    watch_starter(signal.SIGTERM)
    # 3. The model: a front that makes prompts, an engine that answers them.
    front, engine = load(args, spec, engine_spec)
    limits = Limits(
        body_bytes=args.max_body_mib * 2**20,
        images=args.max_images,
        running=args.max_running,
        waiting=args.max_waiting,
        seconds=args.max_seconds,
    )
    name = args.served_model_name or spec.name
    reader = ImageReader(args.max_pixels, args.allow_files, args.allow_private_urls)

    # 4. Serve until a signal comes and what was begun is answered.
    async def serve() -> None:
        completions = Completions(front, engine, name, limits=limits, reader=reader, max_new_tokens=args.max_new_tokens)
        await engine.start()
        try:
            await Listener(
                make_app(completions, keys, max_model_len=engine.max_positions),
                completions.gate,
                title=f"{name} (engine {engine.name})",
                drain_seconds=args.drain_seconds,
                has_access_log=args.access_log,
            ).listen(door)
        finally:
            await engine.close()
            await front.close()

    asyncio.run(serve())


def load(args: argparse.Namespace, spec: ModelSpec, engine_spec: EngineSpec) -> "tuple[Front, Engine]":
    """Load the model, and make the two parts that a request passes; the engine is not started yet."""
    from llava.assistant import Llava
    from llava.serve.front import Front

    engine: Engine | None = None
    if engine_spec.name == "vllm":
        from llava.serve.vllm_engine import VllmEngine

        # It refuses what it cannot do before our weights are read, and loads its own when it starts.
        engine = VllmEngine(
            spec.path,
            spec.base,
            tensor_parallel_size=engine_spec.tensor_parallel,
            max_positions=args.max_positions,
            dtype=spec.dtype,
            gpu_memory_utilization=engine_spec.gpu_memory_utilization,
            options=engine_spec.options,
        )
    loaded = spec.load(quiet=True, without_layers=engine is not None)
    llava = Llava(*loaded, choose_template(args, loaded.model.config), spec)
    front = Front(llava, cache_bytes=args.cache_mib * 2**20, max_batch=args.max_batch)
    if engine is None:
        from llava.serve.torch_engine import TorchEngine

        engine = TorchEngine(llava.model, llava.tokenizer, max_batch=args.max_batch)
    return front, engine


if __name__ == "__main__":
    run_command(main)
