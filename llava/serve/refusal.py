"""What the server answers in place of a completion: an HTTP status and OpenAI's JSON form of an error."""

from collections.abc import Mapping
from typing import Any

from llava.errors import InputError, one_line

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout"}
"""OpenAI's `type` by status; "invalid_request_error" for all others."""


class Refusal(InputError):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        param: the field of the request that is wrong, such as `messages[0].content[1].image_url.url`.
        code: one word for programs, such as "model_not_found".
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(one_line(message))
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
