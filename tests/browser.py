"""`make browser`: the server's page in Chromium, with files in place of the microphone and the camera.

Somebody shows a picture, asks by voice, hears an answer, interrupts it by talking, and goes on by keyboard. axe-core
looks for what people with screen readers would miss. Leaves screenshots and the answer as wav in a folder.

    python -m tests.browser [--chromium /usr/bin/chromium] [--axe …/axe.min.js] [--keep out/browser]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import av
import numpy as np
import soundfile
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from omni_jax import PARTS, load
from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.server import in_thread
from omni_jax.infer.serve.warmup import prepare
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests.infer.serve.conftest import NAME, SIZES, SMALL

MEDIA = pathlib.Path(__file__).parents[1] / "docs" / "media"
KEY = "a-key-of-the-browser-test"
RATE = 48000
WIDE, NARROW = {"width": 1100, "height": 760}, {"width": 390, "height": 780}
# Every sound that a page is sent, before its own code sees it, and what it says of how much of it was played.
RECORD = """
window.sent = [];
window.told = [];
const Socket = window.WebSocket;
window.WebSocket = class extends Socket {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "response.output_audio.delta" || event.type === "response.done") window.sent.push(event);
    });
  }
  send(data) {
    const event = JSON.parse(data);
    if (event.type === "conversation.item.truncate") window.told.push(event);
    super.send(data);
  }
};
"""


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The URL of a server over small random weights, whose answers take seconds to hear."""
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, C.preset("tiny"), seed=1, dtype="float32")
        model = load(folder, parts=PARTS, dtype="float32")
    speech = SpeechSettings(
        temperature=0.0, max_codes=300, ode_steps=2, ode_solver="euler", watchdog=None, mode="windowed"
    )  # fmt: skip
    driver = model.driver(2, capacity=2048, sizes=SIZES, max_codes=speech.max_codes)
    options = ServeOptions(port=0, api_key=(KEY,), reconnect_seconds=30)
    replica = Replica(model, driver, options, NAME, GenerationSettings(max_new_tokens=24), speech, SMALL)
    prepare(replica)
    replica.start()
    try:
        with in_thread(replica) as url:
            yield url
    finally:
        replica.stop()


def write_microphone(path: pathlib.Path) -> None:
    """Two questions; the second one begins while the answer to the first is heard."""
    samples, rate = soundfile.read(MEDIA / "speech.flac", dtype="float32")
    voice = np.interp(np.arange(0, min(len(samples), 3 * rate), rate / RATE), np.arange(len(samples)), samples)
    silence = np.zeros
    whole = [silence(2 * RATE), voice, silence(3 * RATE), voice, silence(30 * RATE)]
    soundfile.write(path, np.concatenate(whole), RATE, "PCM_16")


def write_camera(path: pathlib.Path) -> None:
    """The cat, for as long as somebody looks."""
    frame = av.VideoFrame.from_image(Image.open(MEDIA / "cat.jpg").convert("RGB").resize((320, 240)))
    with av.open(str(path), "w", format="yuv4mpegpipe") as out:
        stream = out.add_stream("wrapped_avframe", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(20):
            for packet in stream.encode(frame.reformat(format="yuv420p")):
                out.mux(packet)
        out.mux(stream.encode())


def launch(playwright, chromium: str, folder: pathlib.Path) -> Browser:
    microphone, camera = folder / "microphone.wav", folder / "camera.y4m"
    write_microphone(microphone)
    write_camera(camera)
    return playwright.chromium.launch(executable_path=chromium, args=[
        "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}%noloop", f"--use-file-for-fake-video-capture={camera}",
        "--autoplay-policy=no-user-gesture-required",
    ])  # fmt: skip


def opened(browser: Browser, url: str, **how) -> tuple[Page, list[str]]:
    """The page, and what is wrong with it, as it comes."""
    wrong: list[str] = []
    page = browser.new_page(**how)
    page.set_default_timeout(120_000)
    page.add_init_script(RECORD)
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(r.url))
    page.goto(url)
    return page, wrong


def check_accessible(page: Page, axe: pathlib.Path, where: str) -> None:
    """Raises AssertionError for what axe-core finds serious."""
    page.evaluate(axe.read_text("utf-8"))  # not as a script element, which the page's policy forbids
    found = page.evaluate("axe.run()")["violations"]
    said = [(v["id"], v["impact"], [n["html"][:120] for n in v["nodes"]]) for v in found]
    assert not [v for v in said if v[1] in ("serious", "critical")], f"{where}: {said}"
    print(f"axe-core, {where}: nothing serious; {len(said)} lesser: {[v[0] for v in said]}")


def wait(page: Page, holds: str) -> None:
    """Until an expression holds. Playwright's own way evaluates strings in the page, which its policy forbids."""
    until = time.monotonic() + 120
    while not page.evaluate(holds):
        assert time.monotonic() < until, f"it never held: {holds}"
        page.wait_for_timeout(50)


def connect(page: Page) -> None:
    page.locator("summary").click()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("Connected", timeout=60_000)
    page.locator("summary").click()


def talk(page: Page, keep: pathlib.Path) -> None:
    """By voice: a picture and a question, the answer, an interruption."""
    page.get_by_role("button", name="Camera").click()
    wait(page, "document.getElementById('camera').videoWidth > 0")
    page.get_by_role("button", name="Send picture").click()
    expect(page.locator("#log img")).to_have_count(1)
    page.get_by_role("button", name="Microphone").click()
    wait(page, "document.querySelectorAll('#log p.assistant').length === 1")
    wait(page, "parseFloat(document.getElementById('t-played').textContent) > 0.5")
    page.screenshot(path=keep / "page-wide.png")
    wait(page, "document.querySelectorAll('#log p.assistant').length === 2")
    # The server may have made all of it by then: what counts is what was played.
    told, events = page.evaluate("window.told"), page.evaluate("window.sent")
    seconds = sum(len(base64.b64decode(e["delta"])) for e in events if e.get("item_id") == told[0]["item_id"]) / 48000
    assert 500 < told[0]["audio_end_ms"] < 1000 * seconds, (
        f"talking has not interrupted the answer: {told}, {seconds} s"
    )
    wait(page, "window.sent.filter((e) => e.type === 'response.done').length === 2")
    page.get_by_role("button", name="Microphone").click()


def write_answer(page: Page, path: pathlib.Path) -> float:
    """Seconds of the last answer, as it was sent."""
    events = page.evaluate("window.sent")
    last = [e["response"]["id"] for e in events if e["type"] == "response.done"][-1]
    found = [base64.b64decode(e["delta"]) for e in events if e.get("response_id") == last]
    samples = np.frombuffer(b"".join(found), np.int16)
    soundfile.write(path, samples, 24000)
    assert len(samples)
    return len(samples) / 24000


def go_on_by_keyboard(page: Page) -> None:
    """From the beginning of the page, without a mouse."""
    page.evaluate("document.activeElement.blur()")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type("And in the evening?")
    page.keyboard.press("Enter")
    wait(page, "document.querySelectorAll('#log p.assistant').length === 3")
    wait(page, "document.querySelectorAll('#log p.assistant')[2].textContent.length > 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument(
        "--axe", type=pathlib.Path, default=pathlib.Path("out/browser/node_modules/axe-core/axe.min.js")
    )
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("out", "browser"))
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    with serving() as url, tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright, given.chromium, pathlib.Path(folder))
        page, wrong = opened(browser, url, viewport=WIDE, color_scheme="light")
        check_accessible(page, given.axe, "wide, light")
        connect(page)
        talk(page, given.keep)
        seconds = write_answer(page, given.keep / "answer.wav")
        go_on_by_keyboard(page)
        timings = page.locator("dl").inner_text().split()
        page.close()
        phone, wrong_there = opened(browser, url, viewport=NARROW, color_scheme="dark", has_touch=True)
        connect(phone)
        phone.get_by_label("Message").fill("What does a cat do in the morning?")
        phone.get_by_role("button", name="Send", exact=True).tap()
        wait(phone, "document.querySelector('#log p.assistant')?.textContent.length > 0")
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"
        phone.screenshot(path=given.keep / "page-narrow.png")
        check_accessible(phone, given.axe, "narrow, dark")
        phone.close()
        browser.close()
    assert not wrong + wrong_there, wrong + wrong_there
    print(
        f"asked by voice, heard, interrupted, went on by keyboard; {seconds:.2f} s in answer.wav; {json.dumps(timings)}"
    )


if __name__ == "__main__":
    main()
