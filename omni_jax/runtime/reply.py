"""From drawn ids to text, one id at a time: stop strings, finish reasons, and text that is safe to show."""

from __future__ import annotations

from collections.abc import Sequence

from omni_jax.events import FinishReason, TokenLogprob
from omni_jax.processing.tokenizer import Detokenizer, Tokenizer
from omni_jax.settings import GenerationSettings


class ReplyBuilder:
    """Collects one reply. The offline and the streaming loop both feed it, so both stop at the same id.

    Attributes:
      ids: all ids so far.
      logprobs: parallel to `ids`.
      text: the text so far that is certain, stop string cut off.
      certain: ids from the first on that are to be spoken; what may still turn out to be a stop string is not among
        them, and what has turned out to be one, or follows an id of `unspoken`, never is.
      finish_reason: None while the reply goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: GenerationSettings, eos: Sequence[int], room: int,
        unspoken: Sequence[int] = (),
    ):  # fmt: skip
        """`room`: ids that the context still holds; `unspoken`: see `Request`."""
        self._unspoken = frozenset(unspoken)
        self._tokenizer, self._stream = tokenizer, Detokenizer(tokenizer)
        self._settings, self._eos = settings, frozenset(eos)
        self._limit = min(settings.max_new_tokens, room)
        self._at_limit: FinishReason = "length" if settings.max_new_tokens <= room else "context"
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.certain = 0
        self._ends: list[int] = []  # length of the text after each id
        self.finish_reason: FinishReason | None = None

    @property
    def left(self) -> int:
        """Ids that may still be drawn."""
        return 0 if self.finish_reason else self._limit - len(self.ids)

    def feed(self, token: TokenLogprob) -> str:
        """Takes the next id; returns the text that became certain with it."""
        self.ids.append(token.id)
        self.logprobs.append(token)
        if token.id in self._eos:
            self.finish_reason = "eos"
            return self._release(self._stream.finish(), final=True)
        if token.id in self._settings.stop_ids:
            self.finish_reason = "stop"
            return self._release(self._stream.finish(), final=True)
        if len(self.ids) >= self._limit:
            piece = self._stream.push(token.id) + self._stream.finish()
            self.finish_reason = self._at_limit
            return self._release(piece, final=True)
        return self._release(self._stream.push(token.id), final=False)

    def _release(self, piece: str, *, final: bool) -> str:
        self._held += piece
        self._ends.append(len(self.text) + len(self._held))
        cuts = [at for stop in self._settings.stop if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.finish_reason = "stop"
            shown, self._held = self._held[: min(cuts)], ""
        elif final:
            shown, self._held = self._held, ""
        else:
            keep = self._pending()
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += shown
        while self.certain < len(self._ends) and self._ends[self.certain] <= len(self.text):
            if self.ids[self.certain] in self._unspoken:
                break
            self.certain += 1
        return shown

    def interrupt(self, keep: int) -> None:
        """Ends the reply here and keeps its first `keep` ids, or fewer where a character would be cut in two."""
        whole, at = first_tokens(self._tokenizer, self.ids, keep)
        del self.ids[at:], self.logprobs[at:], self._ends[at:]
        self.text, self.certain, self.finish_reason = whole, at, "interrupted"

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._settings.stop), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._settings.stop):
                return n
        return 0


def first_tokens(tokenizer: Tokenizer, ids: Sequence[int], keep: int) -> tuple[str, int]:
    """The text of the first `keep` ids, or of fewer where a character would be cut in two; and of how many."""
    stream = Detokenizer(tokenizer)
    text, whole, at = "", "", 0
    for i, token in enumerate(ids[:keep]):
        text += stream.push(token)
        if not stream.pending:
            whole, at = text, i + 1
    return whole, at
