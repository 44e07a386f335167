"""A file server of our own, that does what real ones do to long transfers: it cuts, refuses, moves and changes."""

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

FIRST_BYTES = 20_000
PAUSE_SECONDS = 30.0


@dataclass
class Served:
    """One file of the server, and how it behaves.

    Attributes:
        etag: None: by content; "": none, and no date either.
        ranges: whether it can send the rest of a file.
        cuts: lengths after which the next answers' connections end, one for each.
        statuses_after_cut: of the answers after a connection that was cut.
        pause: if any, is waited for in the middle of the file.
        statuses: of the next answers, instead of the file.
        after: what the file becomes after each answer, one for each.
        redirect_headers: if any, the first answer leads elsewhere, with these.
        length: whether the answer says how long it is.
        kind: its Content-Type.
    """

    content: bytes
    etag: str | None = None
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses_after_cut: tuple[int, ...] = ()
    pause: threading.Event | None = None
    statuses: list[int] = field(default_factory=list)
    after: list[bytes] = field(default_factory=list)
    redirect_headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    kind: str = "application/octet-stream"


class Server:
    """The server: `files` by path, and the `Range` of each request (or HEAD) in `asked`."""

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"
        self.files: dict[str, Served] = {}
        self.asked: list[tuple[str, str | None]] = []

    def serve(self, path: str, content: bytes, **behaviour: object) -> str:
        """Serve a file; returns its address."""
        self.files[path] = Served(content, **behaviour)
        return self.address + path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        server: Server = self.server.ours
        server.asked.append((self.path, "HEAD"))
        if self.path not in server.files:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.files[self.path].content)))
        self.end_headers()

    def do_GET(self) -> None:
        server: Server = self.server.ours
        path = self.path.removeprefix("/elsewhere")
        served = server.files.get(path)
        server.asked.append((self.path, self.headers.get("Range")))
        if served is None or served.statuses:
            self.send_error(served.statuses.pop(0) if served else 404)
            return
        if served.redirect_headers and path == self.path:
            self.send_response(302)
            self.send_header("Location", f"/elsewhere{path}")
            self.send_header("Content-Length", "0")
            for name, value in served.redirect_headers.items():
                self.send_header(name, value)
            self.end_headers()
            return
        self.send_file(served)
        if served.after:
            served.content = served.after.pop(0)

    def send_file(self, served: Served) -> None:
        content = served.content
        etag = f'"{hashlib.md5(content).hexdigest()}"' if served.etag is None else served.etag
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and served.ranges and self.headers.get("If-Range", etag) == etag else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if served.length:
            self.send_header("Content-Length", str(len(content) - start))
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Type", served.kind)
        self.end_headers()
        rest = content[start:]
        if served.cuts:
            rest = rest[: served.cuts.pop(0)]
            served.statuses = [*served.statuses_after_cut]
        self.wfile.write(rest[:FIRST_BYTES])
        if served.pause:
            served.pause.wait(PAUSE_SECONDS)
        with contextlib.suppress(OSError):  # the client may have left
            self.wfile.write(rest[FIRST_BYTES:])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server in a thread."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.ours = Server(listening.server_port)
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield listening.ours
        listening.shutdown()
        thread.join()
