"""Chat about a picture in the terminal: `python -m llava.serve.cli --model-path ... --image-file ...`.

The picture stays in view; answers appear as they are written; after each one a line says how many visual tokens this
question took. An empty line or the end of input ends the chat. Questions may also be piped in, one per line.
"""

import argparse
import sys

from transformers import TextStreamer

from llava.chat import ChatSession, Sampling, find_template
from llava.cli import (
    add_image_options,
    add_model_options,
    choose_template,
    load_images,
    load_model,
    prepare_terminal,
)
from llava.errors import InputError, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the published options and ours."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_image_options(parser)
    parser.add_argument("--conv-mode", default=None, help="conversation template; default: from the checkpoint's name")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 answers greedily")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--load-8bit", action="store_true", help="quantize to 8 bit (needs bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantize to 4 bit (needs bitsandbytes)")
    parser.add_argument("--debug", action="store_true", help="show each prompt and answer as they are")
    return parser


def chat(session: ChatSession, sampling: Sampling, debug: bool = False) -> None:
    """Read questions from standard input and answer them until an empty line or the end of input.

    Args:
        session: the dialogue, with its pictures.
        sampling: how answers are searched for.
        debug: show each prompt and answer as they are.

    Raises:
        InputError: a question can't be answered and nobody sits at the terminal to ask another one.
    """
    user, assistant = (role.strip() for role in session.template.roles)
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while question := read_question(f"{user}: "):
        _say(f"{assistant}: ", end="")
        try:
            answer = session.ask(question, sampling, streamer)
        except InputError as error:
            if not sys.stdin.isatty():
                _say()
                raise
            _say(f"({error})")
            continue
        _say(f"[{answer.describe_tokens()}]")
        if debug:
            _say(f"{ {'prompt': answer.prompt, 'outputs': answer.text} }")
    _say("exit...")


def read_question(prompt: str) -> str:
    """Ask for one line; "" for an empty line or the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        _say()
        return ""


def _say(text: str = "", end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    prepare_terminal()
    sampling = Sampling(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    template = choose_template(args)
    find_template(template)
    images = load_images(args.image_file, args.sep)
    tokenizer, model, image_processor = load_model(args)
    session = ChatSession(model, tokenizer, image_processor, template)
    session.show(images)
    chat(session, sampling, args.debug)


if __name__ == "__main__":
    run_command(main)
