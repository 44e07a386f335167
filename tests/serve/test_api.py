"""What OpenAI's client gets of the server, over real HTTP, with an engine whose answers are known."""

import asyncio
import base64
import gc
import http.client
import http.server
import io
import json
import re
import socket
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from llava.errors import InputError
from llava.serve.front import Front
from llava.serve.listener import announce, bind
from llava.serve.remote_images import FORMATS
from playground.shapes.world import draw_scene

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def front(pocket):
    """Of the pocket model."""
    return Front(pocket)


@pytest.fixture(scope="module")
def image():
    """An image of shapes."""
    return draw_scene(1, 2, 3)[0]


@pytest.fixture(scope="module")
def url(image):
    """The image as a data URL."""
    return to_url(image)


@pytest.fixture(scope="module")
def served(front, serving, scribe_class):
    """A server with few limits; yields its address and its completions."""
    with serving(front, scribe_class(), body_bytes=2**20, images=3) as (address, completions):
        yield address, completions


@pytest.fixture
def client(served):
    """OpenAI's client, which does not try twice."""
    return connect(served[0])


def connect(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=30)


def to_url(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def show(url):
    return {"type": "image_url", "image_url": {"url": url}}


def ask(client, *parts, **options):
    """Ask with parts that are texts or image parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "pocket", "messages": messages, "max_tokens": 3} | options)


def refusal(client, *parts, **options):
    """Return the error that a question is refused with."""
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, *parts, **options)
    error = caught.value
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in error.response.json()["error"]["message"]
    return error


def post(address, body, headers=(), path="/v1/chat/completions"):
    """Send raw bytes; returns status, headers and parsed body."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request("POST", path, body, dict(headers))
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, dict(response.getheaders()), content


def send(address, **body):
    """Send a request and leave its answer where it is; returns the connection."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "pocket", **body}))
    return connection


def scrape(address):
    """Return Prometheus' values, by name and the values of its labels."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


# ------------------------------------------------------------------------------------------------------------- answers
def test_a_text_is_answered_with_its_usage(client):
    reply = ask(client, "Hello?")
    (choice,) = reply.choices
    assert re.fullmatch(r"\d+ positions 1 2", choice.message.content) and choice.finish_reason == "length"
    assert choice.message.role == "assistant" and reply.object == "chat.completion" and reply.model == "pocket"
    positions = int(choice.message.content.split()[0])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (positions, 3)
    assert reply.usage.total_tokens == positions + 3


def test_usage_counts_the_prompt_after_reduction_and_its_images_before_and_after(client, url, pocket, image):
    answer = pocket.ask(image, QUESTION, max_new_tokens=1)
    text = ask(client, QUESTION).usage.prompt_tokens
    usage = ask(client, show(url), QUESTION).usage
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.image_patches) == (answer.num_tokens, 64)
    assert answer.num_tokens < 64 and usage.prompt_tokens > text + details.image_tokens


def test_each_request_names_its_own_reduction(client, url):
    kept = {}
    for spec in ("none", "TRIM:9", "Pool:16"):
        usage = ask(client, show(url), QUESTION, extra_body={"reduce": spec}).usage
        kept[spec] = usage.prompt_tokens_details.image_tokens
    assert kept == {"none": 64, "TRIM:9": 10, "Pool:16": 16}


@pytest.mark.parametrize("form", FORMATS)
def test_images_of_every_format_that_is_named_are_read(client, image, form):
    assert ask(client, show(to_url(image, form)), QUESTION).usage.prompt_tokens_details.image_patches == 64


def test_a_request_may_name_what_the_text_tower_reads(client, url, pocket, image):
    asked = "Is there a star in the image?\nAnswer the question using a single word or phrase."
    tokens = {
        query: ask(client, show(url), asked, extra_body={"query": query}).usage.prompt_tokens_details.image_tokens
        for query in (None, "Is there a star in the image?", "a red square", "a green triangle")
    }
    assert tokens[None] == pocket.ask(image, asked, max_new_tokens=1).num_tokens and len(set(tokens.values())) > 1


def test_several_images_turns_and_a_system_prompt_are_one_dialogue(client, url):
    turns = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [show(url), {"type": "text", "text": QUESTION}, show(url)]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And the square?"},
    ]
    lengths = []
    for count in (4, 2):
        reply = client.chat.completions.create(model="pocket", messages=turns[:count], max_tokens=1)
        assert reply.usage.prompt_tokens_details.image_patches == 128
        lengths.append(reply.usage.prompt_tokens)
    assert lengths[0] > lengths[1]


def test_an_answer_of_the_client_goes_back_as_the_client_holds_it(client):
    first = ask(client, "Hello?").choices[0].message
    turns = [{"role": "user", "content": "Hello?"}, first.model_dump(), {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(model="pocket", messages=turns, max_tokens=1).choices


def test_streamed_pieces_are_the_answer_and_the_last_event_counts(client, url):
    whole = ask(client, show(url), QUESTION, max_tokens=5)
    events = list(ask(client, show(url), QUESTION, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert len({event.id for event in events}) == 1 and {event.object for event in events} == {"chat.completion.chunk"}
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events[:-1])
    assert text == whole.choices[0].message.content
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * 5 + ["length"]
    assert events[-1].choices == [] and events[-1].usage == whole.usage


def test_a_stream_without_the_wish_says_nothing_of_usage(client):
    assert all(event.usage is None and event.choices for event in ask(client, "Hello?", stream=True))


def test_events_are_sent_as_they_come(front, serving, scribe_class):
    with serving(front, scribe_class(seconds=0.1)) as (address, _):
        start, times = time.monotonic(), []
        for _ in ask(connect(address), "Hello?", max_tokens=10, stream=True):
            times.append(time.monotonic() - start)
    assert times[-1] - times[0] > 0.7  # ten words, a tenth of a second each


def test_several_choices_have_seeds_of_their_own(served, front, serving, scribe_class):
    engine = scribe_class()
    with serving(front, engine) as (address, _):
        reply = ask(connect(address), "Hello?", n=3, seed=7, temperature=0.5)
        streamed = list(ask(connect(address), "Hello?", n=2, stream=True))
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and reply.usage.completion_tokens == 9
    assert sorted(search.sampling.seed for search in engine.searches[:3]) == [7, 8, 9]
    for index in (0, 1):
        text = "".join(event.choices[0].delta.content or "" for event in streamed if event.choices[0].index == index)
        assert text == reply.choices[0].message.content


def test_the_search_is_what_the_request_says(front, serving, scribe_class):
    engine = scribe_class()
    with serving(front, engine, max_new_tokens=5) as (address, _):
        client = connect(address)
        ask(client, "Hello?", temperature=0, top_p=0.5, stop=["\n", "USER"], max_tokens=2)
        ask(client, "Hello?", stop="x", max_tokens=openai.NOT_GIVEN, max_completion_tokens=4)
        ask(client, "Hello?", max_tokens=openai.NOT_GIVEN)
    first, second, third = engine.searches
    assert (first.sampling.temperature, first.sampling.top_p, first.stop) == (0, 0.5, ("\n", "USER"))
    assert (first.sampling.max_new_tokens, first.num_logprobs) == (2, None)
    assert (second.sampling.max_new_tokens, second.stop, second.sampling.temperature) == (4, ("x",), 1)
    assert (third.sampling.max_new_tokens, third.sampling.top_p, third.sampling.seed) == (5, None, None)


def test_probabilities_have_openais_form(client):
    (choice,) = ask(client, "Hello?", logprobs=True, top_logprobs=2, max_tokens=2).choices
    first, second = choice.logprobs.content
    assert (second.token, second.logprob, second.bytes) == (" 1", -0.5, [32, 49])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [(" 0", -1.0), (" 1", -2.0)]
    events = list(ask(client, "Hello?", logprobs=True, max_tokens=2, stream=True))
    tokens = [each.token for event in events if event.choices[0].logprobs for each in event.choices[0].logprobs.content]
    assert tokens == [first.token, second.token]


def test_the_model_is_listed_under_its_name(client, served):
    (model,) = client.models.list().data
    assert model.id == "pocket" and client.models.retrieve("pocket") == model and model.max_model_len == 1000
    with pytest.raises(openai.NotFoundError, match="'other' is not served here: expected 'pocket'"):
        client.models.retrieve("other")


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"temperature": "hot"}, "temperature: expected a number, not a text", "temperature"),
        ({"temperature": 1000}, "temperature 1000: expected 0, or 0.001 to 100", "temperature"),
        ({"top_p": 0}, "top_p 0: expected a number above 0, at most 1", "top_p"),
        ({"max_tokens": 0}, "max_tokens 0: expected 1 to 131072", "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens 1000", "max_tokens"),
        ({"max_tokens": True}, "max_tokens: expected a whole number, not true or false", "max_tokens"),
        ({"max_completion_tokens": 4}, "max_tokens and max_completion_tokens: give one of them", "max_tokens"),
        ({"seed": -1}, "seed -1: expected 0 to", "seed"),
        ({"n": 17}, "n 17: expected 1 to 16", "n"),
        ({"stop": ["a"] * 5}, "stop: expected a text, or a list of at most 4 texts", "stop"),
        ({"stop": [""]}, "stop: an empty text", "stop"),
        ({"top_logprobs": 2}, "top_logprobs: only with logprobs", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs 21: expected 0 to 20", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options: only with stream", "stream_options"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: no value but 0 is served here", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format: no value but {'type'", "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: no value but [] is served", "tools"),
        ({"extra_body": {"max_token": 3}}, "unknown parameter: 'max_token'; did you mean max_tokens?", "max_token"),
        ({"extra_body": {"reduce": "TRIMM:9"}}, "TRIMM", "reduce"),
        ({"extra_body": {"reduce": "FastV:0.5,layer=2"}}, "works inside the language model", "reduce"),
        ({"extra_body": {"reduce": 9}}, "reduce: expected a text, not a number", "reduce"),
        ({"messages": []}, "messages: the list is empty", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role 'tool': expected", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected a text, or a list", "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "there is none of the user", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type 'input_audio': expected text or image_url",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls: not served here",
            "messages[0].tool_calls",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, options, message, param):
    error = refusal(client, "Hello?", **options)
    assert error.status_code == 400 and message in error.message and error.param == param
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("data:image/png;base64,@@@@", "the data URL is not base64"),
        ("data:image/png;base64,iVBORw0KGgo=", "not an image in a known format"),
        ("truncated", "damaged or truncated"),
        ("data:image/png;base64,", "the file is empty"),
        ("data:image/png;base64,SGVsbG8=", "not an image in a known format (PNG, JPEG, WEBP, GIF, BMP)"),
        ("data:text/plain,Hello", "a data URL begins with data:image/png;base64, or another type"),
        ("ftp://example.com/a.png", "expected an address that begins with data:image/, https:// or http://"),
        ("a.png", "expected an address that begins with data:image/, https:// or http://"),
        ("file:///etc/hostname", "file:// is not allowed here"),
        ("http://127.0.0.1/a.png", "the address is not public: this server does not connect to it"),
        ("http://localhost:1/a.png", "the address is not public: this server does not connect to it"),
        ("http://[::ffff:127.0.0.1]/a.png", "the address is not public: this server does not connect to it"),
        ("http://169.254.169.254/latest/meta-data", "the address is not public: this server does not connect to it"),
        ("https://10.0.0.1/a.png", "the address is not public: this server does not connect to it"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused_where_it_is(client, bad, message, url):
    bad = url[: url.index(",") + 1 + len(url) // 8 * 4] if bad == "truncated" else bad
    error = refusal(client, "Look:", show(bad), QUESTION)
    assert error.status_code == 400 and message in error.message and error.code == "invalid_image"
    assert error.param == "messages[0].content[1].image_url.url"


def test_limits_on_images_and_pixels_are_told(client, url):
    error = refusal(client, *[show(url)] * 4, QUESTION)
    assert (error.status_code, error.code) == (400, "too_many_images")
    assert "4 images; a request has 3 at most" in error.message
    large = to_url(Image.new("L", (1001, 1000)))
    assert "1001 x 1000 pixels; at most 1,000,000 are taken" in refusal(client, show(large), QUESTION).message


def test_an_image_belongs_to_the_user(client, url):
    messages = [{"role": "system", "content": [show(url)]}, {"role": "user", "content": "x"}]
    assert "an image is in a message of the user, not of the system" in refusal(client, messages=messages).message


def test_another_model_is_404(client):
    error = refusal(client, "Hello?", model="gpt-4o")
    assert (error.status_code, error.code) == (404, "model_not_found")
    assert "'gpt-4o' is not served here: expected 'pocket'" in error.message


def test_a_body_over_the_limit_is_413(served, client):
    error = refusal(client, "x" * 2**25)
    assert (error.status_code, error.code) == (413, "request_too_large") and "larger than 1 MiB" in error.message
    status, _, content = post(served[0], iter([b"x" * 2**19] * 5))  # in chunks: its length is not told beforehand
    assert (status, content["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[]", "the body: expected a JSON object, not a list"),
        (b"\xff", "the body is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "pocket"}', "messages: expected a list, not nothing"),
        (b'{"model": "pocket", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature nan"),
        (b'{"model": "pocket", "messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_no_request_is_400(served, body, message):
    status, _, content = post(served[0], body)
    assert status == 400 and message in content["error"]["message"]


def test_another_address_is_404_and_another_method_405(served):
    status, _, content = post(served[0], b"{}", path="/v1/completions")
    assert (
        status == 404
        and "POST /v1/completions: Not Found; see POST /v1/chat/completions" in content["error"]["message"]
    )
    assert post(served[0], b"{}", path="/v1/models")[0] == 405


def test_a_prompt_that_is_too_long_is_400(client):
    assert "positions with its image tokens, the model has" in refusal(client, "circle " * 3000).message


# ------------------------------------------------------------------------------------------------ addresses of images
class Images(http.server.BaseHTTPRequestHandler):
    """Serves one image, and a redirect to it."""

    def do_GET(self):
        """Answer by path."""
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args):
        """Stay silent."""


@pytest.fixture
def web(image):
    """The address of a web server with the image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Images)
    httpd.content = buffer.getvalue()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_images_of_private_networks_are_read_where_that_is_allowed(front, serving, scribe_class, web):
    with serving(front, scribe_class(), private=True) as (address, _):
        for page in ("a.png", "moved.png"):
            usage = ask(connect(address), show(f"{web}/{page}"), QUESTION).usage
            assert usage.prompt_tokens_details.image_patches == 64


def test_a_redirect_into_the_own_network_is_refused(client, web, monkeypatch):
    """The first address counts as public, the one behind it does not."""
    from llava.serve import remote_images

    asked = []

    def is_public(address):
        asked.append(address)
        return len(asked) == 1

    monkeypatch.setattr(remote_images, "is_public", is_public)
    error = refusal(client, show(f"{web}/moved.png"), QUESTION)
    assert "the address is not public" in error.message and len(asked) == 2


def test_a_name_is_looked_up_once_and_the_checked_address_is_the_one_connected_to(client, web, monkeypatch):
    from llava.serve import remote_images

    look_up, names, port = socket.getaddrinfo, [], urlsplit(web).port

    def rebind(host, *args, **options):
        if host == "rebound.example":
            names.append(host)
            host = "127.0.0.1" if len(names) == 1 else "127.0.0.2"
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")
    assert ask(client, show(f"http://rebound.example:{port}/a.png"), QUESTION).choices
    assert names == ["rebound.example"]


def test_files_are_read_inside_the_allowed_folder_alone(front, serving, scribe_class, image, tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "outside.png"
    folder.mkdir()
    image.save(folder / "a b.png")
    image.save(outside)
    (folder / "link.png").symlink_to(outside)
    with serving(front, scribe_class(), files=folder) as (address, _):
        client = connect(address)
        assert ask(client, show((folder / "a b.png").as_uri()), QUESTION).choices
        for path in (outside, folder / ".." / "outside.png", folder / "link.png", "/etc/no_such_file", "/etc/a\0b"):
            error = refusal(client, show(f"file://{path}"), QUESTION)
            assert "this file is outside the folder that --allow-files allows" in error.message
        assert "no such file" in refusal(client, show(f"file://{folder}/c.png"), QUESTION).message
        assert "three slashes" in refusal(client, show("file://host/a.png"), QUESTION).message


# ---------------------------------------------------------------------------------------------------- keys and limits
def test_without_a_key_nothing_under_v1_is_answered(front, serving, scribe_class):
    with serving(front, scribe_class(), keys=["one", "two"]) as (address, _):
        for key in ("one", "two"):
            assert ask(connect(address, key), "Hello?").choices
        for key in ("three", "onetwo"):
            error = refusal(connect(address, key), "x" * 2**20)
            assert (error.status_code, error.code) == (401, "invalid_api_key") and key not in error.message
        with pytest.raises(openai.AuthenticationError):
            connect(address, "three").models.list()
        assert post(address, b"{}")[0] == 401
        assert scrape(address)["llava_requests_running"] == 0


def test_too_many_requests_are_429_with_a_time_to_wait(front, serving, scribe_class, waiting):
    engine = scribe_class(seconds=0.05)
    with serving(front, engine, running=1, waiting=1) as (address, completions):
        client, replies = connect(address), []
        threads = [
            threading.Thread(target=lambda: replies.append(ask(client, "Hello?", max_tokens=40))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        waiting(lambda: completions.gate.num_admitted == 2 and engine.num_open == 1)
        assert scrape(address)["llava_requests_waiting"] == 1
        error = refusal(client, "Hello?")
        assert (error.status_code, error.code) == (429, "rate_limit_exceeded")
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        for thread in threads:
            thread.join()
        assert len(replies) == 2 and ask(client, "Hello?").choices


def test_a_client_that_leaves_the_queue_gives_its_place_up(front, serving, scribe_class, waiting):
    engine = scribe_class(seconds=0.05)
    with serving(front, engine, running=1, waiting=1) as (address, completions):
        client = connect(address)
        thread = threading.Thread(target=lambda: ask(client, "Hello?", max_tokens=40))
        thread.start()
        waiting(lambda: engine.num_open == 1)
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), "Hello?")
        waiting(lambda: completions.gate.num_admitted == 1)
        assert ask(client, "Hello?").choices and len(engine.searches) == 2
        thread.join()


def test_a_body_that_does_not_arrive_is_given_up(served, monkeypatch):
    monkeypatch.setattr("llava.serve.app.BODY_SECONDS", 0.3)
    with socket.create_connection(urlsplit(served[0]).netloc.split(":"), timeout=30) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        received = b"".join(iter(lambda: connection.recv(2**16), b"")).decode()  # until it is closed
    assert received.startswith("HTTP/1.1 408") and "did not arrive within 0.3 seconds" in received
    assert served[1].gate.num_admitted == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_with_504(front, serving, scribe_class, waiting, stream):
    engine = scribe_class(seconds=0.05)
    with serving(front, engine, seconds=0.5) as (address, _):
        if stream:
            events = ask(connect(address), "Hello?", max_tokens=60, stream=True)
            with pytest.raises(openai.APIError, match="not answered within"):
                list(events)
        else:
            error = refusal(connect(address), "Hello?", max_tokens=60)
            assert error.status_code == 504 and "not answered within 0.5 seconds" in error.message
            assert error.response.headers["x-should-retry"] == "false"
        waiting(lambda: engine.num_open == 0)
        assert engine.num_closed == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(front, serving, scribe_class, waiting, stream):
    engine = scribe_class(seconds=0.05)
    with serving(front, engine) as (address, completions):
        messages = [{"role": "user", "content": "x"}]
        connection = send(address, messages=messages, max_tokens=10_000, stream=stream)
        waiting(lambda: engine.num_open == 1)
        connection.close()
        waiting(lambda: engine.num_open == 0 and completions.gate.num_admitted == 0)
        assert engine.num_closed == 1 and scrape(address)["llava_requests_total cancelled"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_ends_its_request_alone(front, serving, scribe_class, stream):
    for fault, status in ((InputError("no position is left"), 400), (RuntimeError("secret"), 500)):
        with serving(front, scribe_class(fault=fault)) as (address, _):
            if stream:
                with pytest.raises(openai.APIError) as caught:
                    list(ask(connect(address), "Hello?", stream=True))
            else:
                caught = None
                error = refusal(connect(address), "Hello?")
                assert error.status_code == status
            message = str(caught.value if caught else error)
            assert ("no position is left" if status == 400 else "the server failed") in message
            assert "secret" not in message and ask(connect(address), "Hello?", max_tokens=2).choices


def test_while_an_answer_is_written_the_pixels_of_its_request_are_gone(front, serving, scribe_class, waiting):
    engine, size = scribe_class(seconds=0.05), (777, 555)
    content = [show(to_url(Image.new("RGB", size)))] * 2 + [{"type": "text", "text": QUESTION}]
    with serving(front, engine) as (address, _):
        connection = send(address, messages=[{"role": "user", "content": content}], max_tokens=10_000)
        waiting(lambda: engine.num_open == 1)
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, Image.Image) and each.size == size]
        assert kept == [] and engine.num_open == 1
        connection.close()


def test_metrics_count_requests_tokens_and_stages(front, serving, scribe_class, url):
    with serving(front, scribe_class()) as (address, _):
        before, client = scrape(address), connect(address)
        for _ in range(2):
            ask(client, show(url), "Where is the star?")
        refusal(client, "Hello?", n=0)
        after = scrape(address)
    assert (after["llava_requests_total 200"], after["llava_requests_total 400"]) == (2, 1)
    assert (after["llava_completion_tokens_total"], after["llava_image_patches_total"]) == (6, 128)
    assert 0 < after["llava_image_tokens_total"] < min(128, after["llava_prompt_tokens_total"])
    found = "llava_image_cache_hits_total tokens"
    assert after[found] - before[found] >= 1
    for stage in ("queue", "read", "prepare", "first_token", "answer"):
        assert after[f"llava_stage_seconds_count {stage}"] == 2


def test_the_line_that_says_where_the_server_is_names_an_address_of_either_kind(capsys):
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        with bind(host, 0) as door:
            announce(door, "pocket")
            assert capsys.readouterr().out == f"pocket at http://{shown}:{door.getsockname()[1]}/v1\n"


def test_a_server_that_drains_answers_what_it_has_and_refuses_the_rest(front, serving, scribe_class, waiting):
    engine = scribe_class(seconds=0.05)
    with serving(front, engine) as (address, completions):
        client, replies = connect(address), []
        thread = threading.Thread(target=lambda: replies.append(ask(client, "Hello?", max_tokens=30)))
        thread.start()
        waiting(lambda: engine.num_open == 1)
        completions.gate.is_draining = True
        error = refusal(client, "Hello?")
        assert (error.status_code, error.code) == (503, "draining")
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        thread.join()
        assert replies[0].choices[0].finish_reason == "length"


def test_pieces_of_an_answer_are_sent_at_once():
    """Nagle's algorithm holds a short piece back until the one before is acknowledged, 40 ms later."""
    found = []

    async def take(reader, writer):
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect():
        door = bind("127.0.0.1", 0)
        async with await asyncio.start_server(take, sock=door):
            reader, writer = await asyncio.open_connection(*door.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(connect())
    assert found and all(found)
