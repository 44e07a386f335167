"""The page asks a server as any client does, names the reduction, and says what goes wrong in one line."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import pytest
from PIL import Image

from llava.errors import InputError
from llava.serve.samples import list_samples

pytest.importorskip("openai")
from llava.serve.page_endpoint import NO_PICTURES, Endpoint

USAGE = {
    "prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43,
    "prompt_tokens_details": {"image_tokens": 9, "image_patches": 64},
}  # fmt: skip
REFUSAL = {"error": {"message": "reduce: unknown\ntoken reducer", "type": "invalid_request_error", "code": None}}


class Handler(BaseHTTPRequestHandler):
    """Answers in OpenAI's form; `server.status` other than 200 refuses."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        self.server.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.status != 200:
            self._reply(self.server.status, REFUSAL)
            return
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in ("a ", "blue", " square")]
        usage = [{"choices": [], "usage": self.server.usage}] if self.server.usage else []
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        lines = [f"data: {json.dumps(head | chunk)}\n\n" for chunk in [*chunks, *usage]]
        self._send(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def _reply(self, status: int, content: dict) -> None:
        self._send(status, "application/json", json.dumps(content))

    def _send(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models, server.seen, server.status, server.usage = ["llava-shapes"], [], 200, USAGE
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("end", ["", "/", "/v1"])
def test_a_question_goes_out_with_image_and_reduction_and_its_answer_grows(server, end):
    endpoint = Endpoint(address(server) + end, max_new_tokens=7)
    assert endpoint.title == f"llava-shapes, served at {address(server)}/v1"
    assert endpoint.num_patches == 576 and endpoint.methods["TRIM"] and "FastV" not in endpoint.methods
    image = list_samples()[0].image
    *texts, result = endpoint.ask(image, "What is it?", "TRIM:8")
    assert texts == ["a ", "a blue", "a blue square"]
    assert (result.text, result.tokens, result.num_tokens, result.num_patches) == ("a blue square", "9", 9, 64)
    assert (result.new_tokens, result.pictures, result.note) == (3, (), NO_PICTURES)
    assert endpoint.num_patches == 64
    (sent,) = server.seen
    assert (sent["model"], sent["reduce"], sent["temperature"], sent["max_tokens"]) == ("llava-shapes", "TRIM:8", 0, 7)
    (message,) = sent["messages"]
    picture, text = message["content"]
    assert text == {"type": "text", "text": "What is it?"}
    content = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(BytesIO(content)).tobytes() == Image.open(image).tobytes()


def test_a_server_of_others_may_say_nothing_of_tokens(server):
    server.usage = None
    *_, result = Endpoint(address(server)).ask(list_samples()[0].image, "What is it?", "none")
    assert (result.tokens, result.num_tokens, result.num_patches, result.new_tokens) == ("", None, None, None)


def test_what_the_server_refuses_is_told_in_one_line(server):
    endpoint, image = Endpoint(address(server)), list_samples()[0].image
    for status, words in ((400, "reduce: unknown token reducer"), (401, "set OPENAI_API_KEY"), (503, "reduce:")):
        server.status = status
        with pytest.raises(InputError, match=words) as error:
            list(endpoint.ask(image, "What is it?", "TRIM:8"))
        assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_question_is_told_before_it_is_sent(server):
    endpoint, image = Endpoint(address(server)), list_samples()[0].image
    for question, spec, words in (("", "none", "the question is empty"), ("?", "TRIMM", "unknown token reducer")):
        with pytest.raises(InputError, match=words):
            endpoint.ask(image, question, spec)
    assert server.seen == []


def test_no_server_no_model_and_no_address_are_told_in_one_line(server):
    with pytest.raises(InputError, match="expected an address such as http://"):
        Endpoint("localhost:8000")
    server.models = []
    with pytest.raises(InputError, match="serves no model"):
        Endpoint(address(server))
    with pytest.raises(InputError, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        Endpoint("http://127.0.0.1:9")
