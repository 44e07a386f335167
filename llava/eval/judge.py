"""Judges: a language model behind an OpenAI-compatible endpoint, and an offline stand-in that compares texts.

`make_judge` chooses by name and environment; benchmarks know only the interface `llava.eval.benchmark.Judge`.
"""

import asyncio
import base64
import email.utils
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from tqdm import tqdm

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Item, Judge, Result
from llava.files import FileError, append_line, explain_errors, parse_record, read_text

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

EXACT, API = "exact", "api"
KEY_VARIABLE, ADDRESS_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
DEFAULT_ADDRESS = "https://api.openai.com/v1"

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
TORN_LINE_START = '{"key": "'
"""How a line of the cache begins, by which a torn one is told from a line of some other file."""


# ------------------------------------------------------------------------------------------------------------ choice
def make_judge(kind: str | None, model: str | None, cache: Path, task: Benchmark, *, num_runs: int = 1) -> Judge | None:
    """Make the judge of a benchmark.

    Args:
        kind: "exact" (the offline stand-in), "api", the name of a model, or None: the endpoint that the environment
            names (`OPENAI_API_KEY`, `OPENAI_BASE_URL`) where the benchmark has no score without a judge.
        model: name of the model at the endpoint; None for the judge of the benchmark's paper.
        cache: file of the replies.
        task: the benchmark.
        num_runs: how many times each answer is judged.

    Returns:
        A judge; None where the benchmark can do without one and none was asked for.

    Raises:
        InputError: a judge is needed and there is no (usable) endpoint, or the options contradict one another.
    """
    if task.uses_judge == "never":
        if kind or model:
            raise InputError(f"{task.name} is scored by rules: it takes no judge")
        return None
    if kind == EXACT:
        if model:
            raise InputError(f"--judge {EXACT} compares texts: it takes no model (--judge-model {model})")
        return ExactJudge(task)
    if task.uses_judge == "optional" and kind is None and model is None:
        return None  # a key in the environment is no order to pay for a judge that is not needed
    if kind not in (None, API):
        if model not in (None, kind):
            raise InputError(f"--judge {kind} and --judge-model {model} name two models")
        model = kind
    key, address = find_endpoint(task)
    return ApiJudge(model or task.judge_model, ReplyCache(cache), address=address, key=key, num_runs=num_runs)


def find_endpoint(task: Benchmark) -> tuple[str | None, str | None]:
    """Read key and address from the environment; either may be None, not both. No message holds a secret."""
    key, address = (os.environ.get(name, "").strip() or None for name in (KEY_VARIABLE, ADDRESS_VARIABLE))
    if not key and not address:
        raise InputError(
            f"{task.name} needs a language model as judge and there is no endpoint: the answers are ready; set "
            f"{KEY_VARIABLE} (OpenAI) or {ADDRESS_VARIABLE} (any compatible server) and run the same command again, or "
            f"take --judge {EXACT}, an offline stand-in whose numbers are not the benchmark's"
        )
    if key and not re.fullmatch("[!-~]+", key):
        raise InputError(f"{KEY_VARIABLE} holds a line break, a space or a special character: set the key alone")
    if address and not is_address(address):
        raise InputError(f"{ADDRESS_VARIABLE} must be an address such as {DEFAULT_ADDRESS}, not {show(address)!r}")
    return key, address


class ExactJudge:
    """Stand-in for a judge: computes the reply that each benchmark expects from the texts alone.

    It lets everything run without a network. Its numbers measure how many words answers and references share; they
    must not be compared with a language model's.
    """

    name = "exact (offline stand-in)"
    offline = True
    num_runs = 1

    def __init__(self, benchmark: Benchmark):
        self._benchmark = benchmark

    def ask(self, case: Case, messages: Sequence[Mapping[str, str]], **_: float) -> str:
        """Return the computed reply; the messages are not read."""
        return self._benchmark.offline_reply(case)

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        return [judge_one(item) for item in items]


# ---------------------------------------------------------------------------------------------------------- endpoint
class ApiJudge:
    """A language model behind an OpenAI-compatible endpoint.

    What may pass (429, 5xx, timeouts, broken connections, unreadable bodies) is tried again a bounded number of times,
    with growing pauses or those of `Retry-After`. Replies are cached as they come, without secrets.
    """

    offline = False

    def __init__(
        self,
        model: str,
        cache: "ReplyCache",
        *,
        address: str | None = None,
        key: str | None = None,
        num_runs: int = 1,
        max_tries: int = 6,
        first_pause_seconds: float = 1.0,
        timeout_seconds: float = 120.0,
        deadline_seconds: float = 600.0,
        num_threads: int = 8,
    ):
        """Connect to nothing yet.

        Args:
            model: its name at the endpoint.
            cache: earlier replies, and where new ones go.
            address: of the endpoint; None for OpenAI's.
            key: None for a server that needs none.
            num_runs: how many times each answer is judged.
            max_tries: how often one question is sent at most.
            first_pause_seconds: before the second try; each further pause is twice as long, up to half a minute.
            timeout_seconds: for one try, from connecting to the last byte of the reply.
            deadline_seconds: for a question with all its tries and pauses.
            num_threads: number of questions under way at the same time.
        """
        import openai  # takes a second, and only an endpoint needs it

        self.name, self.num_runs = model, num_runs
        self._sdk, self._cache, self._secrets = openai, cache, Secrets(key, address)
        parts = urlsplit(address or DEFAULT_ADDRESS)
        # The SDK's retries are off: they repeat a 429 for a spent quota, do not repeat a body that is no completion,
        # and differ between its versions. So is its timeout, which begins anew with every byte. A query is passed on
        # its own, or the SDK would put the path behind it. A server without keys ignores "none".
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=urlunsplit(parts._replace(query="", fragment="")),
            default_query=dict(parse_qsl(parts.query)),
            timeout=None,
            max_retries=0,
        )
        self._place = self._secrets.hide(show(str(self._client.base_url)))
        self._has_key, self._max_tries, self._num_threads = key is not None, max_tries, num_threads
        self._first_pause, self._timeout, self._deadline = first_pause_seconds, timeout_seconds, deadline_seconds
        self._loop, self._stopped, self._under_way = start_loop(), asyncio.Event(), set[Future[str]]()

    def ask(
        self,
        case: Case,
        messages: Sequence[Mapping[str, str]],
        *,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
    ) -> str:
        """Return the reply to a chat, from the cache if the same was asked before (see `Judge.ask`)."""
        chat = [{name: escape_surrogates(text) for name, text in message.items()} for message in messages]
        request = {"model": self.name, "messages": chat, "temperature": temperature, "max_tokens": max_tokens}
        # The name holds everything that the reply depends on.
        whole = json.dumps([case.task, case.key, attempt, request], sort_keys=True)
        key = hashlib.sha256(whole.encode()).hexdigest()
        known = self._cache.find(key)
        if known is not None:
            return known
        reply = self._secrets.hide(self._run(self._try_often(case, request)), MIN_HIDDEN_IN_REPLIES)
        about = {"task": case.task, "case": case.key, "model": self.name, "attempt": attempt}
        return self._cache.keep(key, reply, **about, temperature=temperature)

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items, several at a time; after a failure nothing more is sent, and replies on their way are kept."""
        pool = ThreadPoolExecutor(self._num_threads)
        failures: list[Exception] = []

        def judge_unless_failed(item: Item) -> Result:
            # Here, not where results are collected: that thread may be late.
            if failures:
                raise CancelledError
            try:
                return judge_one(item)
            except Exception as error:
                failures.append(error)
                raise

        try:
            futures = [pool.submit(judge_unless_failed, item) for item in items]
            for future in tqdm(as_completed(futures), total=len(futures), desc=f"judge {self.name}"):
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

    def _run(self, request: Coroutine[None, None, str]) -> str:
        """Wait for a request on the event loop, where it can be cut off at any time."""
        future = asyncio.run_coroutine_threadsafe(request, self._loop)
        self._under_way.add(future)
        try:
            return future.result()
        finally:
            future.cancel()
            self._under_way.discard(future)

    async def _try_often(self, case: Case, request: Mapping[str, object]) -> str:
        """Send a request until there is a reply; a refusal, or failure of all tries in time, is an error."""
        end = time.monotonic() + self._deadline
        for number in range(1, self._max_tries + 1):
            if self._stopped.is_set():
                raise asyncio.CancelledError
            limit = min(self._timeout, end - time.monotonic())
            try:
                return read_reply(await asyncio.wait_for(self._client.chat.completions.create(**request), limit))
            # A body that is no JSON makes the SDK's parser raise errors that are not the SDK's.
            except (self._sdk.OpenAIError, TimeoutError, ValueError, RecursionError) as error:
                failure = error
            reason, wait = self._describe(failure), read_retry_after(failure)
            left = end - time.monotonic()
            if not may_pass(failure) or (wait is not None and wait > left):
                raise self._give_up(case, f"refuses: {reason}")
            if wait is None:
                # Questions that failed together do not come back together.
                pause = min(self._first_pause * 2 ** (number - 1), LONGEST_PAUSE_SECONDS)
                wait = pause * random.uniform(0.75, 1.25)
            if number == self._max_tries or wait > left:
                break
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), wait)
        tries = f"{number} {'try' if number == 1 else 'tries'}"
        raise self._give_up(case, f"gave no reply in {tries}, the last time: {reason}")

    def _give_up(self, case: Case, what: str) -> InputError:
        return InputError(
            f"judge {self.name} at {self._place} {what} ({case.task}, question {case.key}); the answers are ready, "
            f"{len(self._cache)} replies are kept in {self._cache.path}: the same command goes on from there"
        )

    def _describe(self, failure: Exception) -> str:
        said = self._secrets.clip(failure.__cause__ or failure)
        if isinstance(failure, self._sdk.APIStatusError):
            hint = "" if self._has_key or failure.status_code != 401 else f"; {KEY_VARIABLE} is not set"
            return f"HTTP {failure.status_code} ({said}){hint}"
        if isinstance(failure, self._sdk.APIConnectionError):
            return f"no connection ({said})"
        if isinstance(failure, asyncio.TimeoutError):
            return f"no answer within {self._timeout:g} seconds"
        return f"a reply that is no chat completion ({said})"


def escape_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: no endpoint takes half of a surrogate pair, which an answer may have."""
    return text.encode(errors="backslashreplace").decode()


@cache
def start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge", daemon=True).start()
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


# ------------------------------------------------------------------------------------------------------------- cache
class ReplyCache:
    """Replies by key, in memory and in a JSON Lines file: each is kept the moment it comes, none is paid for twice.

    Safe to use from several threads; several processes may append to one file. A line that a killed writer left torn
    is skipped (its question is asked again). Of two replies to one key the first counts, so that no score changes by
    itself.
    """

    def __init__(self, path: Path):
        """Read the file, if there is one; one of something other than replies is refused."""
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        text = ""
        with explain_errors("read", path), suppress(FileNotFoundError):
            path.stat()
            text = read_text(path)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self._read_line(line, number)
        self._is_torn = bool(text) and not text.endswith("\n")

    def __len__(self) -> int:
        return len(self._replies)

    def find(self, key: str) -> str | None:
        with self._lock:
            return self._replies.get(key)

    def keep(self, key: str, reply: str, **about: str | float) -> str:
        """Write a reply, with JSON data about it for people; after return it survives a power cut.

        Returns:
            The reply that counts: this one, or an earlier one.
        """
        line = json.dumps({"key": key, **about, "reply": reply})
        with self._lock:
            if key not in self._replies:
                line, self._is_torn = "\n" * self._is_torn + line, True
                append_line(self.path, line)
                self._is_torn, self._replies[key] = False, reply
            return self._replies[key]

    def _read_line(self, line: str, number: int) -> None:
        try:
            record = parse_record(line, str(self.path))
        except FileError:
            if line.startswith(TORN_LINE_START) or TORN_LINE_START.startswith(line):
                return
            record = {}
        if not all(isinstance(record.get(name), str) for name in ("key", "reply")):
            raise InputError(f"{self.path} line {number} is no reply of a judge: give --judge-cache a file of its own")
        self._replies.setdefault(record["key"], record["reply"])
