"""Chat about an image in the terminal: `python -m llava.serve.cli --model-path ... --image-file ...`.

The image stays in view; answers appear as they are written; after each one a line shows how many visual tokens this
question took. An empty line or the end of input ends the chat. Questions may also be piped in, one per line.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from llava.cli import (
    ModelSpec,
    add_image_options,
    add_model_options,
    add_prompt_options,
    add_seed_option,
    choose_template,
    complete_options,
    list_image_sources,
    load_images,
)
from llava.cli import load_image as load_image
from llava.errors import InputError, run_command
from llava.prompt import check_conv_mode
from llava.sampling import Sampling

if TYPE_CHECKING:
    from llava.chat import ChatSession


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of LLaVA's options and ours."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_image_options(parser)
    add_prompt_options(parser, conv_mode=None, temperature=0.2)
    add_seed_option(parser)
    parser.add_argument("--max-new-tokens", type=int, default=512, help="length limit of an answer (default: 512)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (needs bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (needs bitsandbytes)")
    parser.add_argument("--debug", action="store_true", help="print each prompt and answer as they are")
    return parser


def chat(session: "ChatSession", sampling: Sampling, debug: bool = False) -> None:
    """Read questions from standard input and answer them until an empty line or the end of input.

    Args:
        session: the dialogue, with its images.
        sampling: how answers are searched for.
        debug: print each prompt and answer as they are.

    Raises:
        InputError: a question cannot be answered, and standard input is not a terminal where another could be asked.
    """
    from transformers import TextStreamer

    user, assistant = (role.strip() for role in session.template.roles)
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while question := read_question(f"{user}: "):
        _print(f"{assistant}: ", end="")
        try:
            answer = session.ask(question, sampling, streamer)
        except InputError as error:
            if not sys.stdin.isatty():
                _print()
                raise
            _print(f"({error})")
            continue
        _print(f"[{answer.describe_tokens()}]")
        if debug:
            _print(f"{ {'prompt': answer.prompt, 'outputs': answer.text} }")
    _print("exit...")


def read_question(prompt: str) -> str:
    """Ask for one line; "" for an empty line or the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        _print()
        return ""


def _print(text: str = "", end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def main(args: object = None) -> None:
    """Chat as the options say.

    Args:
        args: parsed options, or any object with LLaVA's attributes, of which all but the checkpoint and the image may
            be missing; None: those of the command line.

    Raises:
        InputError: an option, the checkpoint or an image is not usable.
    """
    args = build_parser().parse_args() if args is None else complete_options(build_parser(), args)
    # 1. What needs no library: options out of range, unknown templates.
    sampling = Sampling(temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed)
    spec = ModelSpec.from_options(args)
    if getattr(args, "conv_mode", None):
        check_conv_mode(args.conv_mode)
    # 2. Images before the model: they load fast, and a wrong path is the commonest mistake.
    images = load_images(list_image_sources(args.image_file, args.sep))
    tokenizer, model, image_processor = spec.load(quiet=True)
    # 3. Talk.
    from llava.chat import ChatSession

    session = ChatSession(model, tokenizer, image_processor, choose_template(args, model.config))
    session.show(images)
    chat(session, sampling, args.debug)


if __name__ == "__main__":
    run_command(main)
