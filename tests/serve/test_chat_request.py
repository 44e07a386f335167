"""Whatever JSON is sent becomes a request or a refusal of one line; addresses that are not public are known as such."""

import copy
import json
import random

import pytest

from llava.serve.chat_request import ImageAddress, read_request
from llava.serve.limits import Limits
from llava.serve.refusal import Refusal
from llava.serve.remote_images import is_public

WHOLE = {
    "model": "pocket",
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": "A bus.", "refusal": None, "annotations": []},
        {"role": "user", "content": "And its color?", "name": "me"},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 8,
    "n": 2,
    "seed": 2**64 - 1,
    "stop": ["\n"],
    "logprobs": True,
    "top_logprobs": 3,
    "stream": True,
    "stream_options": {"include_usage": True},
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "user": "somebody",
    "reduce": "TRIM:9",
    "query": "color of the bus",
}
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**70,
    10**300,
    1.5,
    1e308,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    "0",
)
ODD = (*VALUES, [None], {"type": "text"}, {"type": "image_url"}, {"url": 1}, [{"type": "text", "text": None}])


def read(data):
    return read_request(data, "pocket", Limits(), 64)


def list_places(data, path=()):
    """List the paths of all values inside JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from list_places(value, (*path, key))


def change(data, path, value):
    """Return a copy with another value at a path; ... takes it away."""
    changed = copy.deepcopy(data)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return changed


def test_every_field_of_a_request_is_read():
    request = read(WHOLE)
    assert [turn.role for turn in request.turns] == ["system", "user", "assistant", "user"]
    assert request.turns[1].parts == (
        "What is it?",
        ImageAddress("https://example.com/a.png", "messages[1].content[1]"),
    )
    first, second = request.searches
    assert (first.sampling.seed, second.sampling.seed) == (2**64 - 1, 0)
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.max_new_tokens) == (0.5, 0.9, 8)
    assert (first.stop, first.num_logprobs) == (("\n",), 3)
    assert (request.reduce, request.query) == ("TRIM:9", "color of the bus")
    assert request.is_streamed and request.is_usage_streamed


def test_a_field_that_is_null_is_one_that_is_missing():
    optional = set(WHOLE) - {"model", "messages"}
    nulls = read(WHOLE | dict.fromkeys(optional))
    assert nulls == read({name: WHOLE[name] for name in ("model", "messages")})


def test_any_value_in_any_place_is_read_or_refused_in_one_line():
    refused = 0
    for path in list_places(WHOLE):
        for value in (..., *ODD):
            refused += is_refused(change(WHOLE, path, value))
    assert refused > 300


def test_many_wrong_values_at_once_are_read_or_refused_in_one_line():
    chance = random.Random(4711)
    for _ in range(2000):
        data = WHOLE
        for _ in range(chance.randint(1, 4)):
            data = change(data, chance.choice(list(list_places(data))), chance.choice((..., *ODD)))
        is_refused(data)


def is_refused(data):
    """Whether a request is refused; anything but a request or a well-formed refusal fails."""
    try:
        read(json.loads(json.dumps(data)))
    except Refusal as refusal:
        body = json.dumps(refusal.to_json())
        assert refusal.status in (400, 404) and "\\n" not in json.dumps(str(refusal)) and len(body) < 8000
        return True
    return False


IPV4 = "127.0.0.1 127.8.9.10 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 198.18.0.1 192.0.2.1"
MULTICAST = "224.0.0.1 224.0.1.1 239.255.255.255 240.0.0.1 255.255.255.255 ff02::1"
IPV6 = ":: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 fe80::1 fe80::1%lo fc00::1 fd12::1 2001:db8::1"
TUNNELS = "2002:7f00:1:: 2001::1 64:ff9b::7f00:1 64:ff9b:1::a00:1"


@pytest.mark.parametrize("address", f"{IPV4} {MULTICAST} {IPV6} {TUNNELS}".split())
def test_addresses_of_networks_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "::ffff:8.8.8.8", "2606:4700::1111", "2001:4860::8"])
def test_addresses_of_the_public_internet(address):
    assert is_public(address)
