"""The server's addresses: `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`.

`Completions` is the way of a request, from its body to the last byte of its answer. It is written for ASGI itself, so
that a client that leaves ends the work for it at once, streamed or not.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava.errors import InputError
from llava.files import parse_json
from llava.serve.chat_reply import Completion, list_models
from llava.serve.chat_request import ChatRequest, ImageAddress, Turn, read_request
from llava.serve.dialogue import Message
from llava.serve.engine import Engine, Piece, Prompt, Search
from llava.serve.limits import Gate, Limits
from llava.serve.metrics import CANCELLED, Metrics
from llava.serve.refusal import Refusal
from llava.serve.remote_images import ImageReader

if TYPE_CHECKING:
    from llava.serve.front import Front

BODY_SECONDS = 60.0
"""How long the body of a request may take to arrive; meanwhile it counts as one that waits."""
logger = logging.getLogger("uvicorn.error")


class Completions:
    """POST /v1/chat/completions.

    Attributes:
        gate: counts the requests in the house; `gate.drain()` closes it.
        metrics: what was counted.
    """

    def __init__(
        self,
        front: "Front",
        engine: Engine,
        model: str,
        *,
        limits: Limits,
        reader: ImageReader,
        max_new_tokens: int,
    ):
        """Take what a request passes through.

        Args:
            front: from messages to a prompt.
            engine: from a prompt to an answer; started.
            model: name of the model.
            limits: of the server.
            reader: of images.
            max_new_tokens: length limit of an answer where the request has none.
        """
        self.model = model
        self.gate = Gate(limits)
        self.metrics = _make_metrics(front, engine, self.gate)
        self._front = front
        self._engine = engine
        self._limits = limits
        self._reader = reader
        self._max_new_tokens = max_new_tokens
        # A slow address holds the thread of its own request alone.
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="image")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        outcome = CANCELLED
        try:
            with self.gate.admit():
                if await self._serve(receive, reply):
                    outcome = "200"
        except InputError as error:
            refusal = error if isinstance(error, Refusal) else Refusal(str(error))
            outcome = str(refusal.status)
            await reply.refuse(refusal)
        except Exception:
            logger.exception("a chat completion failed")
            outcome = "500"
            await reply.refuse(Refusal("the server failed; its log says where", status=500, code="internal_error"))
        finally:
            self.metrics.requests.labels(outcome).inc()

    async def _serve(self, receive: Receive, reply: "_Reply") -> bool:
        """Answer one request; False if its client left.

        Raises:
            InputError: it is not answered.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.seconds
        # 1. The text of the request: what can be refused is refused before anything is worked on.
        request = await self._read_request(receive)
        if request is None:
            return False
        # 2. The answer, beside it a watch on the client: whichever ends first ends the other.
        answering = asyncio.create_task(self._answer(request, reply))
        leaving = asyncio.create_task(_wait_until_gone(receive))
        del request  # its images are megabytes, which only the first part of the answer needs
        try:
            await asyncio.wait(
                (answering, leaving), timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
            if answering.done():
                await answering
                return True
            if leaving.done():
                return False
            raise Refusal(
                f"not answered within {self._limits.seconds:g} seconds: ask for fewer tokens (max_tokens)",
                status=504, code="timeout", headers={"x-should-retry": "false"},
            )  # fmt: skip
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _read_request(self, receive: Receive) -> ChatRequest | None:
        """Read a request and check it; None if its client left."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read_body(receive, self._limits.body_bytes)
        except TimeoutError:
            raise Refusal(
                f"the body of the request did not arrive within {BODY_SECONDS:g} seconds",
                status=408, code="timeout", headers={"Connection": "close"},
            ) from None  # fmt: skip
        if body is None:
            return None
        request = read_request(parse_json(body, "the body"), self.model, self._limits, self._max_new_tokens)
        if request.reduce is not None:
            try:  # in a thread: the first reduction of its kind reads weights
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._threads, self._front.check_reduce, request.reduce)
            except InputError as error:
                raise Refusal(str(error), "reduce", code="unsupported_value") from None
        return request

    async def _answer(self, request: ChatRequest, reply: "_Reply") -> None:
        """Answer: images, prompt, language model, each timed."""
        arrival = time.perf_counter()
        async with self.gate.take_place():
            self.metrics.observe("queue", time.perf_counter() - arrival)
            prompt = await self._prepare(request)
            request = replace(request, turns=())
            has_logprobs = request.searches[0].num_logprobs is not None
            completion = Completion(self.model, prompt, len(request.searches), has_logprobs)
            with self.metrics.time("answer"):
                await self._write(request, prompt, completion, reply)
        if not request.is_streamed:
            await reply.send_json(200, completion.to_json())
            return
        if request.is_usage_streamed:
            await reply.send_event(completion.last_chunk())
        await reply.end_events()

    async def _prepare(self, request: ChatRequest) -> Prompt:
        with self.metrics.time("read"):
            messages = await asyncio.gather(*map(self._read_turn, request.turns))
        with self.metrics.time("prepare"):
            prompt = await self._front.prepare(messages, request.reduce, query=request.query)
        self.metrics.prompt_tokens.inc(prompt.num_tokens)
        self.metrics.image_tokens.inc(sum(image.num_tokens for image in prompt.images))
        self.metrics.image_patches.inc(sum(image.num_patches for image in prompt.images))
        return prompt

    async def _read_turn(self, turn: Turn) -> Message:
        loop = asyncio.get_running_loop()

        async def read(part: str | ImageAddress) -> Any:
            if isinstance(part, str):
                return part
            try:
                return await loop.run_in_executor(self._threads, self._reader.read, part.url, part.name)
            except InputError as error:
                raise Refusal(str(error), f"{part.name}.image_url.url", code="invalid_image") from None

        return Message(turn.role, tuple(await asyncio.gather(*map(read, turn.parts))))

    async def _write(self, request: ChatRequest, prompt: Prompt, completion: Completion, reply: "_Reply") -> None:
        """Collect the answers to a prompt, and send the pieces as they come if they are to be streamed."""
        start = time.perf_counter()

        async def take(index: int, piece: Piece) -> None:
            is_first = not completion.choices[index].pieces
            completion.add(index, piece)
            self.metrics.written_tokens.inc(len(piece.token_ids))
            if is_first:
                self.metrics.observe("first_token", time.perf_counter() - start)
            if request.is_streamed:
                if is_first:
                    await reply.send_event(completion.first_chunk(index))
                await reply.send_event(completion.chunk(index, piece))

        async def follow(index: int, search: Search) -> None:
            async with aclosing(self._engine.answer(prompt, search)) as pieces:
                async for piece in pieces:
                    await take(index, piece)
            if completion.choices[index].finish_reason is None:
                raise Refusal("the server ended before the answer did", status=503, code="draining")

        try:
            async with asyncio.TaskGroup() as group:
                for index, search in enumerate(request.searches):
                    group.create_task(follow(index, search))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


def _make_metrics(front: "Front", engine: Engine, gate: Gate) -> Metrics:
    gauges = {
        "llava_requests_waiting": ("Requests that wait for a place.", lambda: gate.num_waiting),
        "llava_requests_running": ("Requests that are worked on.", lambda: gate.num_running),
        "llava_engine_waiting": ("Answers that wait inside the engine.", engine.count_waiting),
    }
    return Metrics(gauges, front.stats)


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """Read the body of a request; None if the client left.

    Raises:
        Refusal: it is larger than the limit.
    """
    parts, size, has_more = [], 0, True
    while has_more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Refusal(
                f"the body of the request is larger than {limit / 2**20:g} MiB: send smaller images or addresses",
                status=413, code="request_too_large",
            )  # fmt: skip
        has_more = event.get("more_body", False)
    return b"".join(parts)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Reply:
    """The response to one request: one JSON document, or events of a stream."""

    def __init__(self, send: Send):
        self._send = send
        self._is_begun = False

    async def send_json(self, status: int, data: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        await self._begin(
            status, {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        )
        await self._send({"type": "http.response.body", "body": body})

    async def send_event(self, data: Any) -> None:
        if not self._is_begun:
            # Proxies pass events on at once.
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", **headers})
        await self._send_body(f"data: {json.dumps(data)}\n\n", has_more=True)

    async def end_events(self) -> None:
        await self._send_body("data: [DONE]\n\n", has_more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """Send a refusal: as the response, or where a stream has begun as its last event."""
        if not self._is_begun:
            await self.send_json(refusal.status, refusal.to_json(), refusal.headers)
            return
        await self._send_body(f"data: {json.dumps(refusal.to_json())}\n\n", has_more=False)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self._is_begun = True
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _send_body(self, text: str, has_more: bool) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": has_more})


# ---------------------------------------------------------------------------------------------------------- application
def make_app(completions: Completions, keys: Sequence[str] = (), **details: Any) -> ASGIApp:
    """Put the addresses together.

    Args:
        completions: answers requests.
        keys: API keys, one of which every request to `/v1` has to have; none: everybody is answered.
        details: what `/v1/models` tells of the model besides its name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    models = list_models([completions.model], int(time.time()), **details)
    app.router.routes.append(Route("/v1/chat/completions", completions, methods=["POST"]))

    @app.get("/v1/models")
    async def list_all() -> dict[str, Any]:
        return models

    @app.get("/v1/models/{name:path}")
    async def describe(name: str) -> dict[str, Any]:
        for model in models["data"]:
            if model["id"] == name:
                return model
        raise Refusal(
            f"the model {name[:200]!r} is not served here: expected {completions.model!r}", "model",
            status=404, code="model_not_found",
        )  # fmt: skip

    @app.get("/health")
    async def tell_health() -> Response:
        is_draining = completions.gate.is_draining
        return JSONResponse({"status": "draining" if is_draining else "ok"}, 503 if is_draining else 200)

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(completions.metrics.to_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.to_json(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(
            f"{request.method} {request.url.path}: {error.detail}; see POST /v1/chat/completions and GET /v1/models",
            status=error.status_code, headers=error.headers,
        )  # fmt: skip
        return JSONResponse(refusal.to_json(), refusal.status, refusal.headers)

    return _KeyCheck(app, keys) if keys else app


class _KeyCheck:
    """Refuses requests to `/v1` without one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._has_key(dict(scope["headers"])):
            refusal = Refusal(
                "the API key is missing or not one of this server's: send Authorization: Bearer KEY",
                status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            await _Reply(send).refuse(refusal)
            return
        await self._app(scope, receive, send)

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        """Compare in a time that does not depend on where a wrong key differs, nor on which one fits."""
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        found = sha256(key.strip()).digest()
        fits = [hmac.compare_digest(found, each) for each in self._hashes]
        return kind.lower() == b"bearer" and any(fits)
