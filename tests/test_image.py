"""Images of every kind are read as RGB or refused in one line. All files here are really written and read."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import llava.image
from llava.errors import InputError
from llava.image import Trust, load_image, scale_window, to_rgb

ROOT = Path(__file__).parents[1]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def noise():
    """An image whose files are long enough to be cut."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def refusal(source):
    """Return the one line that `load_image` refuses a source with."""
    with pytest.raises(InputError) as caught:
        load_image(source)
    line = str(caught.value)
    assert str(source) in line and "\n" not in line
    return line


def test_rgb_pixels_arrive_unchanged(tmp_path, noise):
    noise.save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"))
    assert image.mode == "RGB" and image.tobytes() == noise.tobytes()


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("RGB", (32, 32), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((16, 16))
    assert red > 230 and green < 25 and blue < 25


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_image(tmp_path / name))
        assert pixels[0, :, 0].tolist() == [0, 1, 4, 128, 255]
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def test_grey_of_another_depth_in_a_pgm_file_is_scaled_to_its_white(tmp_path):
    (tmp_path / "ten_bit.pgm").write_bytes(b"P5 2 1 1023\n" + b"\0\0" + (1023).to_bytes(2, "big"))
    assert Image.open(tmp_path / "ten_bit.pgm").mode == "I"
    for upright in (False, True):
        assert np.asarray(load_image(tmp_path / "ten_bit.pgm", upright))[0, :, 0].tolist() == [0, 255]


def test_sixteen_bit_grey_in_memory_is_scaled_and_thirty_two_bit_grey_is_refused():
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 128, 255]
    for image in (Image.new("L", (2, 2), 200).convert("I"), Image.fromarray(grey).convert("I")):
        with pytest.raises(InputError, match=r'mode "I"\) have no known scale; make it 8 bit \(mode "L"\)'):
            to_rgb(image)


def test_integers_of_thirty_two_bit_and_floats_are_refused(tmp_path):
    for largest in (255, 70000):
        Image.fromarray(np.array([[0, largest]], dtype=np.int32)).save(tmp_path / "wide.tif")
        assert "no known scale" in refusal(tmp_path / "wide.tif")
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert "floating-point" in refusal(tmp_path / "float.tif")


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_gives_the_palette_colours(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    for number, transparency in enumerate((0, b"\x00\x80")):
        path = tmp_path / f"{number}.png"
        palette.save(path, transparency=transparency)
        image = load_image(path)
        assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [RED, BLUE]


def test_bilevel_images_are_read(tmp_path):
    Image.new("1", (3, 2), 1).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((2, 1)) == (255, 255, 255)


def test_alpha_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (2, 2), (77, 0)).save(tmp_path / "la.png")
    assert load_image(tmp_path / "rgba.png").getpixel((0, 0)) == (10, 20, 30)
    assert load_image(tmp_path / "la.png").getpixel((0, 0)) == (77, 77, 77)


def test_exif_orientation_is_applied_only_when_asked(tmp_path):
    image = Image.new("RGB", (64, 32), RED)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (64, 32)
    assert load_image(tmp_path / "a.jpg", upright=True).size == (32, 64)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files_are_refused(tmp_path, noise, suffix):
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged or truncated" in refusal(path) or "not an image" in refusal(path)


def test_random_damage_is_either_read_or_refused(tmp_path, noise):
    generator = np.random.default_rng(1)
    outcomes = set()
    for suffix in ("jpg", "png", "gif", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        original = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(60):
            damaged = original.copy()
            damaged[generator.integers(0, len(damaged), 5)] = generator.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            try:
                outcomes.add(load_image(path).mode)
            except InputError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("I am a text")
    (tmp_path / "empty.png").touch()
    assert "not an image" in refusal(tmp_path / "text.png")
    assert "empty" in refusal(tmp_path / "empty.png")
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "folder" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"cannot read 'a\\x00b.png': the name holds a null byte"):
        load_image("a\0b.png")


@pytest.mark.parametrize(
    ("address", "scheme"),
    [
        ("ftp://a.example/b.png", "ftp://"),
        ("FILE:///b.png", "FILE://"),
        ("data:image/png;base64,iVB" + "x" * 10**6, "data:"),
    ],
)
def test_an_address_that_is_not_of_the_web_is_refused_by_its_scheme(address, scheme):
    with pytest.raises(InputError) as caught:
        load_image(address)
    line = str(caught.value)
    assert f": {scheme} is not read; give the path of a file or an http(s) address" in line and len(line) < 200


def test_an_empty_path_is_no_folder():
    assert refusal("") == "the path of an image is empty: give a file or an http(s) address"


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    assert "a pipe, not a regular file" in refusal(tmp_path / "pipe.png")
    assert "a pipe, not a regular file" in refusal(tmp_path / "link.png")
    for device in ("/dev/zero", "/dev/full", "/dev/null"):
        assert "a device, not a regular file" in refusal(device)


def test_a_file_of_terabytes_is_refused_at_once(tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    assert "larger than 2 GiB" in refusal(tmp_path / "sparse.png")


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "/".join(["folder"] * 1000), "half \ud83d.png", "a\0b.png"])
def test_an_impossible_name_is_one_line(tmp_path, name):
    with pytest.raises(InputError) as caught:
        load_image(f"{tmp_path}/{name}")
    assert str(caught.value).startswith("cannot read ") and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    Image.new("1", (3, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(tmp_path / "a.png") == f"cannot read {tmp_path}/a.png: Permission denied"


def test_decompression_bombs_are_refused_and_large_images_are_not(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    assert load_image(tmp_path / "a.png").size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "8,000 pixels" in refusal(tmp_path / "a.png")


ENDLESS_SECONDS = 60  # longer than any machine takes to give up after the 0.4 seconds that it is allowed


RAW = {
    "/missing.png": b"HTTP/1.0 404 Not Found\r\n\r\n",
    "/moved.png": b"HTTP/1.0 302 Found\r\nLocation: /ok.png\r\n\r\n",
    "/away.png": b"HTTP/1.0 302 Found\r\nLocation: ftp://127.0.0.1:9/ok.png\r\n\r\n",
    "/rude.png": b"HTTP/1.1 500 \x1b[31m sk-KEY\r\n\r\n",
    "/not_http.png": b"\x1b[31m sk-KEY\r\n\r\n",
    "/circle.png": b"HTTP/1.0 302 sk-KEY\r\nLocation: /circle.png?sk-KEY\r\n\r\n",
    "/astray.png": b"HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname?sk-KEY\r\n\r\n",
}
# What is sent first, and then again and again.
ENDLESS = {
    "/headers.png": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "/many_headers.png": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "/status.png": (b"HTTP", b"x"),
    "/chunks.png": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "/body.png": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "/redirect.png": (b"HTTP/1.1 302 Found\r\nLocation: /ok.png\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "/error.png": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 99999\r\n\r\n", b"x"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves an image, and every way in which a server can fail."""

    def __init__(self, image, *args):
        """Keep the image's bytes."""
        self.image = image
        super().__init__(*args)

    def do_GET(self):
        """Answer by path."""
        page = self.path.partition("?")[0]
        if page == "/slow.png":
            time.sleep(ENDLESS_SECONDS)
        if page in RAW:
            self.wfile.write(RAW[page])
            return
        if page in ENDLESS:
            self.wfile.write(ENDLESS[page][0])
            for _ in range(10 * ENDLESS_SECONDS):
                self.wfile.write(ENDLESS[page][1])
                self.wfile.flush()
                time.sleep(0.1)
            return
        if page == "/slowly_moved":
            time.sleep(0.3)
            self.wfile.write(b"HTTP/1.0 302 Found\r\nLocation: /slowly_moved?again\r\n\r\n")
            return
        body = {"/empty.png": b"", "/page.html": b"<html>"}.get(page, self.image)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) * (2 if page == "/short.png" else 1)))
        self.end_headers()
        if page == "/trickle.png":
            for start in range(len(body)):
                self.wfile.write(body[start : start + 1])
                self.wfile.flush()
                time.sleep(ENDLESS_SECONDS / len(body))
            return
        self.wfile.write(body)

    def log_message(self, *args):
        """Stay silent."""


@pytest.fixture
def server(noise):
    """The address of a local server."""
    buffer = BytesIO()
    noise.save(buffer, format="PNG")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, buffer.getvalue()))
    httpd.handle_error = lambda *args: None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("page", ["ok.png", "moved.png"])
def test_images_are_read_from_addresses(server, noise, page):
    assert load_image(f"{server}/{page}").tobytes() == noise.tobytes()


@pytest.mark.parametrize("page", ["ok.png", "moved.png"])
def test_every_connection_of_a_download_is_the_callers_to_make_or_refuse(server, noise, page, monkeypatch):
    """Without one of the environment's proxies, which would look up names by itself."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    made, address = [], f"{server}/{page}"

    def connect(place, *args):
        made.append(place)
        if len(made) > 1 + page.startswith("moved"):
            raise OSError("refused here")
        return socket.create_connection(place, *args)

    assert load_image(address, trust=Trust(connect=connect)).tobytes() == noise.tobytes()
    assert made == [("127.0.0.1", int(server.rpartition(":")[2]))] * (1 + page.startswith("moved"))
    with pytest.raises(InputError, match=r"download failed \(refused here\)"):
        load_image(address, trust=Trust(connect=connect))


def test_a_redirect_leads_to_a_web_address_alone(server):
    assert "302, redirected too often or to no web address" in refusal(f"{server}/away.png")


def test_strangers_images_are_limited_by_pixels_and_by_format(noise, tmp_path):
    path = tmp_path / "noise.tiff"
    noise.save(path)
    assert load_image(path, trust=Trust(48 * 64, ("PNG", "TIFF"))).size == (64, 48)
    with pytest.raises(InputError, match=r"noise\.tiff: 64 x 48 pixels; at most 3,071 are taken"):
        load_image(path, trust=Trust(48 * 64 - 1))
    with pytest.raises(InputError, match=r"noise\.tiff: not an image in a known format \(PNG, JPEG\)"):
        load_image(path, trust=Trust(formats=("PNG", "JPEG")))


@pytest.mark.parametrize(
    ("page", "reason"),
    [("missing.png", "404"), ("empty.png", "empty"), ("page.html", "not an image"), ("short.png", "ended after")],
)
def test_failed_downloads_are_refused(server, page, reason):
    assert reason in refusal(f"{server}/{page}")


@pytest.mark.parametrize(
    "page",
    [
        "slow.png",
        "trickle.png",
        "slowly_moved",
        "headers.png",
        "many_headers.png",
        "status.png",
        "chunks.png",
        "body.png",
    ],
)
def test_a_download_ends_after_its_time_and_leaves_no_thread(server, page, monkeypatch):
    monkeypatch.setattr(llava.image, "DOWNLOAD_SECONDS", 1.0)
    before = set(threading.enumerate())
    begin = time.monotonic()
    line = refusal(f"{server}/{page}")
    assert "timed out" in line or "(the answer is not HTTP" in line
    assert time.monotonic() - begin < ENDLESS_SECONDS / 2
    for thread in set(threading.enumerate()) - before:
        if "_Download" in repr(getattr(thread, "_target", None)):
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_the_limit_of_time_covers_the_name_server(monkeypatch):
    monkeypatch.setattr(llava.image, "DOWNLOAD_SECONDS", 0.4)

    def look_up(*args, **options):
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begin = time.monotonic()
    assert "timed out" in refusal("http://slow.example/a.png")
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize("page", ["redirect.png", "error.png"])
def test_content_of_redirects_and_errors_is_not_waited_for(server, page):
    begin = time.monotonic()
    if page == "redirect.png":
        assert load_image(f"{server}/{page}").size == (64, 48)
    else:
        assert "(404 Not Found)" in refusal(f"{server}/{page}")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("rude.png", "(500 Internal Server Error)"),
        ("not_http.png", "(the answer is not HTTP: BadStatusLine)"),
        ("circle.png", "(302, redirected too often or to no web address)"),
        ("astray.png", "(302, redirected too often or to no web address)"),
    ],
)
def test_nothing_of_what_a_server_says_is_repeated(server, page, reason):
    line = refusal(f"{server}/{page}")
    assert reason in line and "KEY" not in line and line.isprintable()


@pytest.mark.parametrize(
    "address",
    [
        "{server}/missing.png?api_key=KEY",
        "{server}/page.html?api_key=KEY",
        "{server}/short.png?KEY#KEY",
        "{server}/missing.png#KEY",
        "http://127.0.0.1:9?KEY",
        "http://user:KEY@127.0.0.1:9/a.png",
        "https://KEY@127.0.0.1:9/a.png",
        "http://user:KE?Y@127.0.0.1:9/a.png",
        "http://user:KEY/x@127.0.0.1:9/a.png",
        "http://user:@KEY@127.0.0.1:9/a.png",
        "http://127.0.0.1:9/a b.png?KEY",
        "http://127.0.0.1:KEY/a.png",
        "HTTP://127.0.0.1:9/a.png?KEY\nKEY",
        "http://[::1/a.png?KEY",
        "http://é.example:9/é.png?KEY",
    ],
)
def test_credentials_in_an_address_are_not_printed(server, address):
    with pytest.raises(InputError) as caught:
        load_image(address.format(server=server))
    line = str(caught.value)
    assert "KE" not in line and "\n" not in line and line.lower().startswith("image http")


def test_ctrl_c_ends_a_download_at_once(server):
    code = f"import llava.image; print('ready', flush=True); llava.image.load_image('{server}/headers.png')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) != 0


def test_a_download_ends_at_its_size(server, monkeypatch):
    monkeypatch.setattr(llava.image, "DOWNLOAD_BYTES", 2000)
    assert "larger than" in refusal(f"{server}/ok.png")


def test_addresses_that_nobody_answers_are_refused(server):
    assert "download failed" in refusal("http://127.0.0.1:9/a.png")
    assert "download failed" in refusal("http://[half/a.png")
    assert "download failed" in refusal("http://a b/c.png")


def test_a_side_that_no_image_has_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (1, llava.image.MAX_SIDE + 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert "1 x 262145 pixels; a side has 262,144 at most" in refusal(tmp_path / "a.png")


def test_an_image_without_memory_for_it_is_refused(tmp_path, monkeypatch):
    Image.new("1", (3, 3)).save(tmp_path / "a.png")

    def fail(image):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    assert "does not fit into memory" in refusal(tmp_path / "a.png")


def test_scaled_windows_are_those_of_pillow():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (50, 300, 3), dtype=np.uint8))
    for size in [(40, 6), (40, 30), (700, 60), (300, 50), (1, 1)]:
        whole = image.resize((size[0], 50)).resize(size)  # rows first
        window = (size[0] // 4, size[1] // 3, size[0], size[1])
        assert scale_window(image, size, window).tobytes() == whole.crop(window).tobytes()


def test_a_window_beside_the_image_has_the_canvas_colour():
    image = Image.new("RGB", (4, 4), RED)
    corner = scale_window(image, (40, 40), (0, 0, 3, 3), canvas=(400, 400), color=BLUE)
    assert corner.getcolors() == [(9, BLUE)]
    strip = scale_window(image, (40, 40), (0, 0, 3, 40), canvas=(400, 400), color=BLUE)
    assert strip.getcolors() == [(120, BLUE)]
