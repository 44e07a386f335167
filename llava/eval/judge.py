"""The judges: a language model behind an OpenAI-compatible endpoint, and an offline stand-in that compares texts.

`make_judge` chooses by name and environment; benchmarks know only the interface in `judging`.
"""

import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Item, Judge, Result
from llava.eval.replies import ReplyCache

EXACT, API = "exact", "api"
KEY_VARIABLE, ADDRESS_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"

MAX_TRIES = 6
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
"""An endpoint that asks for a longer pause has run out of quota for now; nobody waits for that."""
TIMEOUT_SECONDS = 120.0
NUM_THREADS = 8
PASSING_STATUSES = (408, 409, 425, 429)
"""HTTP answers below 500 that say "try again"."""
SPENT_QUOTA = "insufficient_quota"
"""Code of a 429 that no waiting cures."""
MAX_QUOTED_CHARACTERS = 200


def make_judge(kind: str | None, model: str | None, cache: Path, task: Benchmark, *, num_runs: int = 1) -> Judge | None:
    """Make the judge of a benchmark.

    Args:
        kind: "exact" (the offline stand-in), "api", the name of a model, or None: the endpoint that the environment
            names (`OPENAI_API_KEY`, `OPENAI_BASE_URL`) where the benchmark has no score without a judge.
        model: name of the model at the endpoint; None for the benchmark's published judge.
        cache: file of the replies.
        task: the benchmark.
        num_runs: how many times each answer is judged.

    Returns:
        A judge; None where the benchmark can do without one and none was asked for.

    Raises:
        InputError: there must be a judge and there is no endpoint, or the options contradict one another.
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
        return None  # a key in the environment is no wish to spend money on what a rule can do
    if kind not in (None, API):
        if model not in (None, kind):
            raise InputError(f"--judge {kind} and --judge-model {model} name two models")
        model = kind
    key, address = (os.environ.get(name, "").strip() for name in (KEY_VARIABLE, ADDRESS_VARIABLE))
    if not key and not address:
        raise InputError(explain_missing_endpoint(task))
    if address and not address.startswith(("https://", "http://")):
        raise InputError(f"{ADDRESS_VARIABLE} must be an address such as https://api.openai.com/v1, not {address!r}")
    model = model or task.judge_model
    return ApiJudge(model, ReplyCache(cache), address=address or None, key=key or None, num_runs=num_runs)


def explain_missing_endpoint(task: Benchmark) -> str:
    """Say what a judged benchmark lacks, and how to go on."""
    return (
        f"{task.name} needs a language model as judge and there is no endpoint: the answers are ready; set "
        f"{KEY_VARIABLE} (OpenAI) or {ADDRESS_VARIABLE} (any compatible server) and run the same command again, or "
        f"take --judge {EXACT}, an offline stand-in whose numbers are not the benchmark's"
    )


class ExactJudge:
    """Stand-in for a judge: computes the reply that each benchmark expects from the texts alone.

    It lets the whole path run without a network. Its numbers say how much the words of answers and references have in
    common; they must not stand beside a language model's.
    """

    name = "exact (offline stand-in)"
    offline = True
    num_runs = 1

    def __init__(self, benchmark: Benchmark):
        self._benchmark = benchmark

    def ask(
        self,
        case: Case,
        messages: Sequence[Mapping[str, str]],
        *,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
    ) -> str:
        """Return the computed reply; the messages are not read."""
        return self._benchmark.offline_reply(case)

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items one after another."""
        return [judge_one(item) for item in items]


class ApiJudge:
    """A language model behind an OpenAI-compatible endpoint.

    What may pass (429, 5xx, timeouts, broken connections, unreadable bodies) is tried again, a bounded number of times
    and with growing pauses; what the endpoint says in `Retry-After` is obeyed. Replies are cached as they come.
    """

    offline = False

    def __init__(
        self,
        model: str,
        cache: ReplyCache,
        *,
        address: str | None = None,
        key: str | None = None,
        num_runs: int = 1,
        max_tries: int = MAX_TRIES,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        num_threads: int = NUM_THREADS,
    ):
        """Connect to nothing yet.

        Args:
            model: its name at the endpoint.
            cache: replies that came before, and where new ones go.
            address: of the endpoint, such as `https://api.openai.com/v1`; None for OpenAI's.
            key: None for a server that asks for none.
            num_runs: how many times each answer is judged.
            max_tries: how often one question is sent at most.
            first_pause_seconds: before the second try; each further pause is twice as long, up to half a minute.
            timeout_seconds: how long the endpoint may be silent.
            num_threads: questions under way at the same time.
        """
        # Only a judge at an endpoint needs the SDK.
        import openai

        self.name = model
        self.num_runs = num_runs
        self._cache = cache
        self._sdk = openai
        # The retries are ours: they also cover bodies that are no completion. A server without keys ignores "none".
        self._client = openai.OpenAI(api_key=key or "none", base_url=address, timeout=timeout_seconds, max_retries=0)
        self._has_key = key is not None
        self._max_tries = max_tries
        self._first_pause_seconds = first_pause_seconds
        self._num_threads = num_threads
        self._stopped = threading.Event()

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
        request = {
            "model": self.name,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        key = name_request(case, request, attempt)
        known = self._cache.find(key)
        if known is not None:
            return known
        reply = self._ask_patiently(case, request)
        about = {"task": case.task, "case": case.key, "model": self.name, "attempt": attempt}
        return self._cache.keep(key, reply, **about, temperature=temperature)

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items, several at a time; the first failure stops the rest, whose replies so far are kept."""
        try:
            with ThreadPoolExecutor(self._num_threads) as pool:
                futures = [pool.submit(judge_one, item) for item in items]
                try:
                    for future in tqdm(as_completed(futures), total=len(futures), desc=f"judge {self.name}"):
                        future.result()
                except BaseException:
                    self._stopped.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                return [future.result() for future in futures]
        finally:
            self._stopped.clear()

    def _ask_patiently(self, case: Case, request: Mapping[str, Any]) -> str:
        """Send a request until there is a reply.

        Raises:
            InputError: the endpoint refuses, every try failed, or another thread's failure ended the round.
        """
        pause, reason = self._first_pause_seconds, "stopped"
        for number in range(1, self._max_tries + 1):
            if self._stopped.is_set():
                break
            try:
                return read_reply(self._client.chat.completions.create(**request))
            # A body that is no JSON is a ValueError of the SDK's parser.
            except (self._sdk.OpenAIError, UnreadableReplyError, ValueError) as error:
                failure = error
            reason, wait = self._describe(failure), read_retry_after(failure)
            if not may_pass(failure) or (wait is not None and wait > LONGEST_RETRY_AFTER_SECONDS):
                raise self._give_up(case, f"refuses: {reason}")
            if number < self._max_tries:
                # Threads that failed together do not come back together.
                self._stopped.wait(wait if wait is not None else pause * random.uniform(0.75, 1.25))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise self._give_up(case, f"gave no reply in {self._max_tries} tries, the last time: {reason}")

    def _give_up(self, case: Case, what: str) -> InputError:
        return InputError(
            f"judge {self.name} at {self._client.base_url} {what} ({case.task}, question {case.key}); the answers are "
            f"ready, {len(self._cache)} replies are kept in {self._cache.path}: the same command goes on from there"
        )

    def _describe(self, failure: Exception) -> str:
        """Say in a few words what came back."""
        if isinstance(failure, self._sdk.APITimeoutError):
            return f"no answer within {self._client.timeout:g} seconds"
        if isinstance(failure, self._sdk.APIConnectionError):
            return f"no connection ({clip(failure.__cause__ or failure)})"
        if isinstance(failure, self._sdk.APIStatusError):
            hint = "" if self._has_key or failure.status_code != 401 else f"; {KEY_VARIABLE} is not set"
            return f"HTTP {failure.status_code} ({clip(failure.message)}){hint}"
        return f"a reply that is no chat completion ({clip(failure)})"


class UnreadableReplyError(Exception):
    """The endpoint sent something that is no chat completion."""


def read_reply(completion: Any) -> str:
    """Take the text out of a completion; an empty one is a reply, too.

    Raises:
        UnreadableReplyError: there is none.
    """
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        raise UnreadableReplyError(completion if isinstance(completion, str) else "it has no choices") from None
    if not isinstance(text, str):
        raise UnreadableReplyError("its message has no text")
    return text


def may_pass(failure: Exception) -> bool:
    """Tell whether the same request may succeed later."""
    status = getattr(failure, "status_code", None)
    if status is None:
        return True
    return (status >= 500 or status in PASSING_STATUSES) and getattr(failure, "code", None) != SPENT_QUOTA


def read_retry_after(failure: Exception) -> float | None:
    """Read how many seconds an endpoint wants to be left alone; it gives seconds or a date."""
    headers = getattr(getattr(failure, "response", None), "headers", {})
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds)


def name_request(case: Case, request: Mapping[str, Any], attempt: int) -> str:
    """Name a request by everything that the reply depends on."""
    whole = json.dumps([case.task, case.key, attempt, request], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def clip(what: object) -> str:
    """Quote on one line, not at length."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."
