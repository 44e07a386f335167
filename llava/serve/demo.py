"""A page on which one sees which patches a question keeps: `python -m llava.serve.demo`.

Choose an image, ask, and see the answer with the kept patches and their scores; change method and budget; compare with
no reduction. Without `--model-path` it is the pocket model of the repository. `--endpoint` asks a server instead.
"""

import argparse
import os
import sys
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from llava.cli import ModelSpec, add_model_options, choose_template, natural, positive
from llava.errors import InputError, run_command
from llava.prompt import check_conv_mode
from llava.serve.samples import SHAPES, find_pocket_checkpoint, list_samples

if TYPE_CHECKING:
    from llava.serve.page_model import Answerer

PORT = 7860
MAX_NEW_TOKENS = 512
OWN_NAMES = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
OF_A_MODEL = (
    "model_path", "model_base", "reduce", "calibrated", "device", "dtype", "tower_dtype", "attn_implementation",
    "conv_mode", "load_8bit", "load_4bit",
)  # fmt: skip
"""Options that say nothing where a server has the model."""


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.demo", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_model_options(parser, "checkpoint folder or hub id (default: the repository's pocket model)", required=False)
    add("--load-8bit", action="store_true", help="quantise to 8 bit (needs bitsandbytes)")
    add("--load-4bit", action="store_true", help="quantise to 4 bit (needs bitsandbytes)")
    add("--conv-mode", metavar="NAME", help="conversation template (default: from the checkpoint's name)")
    add("--max-new-tokens", type=positive, default=MAX_NEW_TOKENS, metavar="N", help="length limit (default: 512)")
    add("--endpoint", metavar="URL", help="ask a server (llava.serve.api), such as http://127.0.0.1:8000/v1")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=natural, default=PORT, help=f"port to listen on (default: {PORT})")
    add("--share", action="store_true", help="make the page public, through gradio's servers")
    return parser


def load_answerer(args: argparse.Namespace) -> "Answerer":
    """Load the model, or reach the server.

    Raises:
        InputError: the checkpoint, the server or an option is not usable.
    """
    if args.endpoint is not None:
        from llava.serve.page_endpoint import Endpoint

        return Endpoint(args.endpoint, args.max_new_tokens)
    spec = ModelSpec.from_options(args)
    loaded = spec.load(quiet=True)

    from llava.assistant import Llava
    from llava.serve.page_model import PageModel

    llava = Llava(*loaded, choose_template(args, loaded.model.config), spec)
    return PageModel(llava, spec.path, args.max_new_tokens)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded, and fill in the pocket model.

    Raises:
        InputError: naming the option.
    """
    if not 1 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: expected 1 to 65535")
    if args.endpoint is not None:
        given = next((name for name in OF_A_MODEL if getattr(args, name)), None)
        if given is not None:
            option = f"--{given.replace('_', '-')}"
            raise InputError(
                f"{option} says nothing with --endpoint, whose server has the model: leave one of them out"
            )
        return
    if args.conv_mode is not None:
        check_conv_mode(args.conv_mode)
    if args.model_path is None:
        args.model_path = str(find_pocket_checkpoint())


def main() -> None:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: an option, the checkpoint, the server or the port is not usable.
    """
    args = build_parser().parse_args()
    check_options(args)
    with TemporaryDirectory(prefix="llava-page-") as uploads:
        serve(args, uploads)


def serve(args: argparse.Namespace, uploads: str) -> None:
    """Load the model, and serve the page until the command is ended.

    Args:
        args: checked options.
        uploads: a folder for images that visitors bring.

    Raises:
        InputError: the checkpoint, the server or the port is not usable.
    """
    # 1. gradio before the model: a missing package is told at once. It reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it sends no statistics
    os.environ["GRADIO_TEMP_DIR"] = uploads
    bypass_proxy()
    import gradio

    from llava.serve.page import Page
    from llava.serve.page_parts import CSS

    # 2. The model, and the page with its first answer.
    page = Page(load_answerer(args), list_samples()).lay_out()
    # 3. Serve. Fonts are the system's: nothing is loaded from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=1)
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=args.share, theme=theme, css=CSS, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, footer_links=["settings"], allowed_paths=[str(SHAPES)],
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot listen on {args.host}, port {args.port}: give another --port ({error})") from None
    sys.stdout.write(f"page at {page.share_url or page.local_url} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    try:
        Event().wait()
    finally:
        page.close(verbose=False)


def bypass_proxy() -> None:
    """Let this process reach its own machine without a proxy: gradio asks its page whether it is there."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*filter(None, [known]), *OWN_NAMES])


if __name__ == "__main__":
    run_command(main)
