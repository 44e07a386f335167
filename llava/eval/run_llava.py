"""Ask one question about one or several images: `python -m llava.eval.run_llava --model-path ... --query ...`.

The answer goes to standard output; how many visual tokens it took goes to standard error. The search is greedy; with
`--temperature` tokens are drawn, and `--seed` repeats a draw. `eval_model` is LLaVA's entry point for scripts.
"""

import argparse
import sys

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


def eval_model(args: object) -> str:
    """Answer `args.query` about `args.image_file`, print the answer and return it.

    Args:
        args: the parsed options, or any object with LLaVA's attributes `model_path`, `model_base`, `query`,
            `conv_mode`, `image_file`, `sep`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`, and `seed`; all but
            the checkpoint, the query and the image may be missing. Without a temperature the search is greedy.

    Raises:
        InputError: an option, the checkpoint, an image or the question is not usable.
    """
    # 1. What needs no library: options out of range, unknown templates, an empty question.
    options, args = args, complete_options(build_parser(), args)
    spec = ModelSpec.from_options(options)
    sampling = Sampling(
        temperature=args.temperature or 0.0,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    if args.conv_mode:
        check_conv_mode(args.conv_mode)
    if not args.query.strip():
        raise InputError("--query is empty: write what you want to know about the image")
    # 2. Images before the model: they load fast, and a wrong path is the commonest mistake.
    images = load_images(image_parser(args))
    tokenizer, model, image_processor = spec.load(quiet=True)
    # 3. Ask.
    from llava.chat import ChatSession

    session = ChatSession(model, tokenizer, image_processor, choose_template(args, model.config))
    session.show(images)
    answer = session.ask(args.query, sampling)
    sys.stdout.write(answer.text + "\n")
    sys.stdout.flush()
    sys.stderr.write(answer.describe_tokens() + "\n")
    return answer.text


def image_parser(args: object) -> list[str]:
    """List the images that `args.image_file` names, joined by `args.sep` (a comma)."""
    return list_image_sources(args.image_file, getattr(args, "sep", ","))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of LLaVA's options and ours."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_image_options(parser)
    parser.add_argument("--query", required=True, help="the question; one <image> per image shows where they go")
    add_prompt_options(parser, conv_mode=None, temperature=0.0)
    add_seed_option(parser)
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this probability together")
    parser.add_argument("--num_beams", type=int, default=1, help="width of the beam search (default: 1, none)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length limit of the answer (default: 512)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    eval_model(args)


if __name__ == "__main__":
    run_command(main)
