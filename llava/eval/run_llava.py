"""Ask one question about one or several pictures: `python -m llava.eval.run_llava --model-path ... --query ...`.

The answer goes to standard output; how many visual tokens it took goes to standard error. `eval_model` is the
published entry point for scripts.
"""

import argparse
import sys
from typing import Any

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

DEFAULT_TEMPERATURE = 0.2


def eval_model(args: Any) -> str:
    """Answer `args.query` about `args.image_file`, print the answer and return it.

    Args:
        args: the parsed options, or any object with the published attributes `model_path`, `model_base`, `query`,
            `conv_mode`, `image_file`, `sep`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`; all but the
            checkpoint, the query and the image may be missing.

    Raises:
        InputError: an option, the checkpoint, a picture or the question is not usable.
    """
    sampling = _read_sampling(args)
    template = choose_template(args)
    find_template(template)
    if not args.query.strip():
        raise InputError("--query is empty: write what you want to know about the picture")
    images = load_images(args.image_file, getattr(args, "sep", ","))
    tokenizer, model, image_processor = load_model(args)
    session = ChatSession(model, tokenizer, image_processor, template)
    session.show(images)
    answer = session.ask(args.query, sampling)
    sys.stdout.write(answer.text + "\n")
    sys.stdout.flush()
    sys.stderr.write(answer.describe_tokens() + "\n")
    return answer.text


def _read_sampling(args: Any) -> Sampling:
    return Sampling(
        temperature=getattr(args, "temperature", DEFAULT_TEMPERATURE) or 0.0,
        top_p=getattr(args, "top_p", None),
        num_beams=getattr(args, "num_beams", 1),
        max_new_tokens=getattr(args, "max_new_tokens", 512),
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the published options and ours."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_image_options(parser)
    parser.add_argument("--query", required=True, help="the question; one <image> per picture says where they go")
    parser.add_argument("--conv-mode", default=None, help="conversation template; default: from the checkpoint's name")
    parser.add_argument("--temperature", type=float, default=DEFAULT_TEMPERATURE, help="0 answers greedily")
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    prepare_terminal()
    eval_model(args)


if __name__ == "__main__":
    run_command(main)
