"""JSONL to samples: every line is checked before training, and decoded when its turn comes.

A line is `{"messages": [...]}` in the chat form, with media by path; for the Talker also `"codes"` (numbers, or a .npy)
and perhaps `"voice"`. Preferences have `"chosen"` and `"rejected"` replies (strings) instead of a last assistant turn,
and `"chosen_codes"` and `"rejected_codes"` for speech. Paths are relative to the file's folder.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.errors import InputError
from omni_jax.model.voice import Voice
from omni_jax.processing import chat
from omni_jax.processing.processor import Processor, Prompt, whole
from omni_jax.train.data.batch import IGNORED, Codes, Sample

KEYS = {
    "thinker": ({"messages"}, {"codes", "voice"}),
    "talker": ({"messages", "codes"}, {"voice"}),
    "dpo": ({"messages", "chosen", "rejected"}, {"chosen_codes", "rejected_codes", "voice"}),
    "talker_dpo": ({"messages", "chosen", "rejected", "chosen_codes", "rejected_codes"}, {"voice"}),
    "token2wav": ({"codes", "mel"}, {"voice"}),
    "vocoder": ({"mel", "audio"}, set()),
}
_SHOWN = 5  # faulty lines that an error names
_TOGETHER = 256  # lines that are handed to the threads at a time


class DataError(InputError):
    """A training file or a line of it that cannot be used; the message names the line and the remedy."""


class Lines:
    """A JSONL file by line number, without holding it in memory. Empty lines do not count.

    Attributes:
      path: the file.
      numbers: int64, of each record, from 1, as an editor shows them.
      digest: of the file's bytes.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        digest, numbers, places, at = hashlib.sha256(), array("q"), array("q"), 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        numbers.append(number)
                        places.extend((at, len(line)))
                    at += len(line)
        except OSError as e:
            raise DataError(f"{self.path} cannot be read ({e.strerror}); give a JSONL file") from None
        self.digest = digest.hexdigest()
        self.numbers, self._places = np.array(numbers, np.int64), np.array(places, np.int64).reshape(-1, 2)
        if not numbers:
            raise DataError(f"{self.path} is empty; give it one JSON object a line")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record, with its `name`. Raises DataError for a line that is no JSON object."""
        start, size = self._places[index]
        with open(self.path, "rb") as file:
            line = os.pread(file.fileno(), int(size), int(start))
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise DataError(f"{self.name(index)} is not JSON ({e}); write one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{self.name(index)} is {type(record).__name__}; write one JSON object a line")
        return record | {"name": self.name(index)}

    def name(self, index: int) -> str:
        """File and line, for messages."""
        return f"{self.path.name} line {self.numbers[index]}"


def _resolved(messages: Any, folder: pathlib.Path) -> Any:
    """The messages with relative media paths made absolute."""
    messages = copy.deepcopy(messages)
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for item in content if isinstance(content, list) else []:
            if isinstance(item, dict):
                for key in ("image", "audio", "video", "path", "url"):
                    if isinstance(item.get(key), str) and ":" not in item[key][:10]:
                        item[key] = str(folder / item[key])
    return messages


def _replied(messages: Any, reply: Any) -> Any:
    return [*messages, {"role": "assistant", "content": reply}] if isinstance(messages, list) else messages


@dataclasses.dataclass(frozen=True)
class Reader:
    """Records to samples, for one checkpoint and one task.

    Attributes:
      config: of the model.
      processor: of the checkpoint.
      voices: by name, for the Talker.
      task: see `config.Task`.
      folder: that relative paths begin in.
      sequence: most places of a sample.
      media: defaults of media items.
    """

    config: OmniConfig
    processor: Processor
    voices: Mapping[str, Voice]
    task: str
    folder: pathlib.Path
    sequence: int
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def talker(self) -> TalkerConfig:
        """The Talker's configuration. Raises DataError where the model has none."""
        if self.config.talker is None:
            raise DataError("this checkpoint has no Talker; train one that speaks, or leave codes out")
        return self.config.talker

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises InputError for a record that cannot be used; media are looked for, not decoded."""
        must, may = KEYS[self.task]
        keys = set(record) - {"name"}
        if missing := sorted(must - keys):
            codes = any(name.endswith("codes") for name in missing)
            why = "; they must be supplied: nothing makes codes of a recording (docs/training.md)" if codes else ""
            raise DataError(f"it lacks {', '.join(missing)}, which the task {self.task!r} needs{why}")
        if unknown := sorted(keys - must - may):
            raise DataError(f"it has {', '.join(unknown)}; known are {', '.join(sorted(must | may))}")
        for name in (k for k in record if k.endswith("codes")):
            self.codes(record[name], name)
        for conversation in self.conversations(record):
            parsed = chat.parse_conversation(conversation)
            if not any(m.role == "assistant" for m in parsed):
                raise DataError("no message is the assistant's, so there is nothing to learn; add its answer")
            if self.task != "thinker" and parsed[-1].role != "assistant":
                raise DataError("the last message must be the assistant's: the one that is spoken")
            parts = [p for m in parsed for p in m.parts if p.kind != "text"]
            for part in parts:
                if isinstance(part.source, str) and ":" not in part.source[:10] and not os.path.isfile(part.source):
                    raise DataError(f"{part.kind} {part.source} does not exist; correct the path")
            if not parts:
                self._fits(len(self.processor(conversation, add_generation_prompt=False).ids), "tokens")
        for name in ("mel", "audio"):
            if name in must and not (self.folder / str(record[name])).is_file():
                raise DataError(f"{name} {self.folder / str(record[name])} does not exist; correct the path")
        speaks = self.task not in ("thinker", "dpo")
        if speaks and "voice" in record and record["voice"] not in self.voices:
            raise DataError(f"voice {record['voice']!r} is unknown; the checkpoint has {', '.join(self.voices)}")

    def conversations(self, record: Mapping[str, Any]) -> list[Any]:
        """The conversations of a record: one, two for preferences, none for Token2Wav."""
        if "messages" not in KEYS[self.task][0]:
            return []
        messages = _resolved(record["messages"], self.folder)
        if "dpo" not in self.task:
            return [messages]
        return [_replied(messages, record[k]) for k in ("chosen", "rejected")]

    def codes(self, given: Any, what: str = "codes") -> np.ndarray:
        """Codes of a list or of a .npy, checked. Raises DataError for one outside the codec's table."""
        if isinstance(given, str):
            try:
                given = np.load(self.folder / given, allow_pickle=False)
            except (OSError, ValueError, EOFError) as e:
                raise DataError(f"{what} {given} cannot be read as .npy ({' '.join(str(e).split())})") from None
        codes = np.asarray(given)
        if codes.ndim != 1 or not codes.size or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"{what} must be one row of whole numbers, or the path of such a .npy")
        if self.config.token2wav is None:
            raise DataError("this checkpoint has no Token2Wav, so its codes have no table; train one that speaks")
        size = self.config.token2wav.dit.num_embeds + 1
        wrong = np.flatnonzero((codes < 0) | (codes >= size))
        if wrong.size:
            place = int(wrong[0])
            raise DataError(f"{what}: code {codes[place]} at place {place} is outside the table of {size} codes")
        return codes.astype(np.int32)

    def _fits(self, size: int, what: str) -> None:
        if size > self.sequence:
            raise DataError(
                f"it has {size} {what}, more than data.sequence {self.sequence}; shorten it, raise data.sequence, or "
                "lower data.media's max_pixels, fps or max_frames"
            )

    def samples(self, record: Mapping[str, Any]) -> list[Sample]:
        """The samples of a record: one, or for preferences the chosen and the rejected one.

        Raises:
          InputError: media that cannot be decoded, or more places than a row has; the message names the line.
        """
        try:
            codes: Sequence[Any] = [record.get("codes")]
            if "dpo" in self.task:
                codes = [record.get("chosen_codes"), record.get("rejected_codes")]
            speaks = self.task.startswith("talker")
            both = zip(self.conversations(record), codes, strict=True)
            return [self._sample(c, given if speaks else None, record) for c, given in both]
        except InputError as e:
            raise DataError(f"{record['name']}: {e}") from None

    def _sample(self, conversation: Any, codes: Any, record: Mapping[str, Any]) -> Sample:
        prompt = self.processor(conversation, add_generation_prompt=False, **dict(self.media))
        self._fits(len(prompt.ids), "tokens")
        turns = assistant_turns(prompt.ids, self.processor)
        if "dpo" in self.task:
            turns = turns[-1:]
        labels = np.full(len(prompt.ids), IGNORED, np.int32)
        for begin, end in turns:
            labels[begin - 1 : end] = prompt.ids[begin : end + 1]  # the ending mark included
        spoken = None
        if codes is not None:
            spoken = self._codes(prompt, turns[-1], self.codes(codes), record.get("voice"))
            self._fits(len(spoken.labels), "codes and prompt tokens of the Talker")
        seen = (*((p.pixels, p.grid) for p in prompt.images), *((whole(c.pixels), c.grid) for c in prompt.videos))
        audios = tuple(map(whole, prompt.audios))
        return Sample(
            str(record["name"]), prompt.ids, prompt.positions, labels, seen, len(prompt.images), audios, spoken
        )

    def _codes(self, prompt: Prompt, turn: tuple[int, int], codes: np.ndarray, voice: Any) -> Codes:
        """What the Talker reads place by place; see `talker.prompt_vectors`, `opening_vectors` and `step_vectors`."""
        from omni_jax.checkpoint.speakers import pick_voice

        cfg, (begin, end), size = self.talker, turn, len(codes)
        if begin == end:
            raise DataError("the spoken reply has no text; give the words of the codes")
        source = np.full(begin + 2 + size, IGNORED, np.int32)
        text, codec, labels = source.copy(), source.copy(), source.copy()
        source[:begin] = np.arange(begin)
        text[begin] = pick_voice(self.voices, voice).bos_token
        codec[begin], codec[begin + 1] = cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id
        codec[begin + 2 :], labels[begin + 1 : -1], labels[-1] = codes, codes, cfg.tts_codec_end_token_id
        heard = begin + np.arange(1 + size)  # the reply's vectors, from its first, at these places of the prompt
        source[begin + 1 :] = np.where(heard < end, heard, IGNORED)
        text[begin + 1 :][heard == end] = cfg.tts_text_end_token_id
        text[begin + 1 :][heard > end] = cfg.tts_text_pad_token_id
        before = prompt.positions[:, :begin]
        after = int(before[:, -1].max()) + np.arange(1, 3)
        first = max(int(before.max()) + 1, int(after[-1]) + 1)
        count = np.concatenate([after, first + np.arange(size)])
        positions = np.concatenate([before, np.broadcast_to(count, (3, len(count)))], axis=1)
        return Codes(source, text, codec, labels, positions.astype(np.int32))


def assistant_turns(ids: np.ndarray, processor: Processor) -> list[tuple[int, int]]:
    """Where the assistant speaks: [begin, end) of the text of each turn; `end` is the place of its ending mark.

    Raises:
      DataError: a turn that does not begin as a generated one would.
    """
    tokenizer = processor.tokenizer
    opening, closing = tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")
    header = np.array(tokenizer.encode("assistant\n"))
    role = header[:-1]
    ends = np.flatnonzero(ids == closing)
    turns = []
    for start in np.flatnonzero(ids == opening):
        begin = start + 1 + len(header)
        if not np.array_equal(ids[start + 1 : begin], header):
            if np.array_equal(ids[start + 1 : start + 1 + len(role)], role):
                raise DataError("an assistant's turn begins with white space; remove it")
            continue
        later = ends[ends >= begin]
        if not later.size:
            raise DataError("the chat template does not end the assistant's turn; use the checkpoint's own template")
        turns.append((int(begin), int(later[0])))
    if not turns:
        raise DataError("no turn of the assistant was found; use the checkpoint's own template")
    return turns


def _problem(lines: Lines, reader: Reader, decode: Callable[[dict[str, Any]], object] | None, index: int) -> str | None:
    """What is wrong with a line: "train.jsonl line 512: …"."""
    try:
        record = lines[index]
    except DataError as e:
        return str(e)
    try:
        reader.check(record)
    except InputError as e:
        return f"{record['name']}: {e}"
    try:
        if decode is not None:
            decode(record)
    except DataError as e:
        return str(e)
    return None


def check_lines(
    lines: Lines, reader: Reader, *, decode: Callable[[dict[str, Any]], object] | None = None, threads: int = 1,
    show: bool = False,
) -> None:  # fmt: skip
    """Checks every line before training.

    Args:
      decode: what makes the samples of a record, so that none can fail later; called in so many threads.
      show: a bar on stderr, where that is a terminal.
    Raises:
      DataError: one line that names the first faulty lines and counts the others.
    """
    console = Console(stderr=True)
    found: list[str] = []
    check = functools.partial(_problem, lines, reader, decode)
    with ThreadPoolExecutor(threads if decode else 1) as pool:
        starts = track(
            range(0, len(lines), _TOGETHER), f"checking {lines.path.name}", console=console, transient=True,
            disable=not (show and console.is_terminal),
        )  # fmt: skip
        for start in starts:
            told = pool.map(check, range(start, min(start + _TOGETHER, len(lines))))
            found += [line for line in told if line is not None]
    if found:
        more = f" (and {len(found) - _SHOWN} more lines)" if len(found) > _SHOWN else ""
        raise DataError("; ".join(found[:_SHOWN]) + more)
