"""JSONL to samples: every line is checked before training, and decoded when its turn comes.

A line is `{"messages": [...]}` in the chat form, with media by path; for the Talker also `"codes"` (numbers, or a .npy)
and perhaps `"voice"`. Preferences have `"chosen"` and `"rejected"` replies (strings) instead of a last assistant turn,
and `"chosen_codes"` and `"rejected_codes"` for speech. Paths are relative to the file's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
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
from omni_jax.processing.media import local_path
from omni_jax.processing.processor import CONTROLS, Processor, Prompt, whole
from omni_jax.train.data.batch import IGNORED, Codes, Sample
from omni_jax.train.data.formats import Form, canonical
from omni_jax.train.data.lines import DataError, Lines

KEYS = {
    "thinker": ({"messages"}, {"codes", "voice", "tools"}),
    "ctc": ({"messages"}, {"codes", "voice", "tools"}),
    "talker": ({"messages", "codes"}, {"voice", "tools"}),
    "dpo": ({"messages", "chosen", "rejected"}, {"chosen_codes", "rejected_codes", "voice", "tools"}),
    "talker_dpo": ({"messages", "chosen", "rejected", "chosen_codes", "rejected_codes"}, {"voice", "tools"}),
    "token2wav": ({"codes", "mel"}, {"voice"}),
    "vocoder": ({"mel", "audio"}, set()),
}
_MESSAGE = {"role", "content", "loss", "weight", *chat.TOOL_KEYS}  # keys of a message
SHOWN = 5  # faulty lines that an error names
_TOGETHER = 256  # lines that are handed to the threads at a time


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with their media found, for each whether it is learned, and the tools that the model may call."""

    messages: tuple[chat.Message, ...]
    learned: tuple[bool, ...]
    tools: Any = None


def _learned(message: Mapping[str, Any], where: str) -> bool:
    """Whether an assistant's message is learned: its `loss` (true or false) or `weight` (0 or 1) may say no.

    Raises:
      DataError: another key than these, role and content, or another value.
    """
    if unknown := sorted(set(message) - _MESSAGE):
        raise DataError(f"{where} has {', '.join(unknown)}; known are {', '.join(sorted(_MESSAGE))}")
    loss, weight = message.get("loss", True), message.get("weight", 1)
    if not isinstance(loss, bool):
        raise DataError(f"{where}: loss is {loss!r}; give true or false")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: weight is {weight!r}; give 0 or 1")
    if message.get("role") != "assistant":
        if loss and weight and {"loss", "weight"} & set(message):
            raise DataError(
                f"{where} ({message.get('role')}) cannot be learned: only the assistant's are; leave it out"
            )
        return False
    return loss and bool(weight)


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
      form: of the records; see `formats`.
      spell: ask for the characters of the answers, in place of the tokenizer's pieces.
    """

    config: OmniConfig
    processor: Processor
    voices: Mapping[str, Voice]
    task: str
    folder: pathlib.Path
    sequence: int
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Form = "auto"
    spell: bool = False

    @property
    def talker(self) -> TalkerConfig:
        """The Talker's configuration. Raises DataError where the model has none."""
        if self.config.talker is None:
            raise DataError("this checkpoint has no Talker; train one that speaks, or leave codes out")
        return self.config.talker

    def check(self, record: dict[str, Any], *, answered: bool = False) -> None:
        """Raises InputError for a record that cannot be used; media are looked for, not decoded.

        Args:
          answered: an evaluation answers it: the last message must be a text of the assistant to compare with.
        """
        record = canonical(record, self.form)
        must, may = KEYS[self.task]
        keys = set(record) - {"name"}
        if missing := sorted(must - keys):
            codes = any(name.endswith("codes") for name in missing)
            why = (
                "; they must be supplied: `omni-jax encode` makes them where the checkpoint has a codec"
                if codes
                else ""
            )
            raise DataError(f"it lacks {', '.join(missing)}, which the task {self.task!r} needs{why}")
        if unknown := sorted(keys - must - may):
            raise DataError(f"it has {', '.join(unknown)}; known are {', '.join(sorted(must | may))}")
        for name in (k for k in record if k.endswith("codes")):
            self.codes(record[name], name)
        for conversation in self.conversations(record):
            self._check_conversation(conversation, answered)
        for name in ("mel", "audio"):
            if name in must and not (self.folder / str(record[name])).is_file():
                raise DataError(f"{name} {self.folder / str(record[name])} does not exist; correct the path")
        speaks = self.task not in ("thinker", "ctc", "dpo")
        if speaks and "voice" in record and record["voice"] not in self.voices:
            raise DataError(f"voice {record['voice']!r} is unknown; the checkpoint has {', '.join(self.voices)}")

    def _check_conversation(self, conversation: Conversation, answered: bool) -> None:
        messages = conversation.messages
        if not any(m.role == "assistant" for m in messages):
            raise DataError("no message is the assistant's, so there is nothing to learn; add its answer")
        if not any(conversation.learned) and self.task != "talker":
            raise DataError("loss or weight leaves no message to learn; take the line out")
        last = messages[-1]
        if last.role != "assistant" and (answered or self.task != "thinker"):
            why = (
                "that answers are compared with"
                if answered
                else "that is spoken"
                if self.speaks
                else "that is preferred"
            )
            raise DataError(f"the last message must be the assistant's: the one {why}")
        if answered and (len(messages) < 2 or any(p.kind != "text" for p in last.parts)):
            raise DataError("an answer to compare with must be a text of the assistant after what it answers")
        media = [p for m in messages for p in m.parts if p.kind != "text"]
        for part in media:
            for source in part.source if isinstance(part.source, list) else [part.source]:
                path = local_path(source)
                if path is not None and not path.is_file():
                    raise DataError(f"{part.kind} {path} does not exist; correct the path")
        if not media:
            self._fits(len(self.prompt(conversation).ids), "tokens")

    @property
    def speaks(self) -> bool:
        """Whether the task trains speech."""
        return self.task.startswith("talker")

    def conversations(self, record: dict[str, Any]) -> list[Conversation]:
        """The conversations of a record: one, two for preferences, none for Token2Wav. Raises InputError."""
        if "messages" not in KEYS[self.task][0]:
            return []
        record = canonical(record, self.form)
        messages = record["messages"]
        if "dpo" not in self.task:
            return [self._conversation(messages, record.get("tools"))]
        earlier = messages if isinstance(messages, list) else []
        if any(isinstance(m, dict) and {"loss", "weight"} & set(m) for m in earlier):
            raise DataError(
                "loss and weight have no place in preferences, which learn the last message; leave them out"
            )
        sides = [{"role": "assistant", "content": record[key]} for key in ("chosen", "rejected")]
        both = [self._conversation([*earlier, side], record.get("tools")) for side in sides]
        # Of a preference only the last reply counts.
        return [dataclasses.replace(c, learned=(*(False for _ in earlier), True)) for c in both]

    def _conversation(self, messages: Any, tools: Any) -> Conversation:
        parsed = chat.resolve(chat.parse_conversation(messages), self.folder)
        return Conversation(parsed, tuple(_learned(m, f"message {i}") for i, m in enumerate(messages)), tools)

    def prompt(self, conversation: Conversation, *, media: Mapping[str, Any] | None = None) -> Prompt:
        """The conversation as the model reads it, whole."""
        return self.processor(
            conversation.messages, add_generation_prompt=False, speech=self.speaks, tools=conversation.tools,
            **dict(media or {}),
        )  # fmt: skip

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

    def samples(self, record: dict[str, Any]) -> list[Sample]:
        """The samples of a record: one, or for preferences the chosen and the rejected one.

        Raises:
          InputError: media that cannot be decoded, or more places than a row has; the message names the line.
        """
        try:
            record = canonical(record, self.form)
            codes: Sequence[Any] = [record.get("codes")]
            if "dpo" in self.task:
                codes = [record.get("chosen_codes"), record.get("rejected_codes")]
            both = zip(self.conversations(record), codes, strict=True)
            return [self._sample(c, given if self.speaks else None, record) for c, given in both]
        except InputError as e:
            raise DataError(f"{record['name']}: {e}") from None

    def _sample(self, conversation: Conversation, codes: Any, record: Mapping[str, Any]) -> Sample:
        prompt = self.prompt(conversation, media=self.media)
        self._fits(len(prompt.ids), "tokens")
        turns = assistant_turns(prompt.ids, self.processor)
        learned = [given for m, given in zip(conversation.messages, conversation.learned) if m.role == "assistant"]
        if len(turns) != len(learned):
            raise DataError(
                f"the chat template wrote {len(turns)} turns for {len(learned)} messages of the assistant; use the "
                "checkpoint's own template"
            )
        labels = np.full(len(prompt.ids), IGNORED, np.int32)
        for begin, end in (turn for turn, wanted in zip(turns, learned) if wanted):
            labels[begin - 1 : end] = prompt.ids[begin : end + 1]  # the ending mark included
        # A medium that the assistant shows is none of its words.
        labels[np.isin(labels, self._media_ids)] = IGNORED
        ids, positions = prompt.ids, prompt.positions
        if self.spell:
            ids, positions, labels = self._spelled(ids, positions, labels)
            self._fits(len(ids), "tokens and characters")
        spoken = None
        if codes is not None:
            spoken = self._codes(prompt, turns[-1], self.codes(codes), record.get("voice"))
            self._fits(len(spoken.labels), "codes and prompt tokens of the Talker")
        seen = (*((p.pixels, p.grid) for p in prompt.images), *((whole(c.pixels), c.grid) for c in prompt.videos))
        audios = tuple(map(whole, prompt.audios))
        return Sample(str(record["name"]), ids, positions, labels, seen, len(prompt.images), audios, spoken)

    @functools.cached_property
    def _media_ids(self) -> np.ndarray:
        """The ids of media's places and of their beginnings and ends."""
        return np.array([getattr(self.config.thinker, f"{name}_token_id") for name in CONTROLS])

    def _spelled(self, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens, positions and labels with the answers' characters, each in its own tokens, and the last label behind
        the others; they alone are asked."""
        tokenizer, asked = self.processor.tokenizer, labels[labels != IGNORED]
        characters = [i for c in tokenizer.decode(asked) for i in tokenizer.encode(c)]
        tail = np.array([*characters, *asked[-1:]], np.int32)
        places = positions[:, -1:] + 1 + np.arange(len(tail), dtype=np.int32)
        # A label is the id that follows.
        spelled = np.concatenate([np.full(len(ids) - 1, IGNORED, np.int32), tail, [IGNORED]]).astype(np.int32)
        return np.concatenate([ids, tail]), np.concatenate([positions, places], axis=1), spelled

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


def _problem(
    lines: Lines, reader: Reader, decode: Callable[[int, dict[str, Any]], object] | None, answered: int, index: int
) -> str | None:
    """What is wrong with a line: "train.jsonl line 512: …"."""
    try:
        record = lines[index]
    except DataError as e:
        return str(e)
    try:
        reader.check(record, answered=index < answered)
    except InputError as e:
        return f"{record['name']}: {e}"
    try:
        if decode is not None:
            decode(index, record)
    except DataError as e:
        return str(e)
    return None


def check_lines(
    lines: Lines, reader: Reader, *, decode: Callable[[int, dict[str, Any]], object] | None = None, threads: int = 1,
    show: bool = False, answered: int = 0,
) -> list[str]:  # fmt: skip
    """Checks every line before training.

    Args:
      decode: what makes the samples of a record by its index, so that none can fail later; called in so many threads.
      show: a bar on stderr, where that is a terminal.
      answered: so many records, from the first, are answered in evaluations.
    Returns:
      what is wrong with each faulty line.
    """
    console = Console(stderr=True)
    found: list[str] = []
    check = functools.partial(_problem, lines, reader, decode, answered)
    with ThreadPoolExecutor(threads if decode else 1) as pool:
        starts = track(
            range(0, len(lines), _TOGETHER), f"checking {lines.path.name}", console=console, transient=True,
            disable=not (show and console.is_terminal),
        )  # fmt: skip
        for start in starts:
            told = pool.map(check, range(start, min(start + _TOGETHER, len(lines))))
            found += [line for line in told if line is not None]
    return found
