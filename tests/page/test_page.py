"""The page in a real Chromium, as a person uses it: `bash scripts/test_page.sh FOLDER`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.serve.page_model import Result, stream
from llava.serve.samples import list_samples
from playground.shapes.world import draw_scene

pytest.importorskip("gradio", reason="bash scripts/test_page.sh FOLDER has it")
sync_api = pytest.importorskip("playwright.sync_api", reason="bash scripts/test_page.sh FOLDER has it")
if not os.environ.get("CHROMIUM"):
    pytest.skip("CHROMIUM names no browser: bash scripts/test_page.sh FOLDER finds one", allow_module_level=True)
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
COLORS = 192
SHOTS = os.environ.get("PAGE_SCREENSHOTS")
"""A folder for screenshots; they are looked at by a person, and two are kept in docs/figures."""


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The command's page, on the pocket model; uploads are gone with it, and a proxy of the system is no obstacle."""
    port = find_port()
    folder = tmp_path_factory.mktemp("temporary")
    settings = os.environ | {
        "TMPDIR": str(folder),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "llava.serve.demo", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        yield line.removeprefix("page at ").split()[0]
        assert list(folder.glob("llava-page-*/*/*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert not list(folder.glob("llava-page-*"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium) -> Iterator[object]:
    """Opens a page; whatever it does, its console shows no error and it asks no other host for anything."""
    faults, hosts, tabs = [], set(), []

    def open_page(address: str, **options: object) -> SimpleNamespace:
        tab = chromium.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
        tab.goto(address)
        tab.locator("#answers").wait_for(state="attached", timeout=60000)
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert faults == []
    assert len(hosts) == 1 and hosts.pop().startswith("127.0.0.1:")


def see(tab, name: str, **options: object) -> None:
    """Keep a screenshot, in few colors so that it is small, where a folder is given for them."""
    if SHOTS:
        tab.evaluate("scrollTo(0, 0)")
        shot = Image.open(BytesIO(tab.screenshot(**options))).convert("RGB")
        shot.quantize(COLORS, dither=Image.Dither.NONE).save(Path(SHOTS) / f"{name}.png", optimize=True)


def expect(tab, selector: str, words: str) -> str:
    """Wait until an element shows words; returns all that it shows."""
    place = tab.locator(selector)
    sync_api.expect(place).to_contain_text(words, timeout=30000)
    return place.inner_text()


def wait_for_a_new_map(tab, before: str = "") -> str:
    """Wait until the picture of the kept patches is another one; returns it, as its address."""
    picture = tab.locator("#pictures figure.map img").first
    sync_api.expect(picture).not_to_have_attribute("src", before, timeout=30000)
    return picture.get_attribute("src")


def choose_method(tab, name: str) -> None:
    tab.click("#method input")
    tab.get_by_role("option", name=name, exact=True).click()


def drag(tab, share: float) -> None:
    """Drag the budget's slider to a share of its range."""
    slider = tab.locator("#budget input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    start = float(slider.input_value()) / float(slider.get_attribute("max"))
    tab.mouse.move(box["x"] + start * box["width"], middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + share * box["width"], middle, steps=4)
    tab.mouse.up()


# --------------------------------------------------------------------------------------------------------- the command
def test_the_page_opens_with_an_answer_its_patches_and_their_scores(address, visit):
    tab = visit(address)
    assert "circle" in expect(tab, "#answers", "16 of 64")
    expect(tab, "#pictures", "15 of 64 patches kept")
    expect(tab, "#pictures", "(red line)")
    assert tab.locator("#pictures img").count() == 2
    sizes = [tab.locator("#pictures img").nth(number).bounding_box() for number in (0, 1)]
    assert abs(sizes[0]["height"] - sizes[1]["height"]) < 3 and min(size["width"] for size in sizes) > 250
    see(tab, "page")


def test_another_question_method_and_budget_move_the_kept_patches(address, visit):
    tab = visit(address)
    shown = wait_for_a_new_map(tab)
    tab.locator("#questions button").nth(1).click()
    shown = wait_for_a_new_map(tab, shown)
    expect(tab, "#answers", "triangle")
    drag(tab, 0.5)
    shown = wait_for_a_new_map(tab, shown)
    expect(tab, "#answers h3", "TRIM:3")
    assert not tab.locator("#automatic input").is_checked()
    choose_method(tab, "FasterVLM")
    shown = wait_for_a_new_map(tab, shown)
    expect(tab, "#answers h3", "FasterVLM:3")
    expect(tab, "#pictures", "CLS attention")
    assert not tab.locator("#automatic").is_visible()
    choose_method(tab, "FastV")
    shown = wait_for_a_new_map(tab, shown)
    expect(tab, "#pictures", "layers 2 to 5")
    choose_method(tab, "TRIM")
    shown = wait_for_a_new_map(tab, shown)
    tab.check("#automatic input")
    wait_for_a_new_map(tab, shown)
    expect(tab, "#answers h3", "TRIM:-1")
    expect(tab, "#history", "patches as before")
    assert tab.locator("#history figure").count() == 6
    see(tab, "history", full_page=True)


def test_no_reduction_stands_beside_the_method_with_tokens_time_and_flops(address, visit):
    tab = visit(address)
    tab.check("#compare input")
    sync_api.expect(tab.locator("#answers .verdict")).to_be_visible(timeout=30000)
    shown = tab.locator("#answers").inner_text()
    for words in ("same answer", "16 of 64 (25 %)", "64 of 64 (100 %)", "326 MFLOPs (57 %)", "573 MFLOPs", " ms"):
        assert words in shown
    boxes = [tab.locator("#answers .card").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    shown = wait_for_a_new_map(tab)
    tab.locator("#questions button").nth(2).click()
    wait_for_a_new_map(tab, shown)
    expect(tab, "#answers", "585 MFLOPs")
    see(tab, "compare", full_page=True)


def test_an_upload_is_asked_about_and_begins_a_new_history(address, visit, tmp_path):
    image, scene = draw_scene(7, 2, 1)
    image.resize((336, 224)).save(tmp_path / "wide.jpg")
    tab = visit(address)
    tab.locator("#questions button").nth(1).click()
    expect(tab, "#history", "patches as before")
    tab.set_input_files("#image input[type=file]", tmp_path / "wide.jpg")
    tab.fill("#question textarea", f"Is there a {scene.objects[0].name} in the image?")
    tab.press("#question textarea", "Enter")
    sync_api.expect(tab.locator("#history figure")).to_have_count(0, timeout=30000)
    expect(tab, "#pictures", "of 64 patches kept")
    assert tab.locator("#answers .text").inner_text().lower() in ("yes", "no")
    see(tab, "upload")


def test_a_sample_brings_its_questions(address, visit):
    tab = visit(address)
    sample = list_samples()[2]
    tab.locator("#samples button").nth(2).click()
    expect(tab, "#answers", "green")
    assert tab.locator("#question textarea").input_value() == sample.questions[0]
    assert tab.locator("#questions button").all_inner_texts() == list(sample.questions)


def test_mistakes_are_a_sentence_on_the_page_and_the_next_question_is_answered(address, visit, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    tab = visit(address)
    tab.fill("#question textarea", "  ")
    tab.click("#ask")
    expect(tab, "#answers .problem", "the question is empty: write what you want to know about the image")
    tab.fill("#question textarea", "Is there a <b>bold</b> circle?")
    choose_method(tab, "PyramidDrop")
    expect(tab, "#answers .problem", "64 tokens are at least 22 on average")
    assert tab.locator("#pictures img").count() == 0
    choose_method(tab, "TRIM")
    expect(tab, "#answers", "of 64")
    tab.get_by_label("Remove Image").click()
    tab.click("#ask")
    expect(tab, "#answers .problem", "there is no image: upload one, or choose a sample")
    tab.set_input_files("#image input[type=file]", tmp_path / "text.png")
    tab.click("#ask")
    expect(tab, "#answers .problem", "image text.png: not an image in a known format")
    see(tab, "mistake")
    tab.locator("#samples button").nth(0).click()
    expect(tab, "#answers", "circle")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_has_no_sideways_scrolling(address, visit, scheme):
    tab = visit(f"{address}?__theme={scheme}", viewport={"width": 400, "height": 800}, color_scheme=scheme)
    tab.check("#compare input")
    expect(tab, "#answers", "573 MFLOPs")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    see(tab, f"narrow_{scheme}", full_page=True)


# ------------------------------------------------------------------------------------------------------------ the page
class SlowModel:
    """Writes a word every 0.2 seconds, and notes how far each question came."""

    title, methods, num_patches = "a slow model", {"TRIM": True}, 64

    def __init__(self) -> None:
        self.words: list[int] = []

    def ask(self, image: Path, question: str, spec: str) -> Iterator[str | Result]:
        number = len(self.words)
        self.words.append(0)

        def work(put):
            for word in range(40):
                put(f"word{word} ")
                self.words[number] += 1
                time.sleep(0.2)
            return Result(spec, "end", "3", 3, 64, 40, 0.2, 8.0)

        return stream(work)


@pytest.fixture
def slow() -> Iterator[tuple[SlowModel, str]]:
    from llava.serve.page import Page

    class Cold(Page):
        def start(self) -> tuple[str, str, list]:
            return "", "", []

    model, port = SlowModel(), find_port()
    blocks = Cold(model, list_samples()).lay_out()
    blocks.queue(default_concurrency_limit=1)
    blocks.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield model, f"http://127.0.0.1:{port}/"
    blocks.close(verbose=False)


def test_an_answer_appears_as_it_is_written_and_stop_ends_it(slow, visit):
    model, address = slow
    tab = visit(address)
    tab.click("#ask")
    expect(tab, "#answers", "word1 ")
    assert tab.locator(".caret").count() == 1
    tab.click("#stop")
    sync_api.expect(tab.locator(".caret")).to_have_count(0)
    time.sleep(1)
    (count,) = model.words
    time.sleep(1)
    assert model.words == [count] and count < 40


def test_a_reader_who_leaves_ends_the_answer(slow, visit):
    model, address = slow
    tab = visit(address)
    tab.click("#ask")
    expect(tab, "#answers", "word1 ")
    tab.close()
    time.sleep(4)
    (count,) = model.words
    time.sleep(1)
    assert model.words == [count] and count < 40


def test_an_image_is_read_by_llava_and_not_by_the_page(slow, visit, tmp_path):
    """A turned photograph keeps its EXIF tag on the way, so that every command sees the same image."""
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    model, address = slow
    files = []
    model.ask = lambda image, question, spec: (files.append(image.read_bytes()), stream(lambda put: Result(
        spec, "seen", "3", 3, 64, 1, 0.1, 0.1)))[1]  # fmt: skip
    tab = visit(address)
    tab.set_input_files("#image input[type=file]", tmp_path / "turned.jpg")
    sync_api.expect(tab.locator("#image img")).to_have_attribute("src", re.compile("turned"))
    tab.click("#ask")
    expect(tab, "#answers", "seen")
    assert files == [(tmp_path / "turned.jpg").read_bytes()]
