"""Makes page.png: the server's page, on which nano is shown pictures and asked about them.

pip install playwright; python docs/media/page.py [/usr/bin/chromium]
"""

import pathlib
import subprocess
import sys
import time
import urllib.request

from playwright.sync_api import Page, expect, sync_playwright

from omni_jax.checkpoint.sources import INCLUDED_FOLDER

DEMO = INCLUDED_FOLDER / "demo"
ASKED = {"drawing": "what is in the picture", "digit": "what number is this"}
PORT = 8177
SECONDS = 600  # for compiling


def answered(page: Page, count: int) -> None:
    """Waits for the text of so many answers, and until no more of the last is played."""
    answers = page.locator("#log p.assistant")
    expect(answers).to_have_count(count, timeout=1000 * SECONDS)
    expect(answers.nth(count - 1)).not_to_have_text("", timeout=1000 * SECONDS)
    played, before = page.locator("#t-played"), ""
    while (now := played.inner_text()) != before or now == "–":
        before = now
        page.wait_for_timeout(3000)


def talk(page: Page) -> None:
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("Connected")
    for number, (name, question) in enumerate(ASKED.items(), 1):
        page.locator("#file").set_input_files(DEMO / f"{name}.png")
        expect(page.locator("#log img")).to_have_count(number)
        page.get_by_label("Message").fill(question)
        page.get_by_role("button", name="Send", exact=True).click()
        answered(page, number)


def main(chromium: str = "/usr/bin/chromium") -> None:
    url = f"http://127.0.0.1:{PORT}"
    omni = pathlib.Path(sys.executable).with_name("omni-jax")
    with (
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
                    if time.monotonic() > until or server.poll() is not None:
                        raise
                    time.sleep(1)
            flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
            browser = playwright.chromium.launch(executable_path=chromium, args=flags)
            page = browser.new_page(viewport={"width": 900, "height": 760}, color_scheme="light")
            page.goto(url)
            talk(page)
            page.screenshot(path=pathlib.Path(__file__).with_name("page.png"))
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:2])
