"""Judges: a language model behind an OpenAI-compatible endpoint, and an offline stand-in that compares texts.

`make_judge` chooses by name and environment; benchmarks know only the interface `llava.eval.benchmark.Judge`.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Case, Item, Judge, Result
from llava.eval.endpoint import (
    ADDRESS_VARIABLE,
    KEY_VARIABLE,
    MIN_HIDDEN_IN_REPLIES,
    Endpoint,
    EndpointFault,
    escape_surrogates,
    read_reply,
    read_variables,
)
from llava.files import FileError, append_line, explain_errors, parse_record, read_text

EXACT, API = "exact", "api"

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
    key, address = read_variables()
    if not key and not address:
        raise InputError(
            f"{task.name} needs a language model as judge and there is no endpoint: the answers are ready; set "
            f"{KEY_VARIABLE} (OpenAI) or {ADDRESS_VARIABLE} (any compatible server) and run the same command again, or "
            f"take --judge {EXACT}, an offline stand-in whose numbers are not the benchmark's"
        )
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
    """A language model behind an OpenAI-compatible endpoint; replies are cached as they come, without secrets."""

    offline = False

    def __init__(
        self,
        model: str,
        cache: "ReplyCache",
        *,
        address: str | None = None,
        key: str | None = None,
        num_runs: int = 1,
        num_threads: int = 8,
        **patience: float,
    ):
        """Connect to nothing yet.

        Args:
            model: its name at the endpoint.
            cache: earlier replies, and where new ones go.
            address: of the endpoint; None for OpenAI's.
            key: None for a server that needs none.
            num_runs: how many times each answer is judged.
            num_threads: number of questions under way at the same time.
            **patience: `max_tries`, `first_pause_seconds` and so on of `Endpoint`.
        """
        self.name, self.num_runs = model, num_runs
        self._cache, self._num_threads = cache, num_threads
        self._endpoint = Endpoint(address, key, **patience)

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
        try:
            completion = self._endpoint.complete(request)
        except EndpointFault as fault:
            raise InputError(
                f"judge {self.name} at {self._endpoint.place} {fault} ({case.task}, question {case.key}); the answers "
                f"are ready, {len(self._cache)} replies are kept in {self._cache.path}: the same command goes on from "
                "there"
            ) from None
        reply = self._endpoint.secrets.hide(read_reply(completion), MIN_HIDDEN_IN_REPLIES)
        about = {"task": case.task, "case": case.key, "model": self.name, "attempt": attempt}
        return self._cache.keep(key, reply, **about, temperature=temperature)

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items, several at a time; after a failure nothing more is sent, and replies on their way are kept."""
        return self._endpoint.map(judge_one, items, self._num_threads, f"judge {self.name}")


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
