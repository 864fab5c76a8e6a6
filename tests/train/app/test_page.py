"""The page in a browser: each tab acted on, hostile captions and files, many clients, nothing asked of other machines.

The browser is the system's: Playwright cannot always download its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.train.app.hostile import CAPTIONS, encoded
from train.app.checks import check_app
from train.app.config import AppConfig

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'afresh[app]'")
api = pytest.importorskip("playwright.sync_api", reason="the page is tried with Playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
WAIT = 240_000  # milliseconds: a busy machine is slow, and nothing here is timed


@pytest.fixture(scope="module")
def served(curated, sample_model, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The page's address and the folder of its lists; served by the command, and ended as by a terminal."""
    out, shards = curated
    folder = tmp_path_factory.mktemp("served")
    run = folder / "runs" / "going"
    run.mkdir(parents=True)
    line = {"step": 1, "loss": 0.5, "kept": 3, "dropped": 1, "judged": 2, "magnitude": 1.5}
    (run / "log.jsonl").write_text("".join(json.dumps(line | {"step": n}) + "\n" for n in (1, 2)))
    (run / "table.md").write_text(f"**{CAPTIONS[0]}**\n\n| {CAPTIONS[0]} |\n|---|\n| {CAPTIONS[2]} |\n")
    options = {
        "model": sample_model, "curated": out, "shards": f"[{shards}]", "review": folder / "review",
        "runs": folder / "runs", "port": 0, "steps": 1, "seeds": 1, "image_steps": 3, "clean": 6, "max_upload_mb": 4,
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "app", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stderr is not None
    try:
        told = ""
        while (found := re.search(r"the page is at (\S+)", told)) is None:
            line_read = process.stderr.readline()
            assert line_read, told
            told += line_read
        yield found[1], folder
    finally:
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=options)


@pytest.fixture
def page(served, browser) -> Iterator[object]:
    """A fresh visit, which must not have asked another machine for anything, nor run what a caption says."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    visit = context.new_page()
    visit.set_default_timeout(WAIT)
    elsewhere, failed = [], []
    visit.on("request", lambda request: elsewhere.append(request.url) if not own(request.url, served[0]) else None)
    visit.on("pageerror", lambda error: failed.append(str(error)))
    visit.on("dialog", lambda dialog: failed.append(dialog.message))
    visit.goto(served[0])
    visit.wait_for_selector("#magnitude .big")
    yield visit
    assert visit.title() == "Afresh"
    assert not elsewhere and not failed
    context.close()


def own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def write_prompt(page, text: str) -> None:
    page.fill("#prompt textarea", text)


def test_a_prompt_is_read_as_it_is_written_its_words_struck_and_two_images_drawn(page):
    write_prompt(page, "a red car, some grapes")
    page.wait_for_function("document.querySelectorAll('#words .word small').length == 5")
    page.wait_for_selector("#magnitude .big")
    page.locator("#words .word", has_text="red").focus()
    page.keyboard.press("Enter")  # by the keyboard
    page.wait_for_selector("#words .word.struck:has-text('red')")
    page.wait_for_selector("#words q:has-text('a car, some grapes')")
    assert page.locator("#words .word[aria-pressed=true]").count() == 1
    page.locator("#words .struck").click()
    page.wait_for_function("!document.querySelector('#words .struck') && !document.querySelector('#words q')")
    page.click("#draw")
    page.wait_for_selector("#trace svg polyline.limit")
    assert page.locator("#pair .drawn > img").count() == 2 and page.locator("#pair .nearest img").count() == 2


def test_what_a_client_does_not_want_any_more_is_stopped(page):
    page.get_by_label("Steps").fill("200")
    page.click("#draw")
    page.wait_for_selector("#pair .blank:has-text('drawing')")
    page.click("#stop")
    page.get_by_label("Steps").fill("2")
    page.click("#draw")  # the model is free again
    page.wait_for_selector("#trace svg")


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_hostile_prompt_is_shown_as_it_is_written(page, caption):
    text = caption.replace("\t", " ")
    write_prompt(page, text)
    last = re.findall(r"\w+", text)[-1]
    page.wait_for_selector(f"#words .word:has-text('{last}') small, #words .unseen:has-text('{last}')")
    assert page.locator("#words img, #words script, #words a").count() == 0


def test_the_set_is_browsed_searched_and_decided_upon(page, served, emoji, tmp_path):
    review = served[1] / "review"
    open_tab(page, "Set")
    page.wait_for_selector("#listing .group >> nth=5")
    assert page.locator("#listing .group").count() == len(CAPTIONS)
    shown = page.locator("#listing").inner_text()
    assert CAPTIONS[0] in shown and "{{constructor" in shown and "\\x1b[31m" in shown
    assert page.locator("#listing script, #listing a, #listing img[src=x]").count() == 0
    page.locator("#listing .card.dropped .look").first.click()
    page.wait_for_selector("#why li")
    assert "dropped?" in page.locator("#why h3").inner_text()
    page.locator("#listing .card.dropped .act:has-text('Keep it')").first.click()
    page.wait_for_selector("#review pre")
    (line,) = (review / "keep.tsv").read_text().splitlines()
    assert re.fullmatch(r"000000\.tar\t00\d-\d", line)
    page.locator("#review .act:has-text('Take back')").click()
    page.wait_for_selector("#review p:has-text('None yet')")
    assert (review / "keep.tsv").read_text() == ""
    page.fill("#search-text textarea, #search-text input", emoji[55][1])
    page.keyboard.press("Enter")
    page.wait_for_selector("#listing p:has-text('Nearest by caption')")
    (tmp_path / "some.png").write_bytes(encoded(emoji[55][0]))
    page.set_input_files("#search-image input[type=file]", str(tmp_path / "some.png"))
    page.wait_for_selector("#listing .query img")
    assert "1.000" in page.locator("#listing .card").first.inner_text()


def bomb(side: int) -> bytes:
    """A PNG of side × side pixels in a few kilobytes, which nobody should decode."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(bytes(1 << 20), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("bomb.png", bomb(50_000), "2,500,000,000|2500000000|pixels"),
        ("broken.png", b"\x89PNG\r\n\x1a\nand no more", "broken.png: not a JPEG"),
        ("page.png", b"<svg onload=\"document.title='owned'\">", "image"),
        ("large.png", bytes(5_000_000), "error"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line_and_the_page_goes_on(page, tmp_path, name, content, told):
    open_tab(page, "Set")
    page.wait_for_selector("#listing .group >> nth=5")
    (tmp_path / name).write_bytes(content)
    page.set_input_files("#search-image input[type=file]", str(tmp_path / name))
    toast = page.locator("[data-testid=toast-body], .toast-body, #search-image .error").first
    toast.wait_for()
    assert re.search(told, toast.inner_text(), re.IGNORECASE), toast.inner_text()
    assert len(toast.inner_text().splitlines()) <= 3
    page.click("#browse")
    page.wait_for_selector("#listing .card")


def test_neurons_are_found_and_switched_and_the_image_follows(page):
    open_tab(page, "Neurons")
    page.fill("#neurons-prompt textarea, #neurons-prompt input", "a red car")
    page.click("#find")
    page.wait_for_function("document.querySelectorAll('#neurons-pair .drawn > img').length == 2")
    before = page.locator("#neurons-pair .drawn > img").nth(1).get_attribute("src")
    layer = page.locator("#layers .switch:enabled").first
    assert layer.get_attribute("aria-pressed") == "true"
    layer.click()
    page.wait_for_selector("#layers .switch:enabled[aria-pressed=false]")
    page.wait_for_function(
        "old => { const all = document.querySelectorAll('#neurons-pair .drawn > img');"
        " return all.length == 2 && all[1].src != old; }",
        arg=before,
    )
    page.locator("#layers .unit").first.click()
    page.wait_for_selector("#layers .switch[aria-pressed=mixed], #layers .unit[aria-pressed=true]")


def test_a_run_is_shown_as_it_goes(page, served):
    open_tab(page, "Runs")
    page.wait_for_selector("#going .curves svg")
    page.wait_for_selector("#finished td:has-text('constructor')")
    with open(served[1] / "runs" / "going" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 77, "loss": 0.25, "kept": 4, "dropped": 0}\n')
    page.wait_for_selector("#going p:has-text('step 77')")  # by itself


def test_a_narrow_screen_shows_all_tabs_and_scrolls_one_way_only(served, browser):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    visit = context.new_page()
    visit.set_default_timeout(WAIT)
    visit.goto(served[0])
    for name, selector in (
        ("Prompt", "#magnitude .big"), ("Set", "#listing .card"), ("Neurons", "#layers p"), ("Runs", "#finished table")
    ):  # fmt: skip
        open_tab(visit, name)
        visit.wait_for_selector(selector)
        assert visit.evaluate("document.documentElement.scrollWidth") <= 390, name
    context.close()


def test_ten_clients_at_once_each_get_their_own(served, browser):
    visits = []
    for number in range(10):
        context = browser.new_context()
        visit = context.new_page()
        visit.set_default_timeout(WAIT)
        visit.goto(served[0], wait_until="commit")
        visits.append((number, context, visit))
    for _, _, visit in visits:
        visit.wait_for_selector("#words .word")
    for number, _, visit in visits:
        write_prompt(visit, " ".join(["word"] * (number + 1)))
    for number, context, visit in visits:
        visit.wait_for_function(
            "n => document.querySelectorAll('#words .word small').length == n"
            " && document.querySelectorAll('#words .word').length == n",
            arg=number + 1,
        )
        context.close()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", str(ROOT / "pyproject.toml")])
def test_no_file_of_the_machine_can_be_had(served, path):
    for route in (f"/gradio_api/file={path}", f"/file={path}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(served[0].rstrip("/") + route, timeout=60)
        assert refused.value.code in (403, 404)


def test_a_file_that_was_not_uploaded_cannot_be_searched_for(served):
    """As a script would ask, not the page: every function with the path of a file of the machine."""
    address = served[0].rstrip("/")
    config = json.load(urllib.request.urlopen(f"{address}/config", timeout=60))
    kinds = {one["id"]: one["type"] for one in config["components"]}
    asked = [one["id"] for one in config["dependencies"] if [kinds[i] for i in one["inputs"]] == ["file"]]
    assert asked
    for number in asked:
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file], "fn_index": number, "session_hash": "me"}
        request = urllib.request.Request(
            f"{address}/gradio_api/run/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=60)


def test_by_default_this_machine_alone_is_served_and_nothing_needs_gradio_before():
    config = AppConfig()
    assert config.host == "127.0.0.1"
    with pytest.raises(Exception, match="nothing to show"):
        check_app(config)
