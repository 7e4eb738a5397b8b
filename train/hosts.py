"""Ending together: where one host of several cannot go on, all end at once, with exit code 2.

Otherwise the others would wait for it in their next collective until the shutdown barrier aborts them, minutes later.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from omni_jax.errors import InputError
from omni_jax.train.data.lines import OtherHostError

_KEY, _BARRIER = "omni_jax/failure", "omni_jax/end"
_POLL = 0.5  # seconds
_LAST_WORDS = 5.0  # seconds in which all hosts hear of it before the first one ends
_PATIENCE = 60.0  # seconds in which a host says what it failed of, once the others know that it did


class _Failure:
    """What this host says to the others, and hears from them, through the coordinator's key-value store."""

    def __init__(self, client: Any):
        self._client, self._ending, self._done = client, threading.Lock(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def done(self) -> None:
        """Stops listening."""
        self._done.set()

    def _listen(self) -> None:
        while not self._done.wait(_POLL):
            with contextlib.suppress(Exception):  # nothing there yet, or the coordinator has gone
                said = self._client.key_value_try_get(_KEY)
                if not self._ending.locked():  # else it has a line of its own
                    print(f"omni-jax: this host ends, since {said}", file=sys.stderr)
                self._end(2)

    def tell(self, line: str, code: int) -> None:
        """Says that this host cannot go on, and ends the process."""
        print(f"omni-jax: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # another host was first, or the coordinator has gone
            self._client.key_value_set(_KEY, f"process {jax.process_index()} cannot go on: {line}")
        self._end(code)

    def _end(self, code: int) -> None:
        """Ends the process as soon as all hosts know; of two threads the first one."""
        self._ending.acquire()
        with contextlib.suppress(Exception):  # a host that is gone does not come
            self._client.wait_at_barrier(_BARRIER, int(_LAST_WORDS * 1000))
        if jax.process_index() == 0:
            time.sleep(2 * _POLL)  # it answers the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where an error of this host leaves the block, all hosts end; on a single host it just leaves it."""
    from jax._src import distributed  # jax offers no other way to the coordinator's store

    client = distributed.global_state.client
    if jax.process_count() == 1 or client is None:
        yield
        return
    failure = _Failure(client)
    try:
        yield
    except OtherHostError as e:
        # That host still closes its checkpoints. Its line is the one to print, and listening ends this process then.
        time.sleep(_PATIENCE)
        failure.tell(str(e), 2)
    except InputError as e:
        failure.tell(" ".join(str(e).split()), 2)
    except Exception as e:
        traceback.print_exc()
        failure.tell(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", 1)
    finally:
        failure.done()
