"""Clients of all kinds that come, cancel, stall and go: `OMNI_JAX_SOAK` seconds long; `make soak` takes an hour."""

from __future__ import annotations

import os
import random
import threading
import time

import httpx
import openai
import psutil

from tests.infer.serve.conftest import NAME, library
from tests.infer.serve.test_realtime import Talk, noise

SECONDS = float(os.environ.get("OMNI_JAX_SOAK", "12"))
QUESTIONS = [[{"role": "user", "content": f"{i}. What is {i} times {i}?"}] for i in range(8)]
SPEECH = {"modalities": ["text", "audio"], "audio": {"format": "pcm16"}}
# What a client may be told instead of an answer while all others ask as well.
BUSY = (openai.RateLimitError, openai.InternalServerError)


class Soak:
    """What the clients do, and what they saw."""

    def __init__(self, url, wanted):
        self.url, self.wanted = url, wanted
        self.until = time.monotonic() + SECONDS
        self.done, self.wrong = dict.fromkeys(("asked", "cancelled", "stalled", "talked", "refused"), 0), []

    def ask(self, client, dice):
        """An answer must be that of its question: whole or streamed, alone or beside others."""
        n, stream = dice.randrange(len(QUESTIONS)), dice.random() < 0.5
        got = client.chat.completions.create(model=NAME, messages=QUESTIONS[n], max_tokens=8, stream=stream)
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in got if c.choices)
        else:
            text = got.choices[0].message.content
        if text != self.wanted[n]:
            self.wrong.append((n, text))
        self.done["asked"] += 1

    def cancel(self, client, dice):
        """Goes in the middle of a spoken answer."""
        with client.chat.completions.create(
            model=NAME, messages=QUESTIONS[0], max_tokens=200, stream=True, **SPEECH
        ) as stream:
            for _, _ in zip(range(dice.randrange(1, 5)), stream, strict=False):
                continue
        self.done["cancelled"] += 1

    def stall(self, _, dice):
        """Does not read for a while, and goes."""
        body = {"messages": QUESTIONS[1], "max_tokens": 100, "stream": True, **SPEECH}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=60):
            time.sleep(dice.random())
        self.done["stalled"] += 1

    def talk(self, _, dice):
        """A realtime session; another one may have the row."""
        with Talk(self.url) as talk:
            if talk.next()["type"] == "error":
                self.done["refused"] += 1
                return
            talk.append(noise(0.5))
            talk.send("conversation.item.create", item={
                "type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]})  # fmt: skip
            talk.send("response.create")
            if dice.random() < 0.5 and not self.answered(talk):
                self.done["refused"] += 1
                return
        self.done["talked"] += 1

    @staticmethod
    def answered(talk):
        """Whether the turn ends in a response; others may have all rows by then, which the session is told."""
        while (event := talk.next())["type"] not in ("response.done", "error"):
            continue
        assert event["type"] != "error" or event["error"]["code"] == "overloaded", event
        return event["type"] == "response.done"

    def run(self, what, seed):
        dice = random.Random(seed)
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while time.monotonic() < self.until:
                try:
                    what(client, dice)
                except BUSY:
                    self.done["refused"] += 1
                    time.sleep(0.05)
                except Exception as e:
                    self.wrong.append(repr(e))
                    return


def test_clients_that_come_and_go(url, replica):
    """Each answer is that of its question, memory stays, and as after every test here all rows are free at the end and
    nothing was compiled."""
    wanted = [library(replica, q).text for q in QUESTIONS]
    assert len(set(wanted)) > 1
    soak, process, sizes = Soak(url, wanted), psutil.Process(), []
    threads = [
        threading.Thread(target=soak.run, args=(what, i))
        for i, what in enumerate((soak.ask, soak.ask, soak.cancel, soak.stall, soak.talk))
    ]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        sizes.append(process.memory_info().rss)
        time.sleep(0.2)
    assert soak.wrong == []
    assert all(soak.done[name] for name in ("asked", "cancelled", "stalled", "talked")), soak.done
    late = sizes[len(sizes) // 2 :]
    assert max(late) - late[0] < 64 << 20
    print(soak.done, f"{(sizes[-1] - sizes[0]) >> 20} MiB more")
    until = time.monotonic() + 20
    while replica.sessions and time.monotonic() < until:
        time.sleep(0.1)
    assert replica.sessions == 0
