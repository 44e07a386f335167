"""A server that speaks OpenAI's chat completions, as the page asks it: `python -m llava.serve.demo --endpoint URL`.

The server of `llava.serve.api` takes a token reduction with each question, and says how many tokens were read. Which
patches they are it does not say, so the page has no pictures of them.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai

from llava.chat import read_question
from llava.errors import InputError, one_line
from llava.image import load_image, to_data_url
from llava.model.token_reduction import REDUCERS, parse_reduction
from llava.serve.page_model import Result, list_methods

NUM_PATCHES = 576
"""Of LLaVA-1.5, until a reply says how many there are; a budget above that keeps everything."""
KEY = "OPENAI_API_KEY"
NO_PICTURES = (
    "A server's reply does not say which patches were kept: the page shows them where it loads the model itself."
)


class Endpoint:
    """A server; see `llava.serve.page_model.Answerer`. Its methods are those before the language model."""

    def __init__(self, address: str, max_new_tokens: int = 512):
        """Ask the server for its model.

        Args:
            address: `http://host:port`, with or without `/v1`.
            max_new_tokens: length limit of an answer.

        Raises:
            InputError: not an address, or no such server answers there.
        """
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"--endpoint {address}: expected an address such as http://127.0.0.1:8000/v1")
        self._address = address if parts.path.strip("/") else f"{address.rstrip('/')}/v1"
        self._max_new_tokens = max_new_tokens
        self._client = openai.OpenAI(base_url=self._address, api_key=os.environ.get(KEY) or "none", max_retries=0)
        try:
            models = list(self._client.models.list())
        except openai.OpenAIError as error:
            raise InputError(self._explain(error)) from None
        if not models:
            raise InputError(f"{self._address} serves no model")
        self._model = models[0].id
        self.title = f"{self._model}, served at {self._address}"
        self.methods = {name: has_rule for name, has_rule in list_methods().items() if name in REDUCERS}
        self.num_patches = NUM_PATCHES

    def ask(self, image: Path, question: str, spec: str) -> Iterator[str | Result]:
        """Answer a question; see `llava.serve.page_model.Answerer`."""
        read_question(question)
        parse_reduction(spec)
        picture = {"type": "image_url", "image_url": {"url": to_data_url(load_image(str(image), upright=True))}}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
        return self._stream(messages, spec)

    def _stream(self, messages: list[dict], spec: str) -> Iterator[str | Result]:
        start, first, text, usage = time.perf_counter(), None, "", None
        try:
            with self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=0,
                max_tokens=self._max_new_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"reduce": spec},
            ) as chunks:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    piece = chunk.choices[0].delta.content if chunk.choices else None
                    if piece:
                        first = first or time.perf_counter()
                        text += piece
                        yield text
        except openai.OpenAIError as error:
            raise InputError(self._explain(error)) from None
        end = time.perf_counter()
        num_tokens, num_patches = find_image_counts(usage)
        self.num_patches = num_patches or self.num_patches
        yield Result(
            spec=spec,
            text=text.strip(),
            tokens="" if num_tokens is None else str(num_tokens),
            num_tokens=num_tokens,
            num_patches=num_patches,
            new_tokens=None if usage is None else usage.completion_tokens,
            first_seconds=(first or end) - start,
            seconds=end - start,
            note=NO_PICTURES,
        )

    def _explain(self, error: openai.OpenAIError) -> str:
        """Say in one line what went wrong with the server."""
        if isinstance(error, openai.APITimeoutError):
            return f"{self._address} does not answer in time"
        if isinstance(error, openai.APIConnectionError):
            return f"no server answers at {self._address}: is it running, and is the address right?"
        if isinstance(error, openai.AuthenticationError):
            return f"{self._address} wants a key: set {KEY}"
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            return one_line(f"{self._address}: {body.get('message') or f'status {error.status_code}'}")
        return one_line(f"{self._address}: {error}")


def find_image_counts(usage: object) -> tuple[int | None, int | None]:
    """Read how many image tokens were read, and of how many patches; None each where a server does not say."""
    details = getattr(usage, "prompt_tokens_details", None)
    counts = [getattr(details, name, None) for name in ("image_tokens", "image_patches")]
    num_tokens, num_patches = (count if isinstance(count, int) else None for count in counts)
    return num_tokens, num_patches
