"""An OpenAI-compatible endpoint: requests that are tried again, several at a time, and nothing secret in what is told.

Judges (`llava.eval.judge`) and models behind a server (`llava.eval.remote`) are asked through it.
"""

import asyncio
import base64
import email.utils
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from tqdm import tqdm

from llava.errors import InputError
from llava.eval.benchmark import Item, Result

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

KEY_VARIABLE, ADDRESS_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
DEFAULT_ADDRESS = "https://api.openai.com/v1"

LOOPBACK = ("localhost", "127.0.0.1", "::1")

LONGEST_PAUSE_SECONDS = 30.0
PASSING_STATUSES = (408, 409, 425, 429)
"""HTTP statuses below 500 that ask for another try."""
SPENT_QUOTA = "insufficient_quota"
"""Code of a 429 that no waiting cures."""

HIDDEN = "***"
MIN_HIDDEN, MIN_HIDDEN_IN_REPLIES = 3, 8
"""Length of a secret from which on it is removed; a key such as "x" or "EMPTY" may be a part of a reply's text."""
SECRET_SHAPES = re.compile(r"\bsk-[\w-]{16,}|(?<=://)[^/\s@]+(?=@)")
"""OpenAI's keys, also in part, and the user of an address."""
MAX_QUOTED_CHARACTERS = 200


class EndpointFault(Exception):
    """A request without a reply, as words that follow the name of the endpoint: "refuses: HTTP 401 (...)".

    Attributes:
        status: HTTP status of a refusal; None where no reply came at all.
    """

    def __init__(self, what: str, status: int | None = None):
        super().__init__(what)
        self.status = status


def read_variables() -> tuple[str | None, str | None]:
    """Read key and address from the environment, None where they are not set.

    Raises:
        InputError: one of them is none; no message holds a secret.
    """
    key, address = (os.environ.get(name, "").strip() or None for name in (KEY_VARIABLE, ADDRESS_VARIABLE))
    if key and not re.fullmatch("[!-~]+", key):
        raise InputError(f"{KEY_VARIABLE} holds a line break, a space or a special character: set the key alone")
    if address:
        check_address(address, ADDRESS_VARIABLE)
    return key, address


def check_address(address: str, name: str) -> None:
    """Refuse what is no address of an endpoint; `name` is the option or variable."""
    if not is_address(address):
        raise InputError(f"{name} must be an address such as {DEFAULT_ADDRESS}, not {show(address)!r}")


class Endpoint:
    """A server of chat completions.

    What may pass (429, 5xx, timeouts, broken connections, unreadable bodies) is tried again a bounded number of times,
    with growing pauses or those of `Retry-After`.

    Attributes:
        place: its address, for people; without what may be secret.
        secrets: hides these.
    """

    def __init__(
        self,
        address: str | None,
        key: str | None,
        *,
        max_tries: int = 6,
        first_pause_seconds: float = 1.0,
        timeout_seconds: float = 120.0,
        deadline_seconds: float = 600.0,
    ):
        """Connect to nothing yet.

        Args:
            address: of the endpoint; None for OpenAI's.
            key: None for a server that needs none.
            max_tries: how often one request is sent at most.
            first_pause_seconds: before the second try; each further pause is twice as long, up to half a minute.
            timeout_seconds: for one try, from connecting to the last byte of the reply.
            deadline_seconds: for a request with all its tries and pauses.
        """
        import openai  # takes a second, and only an endpoint needs it

        self._sdk, self.secrets = openai, Secrets(key, address)
        self._client = connect(address or DEFAULT_ADDRESS, key)
        self.place = self.secrets.hide(show(str(self._client.base_url)))
        self._has_key, self._max_tries = key is not None, max_tries
        self._first_pause, self._timeout, self._deadline = first_pause_seconds, timeout_seconds, deadline_seconds
        self._loop, self._stopped, self._under_way = start_loop(), asyncio.Event(), set[Future]()

    def complete(self, request: Mapping[str, object]) -> "ChatCompletion":
        """Send a request until there is a reply with a text.

        Args:
            request: arguments of the SDK's `chat.completions.create`.

        Raises:
            EndpointFault: it was refused, or all tries in time failed.
        """
        return self._run(self._try_often(request))

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], num_threads: int, name: str) -> list[Result]:
        """Work on items, several at a time; after a failure nothing more is sent, and what is on its way is waited for.

        Args:
            work: calls `complete`.
            items: in any order.
            num_threads: how many at a time.
            name: of the progress bar.
        """
        pool = ThreadPoolExecutor(num_threads)
        failures: list[Exception] = []

        def work_unless_failed(item: Item) -> Result:
            # Here, not where results are collected: that thread may be late.
            if failures:
                raise CancelledError
            try:
                return work(item)
            except Exception as error:
                failures.append(error)
                raise

        try:
            futures = [pool.submit(work_unless_failed, item) for item in items]
            for future in tqdm(as_completed(futures), total=len(futures), desc=name):
                future.result()
            return [future.result() for future in futures]
        except Exception:
            self._loop.call_soon_threadsafe(self._stopped.set)
            pool.shutdown(cancel_futures=True)
            raise failures[0] from None
        finally:
            # Ctrl-C, also while replies are on their way, waits for nothing.
            self._loop.call_soon_threadsafe(self._stopped.set)
            for request in list(self._under_way):
                request.cancel()
            pool.shutdown(cancel_futures=True)
            self._stopped = asyncio.Event()

    def _run(self, request: Coroutine[None, None, "ChatCompletion"]) -> "ChatCompletion":
        """Wait for a request on the event loop, where it can be cut off at any time."""
        future = asyncio.run_coroutine_threadsafe(request, self._loop)
        self._under_way.add(future)
        try:
            return future.result()
        finally:
            future.cancel()
            self._under_way.discard(future)

    async def _try_often(self, request: Mapping[str, object]) -> "ChatCompletion":
        """Send a request until there is a reply; a refusal, or failure of all tries in time, is an error."""
        end = time.monotonic() + self._deadline
        for number in range(1, self._max_tries + 1):
            if self._stopped.is_set():
                raise asyncio.CancelledError
            limit = min(self._timeout, end - time.monotonic())
            try:
                completion = await asyncio.wait_for(self._client.chat.completions.create(**request), limit)
                read_reply(completion)
                return completion
            # A body that is no JSON makes the SDK's parser raise errors that are not the SDK's.
            except (self._sdk.OpenAIError, TimeoutError, ValueError, RecursionError) as error:
                failure = error
            reason, wait = self._describe(failure), read_retry_after(failure)
            left = end - time.monotonic()
            if not may_pass(failure) or (wait is not None and wait > left):
                raise EndpointFault(f"refuses: {reason}", getattr(failure, "status_code", None))
            if wait is None:
                # Questions that failed together do not come back together.
                pause = min(self._first_pause * 2 ** (number - 1), LONGEST_PAUSE_SECONDS)
                wait = pause * random.uniform(0.75, 1.25)
            if number == self._max_tries or wait > left:
                break
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), wait)
        tries = f"{number} {'try' if number == 1 else 'tries'}"
        raise EndpointFault(f"gave no reply in {tries}, the last time: {reason}")

    def _describe(self, failure: Exception) -> str:
        said = self.secrets.clip(failure.__cause__ or failure)
        if isinstance(failure, self._sdk.APIStatusError):
            hint = "" if self._has_key or failure.status_code != 401 else f"; {KEY_VARIABLE} is not set"
            return f"HTTP {failure.status_code} ({said}){hint}"
        if isinstance(failure, self._sdk.APIConnectionError):
            return f"no connection ({said})"
        if isinstance(failure, asyncio.TimeoutError):
            return f"no answer within {self._timeout:g} seconds"
        return f"a reply that is no chat completion ({said})"


@cache
def connect(address: str, key: str | None) -> "AsyncOpenAI":
    """Make the client of an endpoint, which stays for good.

    The SDK closes the connections of a client that is let go in the course of garbage collection. By then their file
    descriptors may be those of another client, whose requests would wait for ever.
    """
    import openai

    parts = urlsplit(address)
    # A proxy of the environment is not the way to this machine.
    is_here = parts.hostname in LOOPBACK
    client = openai.DefaultAsyncHttpxClient(timeout=None, trust_env=False) if is_here else None
    # The SDK's retries are off: they repeat a 429 for a spent quota, do not repeat a body that is no completion, and
    # differ between its versions. So is its timeout, which begins anew with every byte. A query is passed on its own,
    # or the SDK would put the path behind it. A server without keys ignores "none".
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=urlunsplit(parts._replace(query="", fragment="")),
        default_query=dict(parse_qsl(parts.query)),
        timeout=None,
        max_retries=0,
        http_client=client,
    )


def escape_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: no endpoint takes half of a surrogate pair, which an answer may have."""
    return text.encode(errors="backslashreplace").decode()


@cache
def start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoint", daemon=True).start()
    return loop


def read_reply(completion: "ChatCompletion") -> str:
    """Take the text out of a completion; an empty one is a reply, too, but none at all is a `ValueError`."""
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(completion if isinstance(completion, str) else "it has no choices") from None
    if not isinstance(text, str):
        raise ValueError("its message has no text")
    return text


def may_pass(failure: Exception) -> bool:
    status = getattr(failure, "status_code", 500)
    return (status >= 500 or status in PASSING_STATUSES) and getattr(failure, "code", None) != SPENT_QUOTA


def read_retry_after(failure: Exception) -> float | None:
    """Return how many seconds an endpoint asks to wait (it sends seconds or a date); None if it does not."""
    value = getattr(getattr(failure, "response", None), "headers", {}).get("retry-after", "").strip()
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


# ----------------------------------------------------------------------------------------------------------- secrets
class Secrets:
    """The scrubber of everything that an endpoint or a library says: hides the key and what an address may hold."""

    def __init__(self, key: str | None, address: str | None):
        parts = urlsplit(address or "")
        user = parts.netloc.rpartition("@")[0]
        plain = {key or "", user, user.partition(":")[2] or user, parts.fragment}
        plain.update(value for _, value in parse_qsl(parts.query))
        plain.update([unquote(secret) for secret in plain])
        # As addresses, Python and the headers of HTTP write them.
        coded = {base64.b64encode(secret.encode()).decode().rstrip("=") for secret in plain}
        written = {form for secret in plain for form in (quote(secret, ""), repr(secret)[1:-1])}
        self._secrets = sorted(plain | written | coded, key=len, reverse=True)

    def hide(self, text: str, min_length: int = MIN_HIDDEN) -> str:
        """Return a text without the secrets of at least `min_length` characters."""
        for secret in self._secrets:
            if len(secret) >= min_length:
                text = re.sub(re.escape(secret), HIDDEN, text, flags=re.IGNORECASE)
        return SECRET_SHAPES.sub(HIDDEN, text)

    def clip(self, what: object) -> str:
        """Quote something from outside: on one line, not at length, without secrets and control characters."""
        line = " ".join(self.hide(str(what)).split())
        # What no terminal shows may also hide in a key.
        text = self.hide("".join(filter(str.isprintable, line))) or type(what).__name__
        return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False


def show(address: str) -> str:
    """Return an address, or what should be one, without the parts that may hold a key: user, query, fragment."""
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + re.split("[?#&;=]", rest.rpartition("@")[2])[0]
