"""Makes page.png: the server's page, on which nano is shown a picture and asked about it in writing and by voice.

    pip install playwright; python docs/media/page.py [/usr/bin/chromium]
"""

import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import soundfile
from playwright.sync_api import Page, expect, sync_playwright

from omni_jax.checkpoint.sources import INCLUDED_FOLDER

DEMO = INCLUDED_FOLDER / "demo"
PORT, RATE = 8177, 48000
SECONDS = 600  # for compiling


def write_microphone(path: pathlib.Path) -> None:
    """Somebody asks how many shapes there are, after the picture is shown."""
    samples, rate = soundfile.read(DEMO / "question.flac", dtype="float32")
    voice = np.interp(np.arange(0, len(samples), rate / RATE), np.arange(len(samples)), samples)
    soundfile.write(path, np.concatenate([np.zeros(RATE), voice, np.zeros(60 * RATE)]), RATE, "PCM_16")


def answered(page: Page, count: int) -> None:
    """Waits for the text of so many answers, and until the last is spoken."""
    answers = page.locator("#log p.assistant")
    expect(answers).to_have_count(count, timeout=1000 * SECONDS)
    expect(answers.nth(count - 1)).not_to_have_text("", timeout=1000 * SECONDS)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled(timeout=1000 * SECONDS)


def talk(page: Page) -> None:
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("Connected")
    for name, question in (("drawing", "what is in the picture"), ("digit", "what number is this")):
        page.locator("#file").set_input_files(DEMO / f"{name}.png")
        expect(page.locator("#log img")).to_have_count(1 if name == "drawing" else 2)
        page.get_by_label("Message").fill(question)
        page.get_by_role("button", name="Send", exact=True).click()
        answered(page, 1 if name == "drawing" else 2)
    page.locator("#file").set_input_files(DEMO / "shapes.png")
    expect(page.locator("#log img")).to_have_count(3)
    page.get_by_role("button", name="Microphone").click()
    answered(page, 3)


def main(chromium: str = "/usr/bin/chromium") -> None:
    url = f"http://127.0.0.1:{PORT}"
    omni = pathlib.Path(sys.executable).with_name("omni-jax")
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([str(omni), "serve", "--port", str(PORT)]) as server,
        sync_playwright() as playwright,
    ):
        try:
            until = time.monotonic() + SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < until and server.poll() is None, "the server never became ready"
                    time.sleep(1)
            microphone = pathlib.Path(folder) / "microphone.wav"
            write_microphone(microphone)
            browser = playwright.chromium.launch(executable_path=chromium, args=[
                "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone}%noloop",
                "--autoplay-policy=no-user-gesture-required",
            ])  # fmt: skip
            page = browser.new_page(viewport={"width": 900, "height": 760}, color_scheme="light")
            page.goto(url)
            talk(page)
            page.screenshot(path=pathlib.Path(__file__).with_name("page.png"))
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:2])
