"""A conversation to everything that the model reads: token ids, positions, patches, mel frames."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.config import ConfigError, OmniConfig, ThinkerConfig
from omni_jax.errors import InputError, warn
from omni_jax.files import read_json
from omni_jax.processing import audio, chat, images, options
from omni_jax.processing import fit as fitting
from omni_jax.processing import positions as P
from omni_jax.processing.audio import MelConfig, TimeRange, load_audio, log_mel, mel_config
from omni_jax.processing.images import ImageConfig, Patches, image_config, image_patches
from omni_jax.processing.media import ANYTHING, Access, MediaError, TooManyTokens, describe, hold
from omni_jax.processing.tokenizer import Tokenizer
from omni_jax.processing.video import Video, load_video
from omni_jax.processing.video_sampling import Sampling
from omni_jax.settings import MediaSettings

MAX_POSITION = 1 << 30  # position ids are int32
CONTROLS = ("audio", "image", "video", "audio_start", "audio_end", "vision_start", "vision_end")


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        raw = read_json(file, ConfigError)
    except FileNotFoundError:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold a JSON object; fetch it again")
    return raw


def stop_token_ids(path: pathlib.Path, cfg: OmniConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a reply: of generation_config.json, else of the config, else of the tokenizer.

    Raises:
      ConfigError: none of them names one.
    """
    file = path / "generation_config.json"
    raw = _read_object(file).get("eos_token_id")
    if raw is not None:
        ids = raw if isinstance(raw, list) else [raw]
        if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ConfigError(f"{file}: eos_token_id is {raw!r}, no id or list of ids; fetch the file again")
        return tuple(ids)
    if cfg.thinker.eos_token_id:
        return cfg.thinker.eos_token_id
    token = _read_object(path / "tokenizer_config.json").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise ConfigError(f"{path} names no end of a reply; add eos_token_id to its generation_config.json")
    return (tokenizer.id(name),)


class PromptError(InputError):
    """A prompt that the model cannot read; the message gives the numbers and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as arrays.

    Attributes:
      text: what the chat template wrote.
      ids: int32 [T].
      positions: int32 [3, T], TMRoPE.
      images, videos: in the order of their tokens in `ids`.
      audios: float32 [L, M] log-mel each, in the order of their tokens, or the chunks of it as they came in; a clip's
        sound takes its place among them.
      segments: the layout that ids and positions come from.
    """

    text: str
    ids: np.ndarray
    positions: np.ndarray
    images: tuple[Patches, ...]
    videos: tuple[Video, ...]
    audios: tuple[np.ndarray | tuple[np.ndarray, ...], ...]
    segments: tuple[P.Segment, ...]


def whole(parts: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """An array that may have come in parts."""
    return np.concatenate(parts) if isinstance(parts, tuple) else parts


def media_defaults(media: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of media items by name, of what a caller gave: None, MediaSettings or a mapping; and more by name.

    Raises:
      InputError: a name that processing.options does not know, or a value that does not fit.
    """
    if isinstance(media, MediaSettings):
        media = media.given()
    if media is not None and not isinstance(media, Mapping):
        raise InputError(f'media is {type(media).__name__}; give MediaSettings, or a dictionary such as {{"fps": 1.0}}')
    given = {name: value for name, value in {**(media or {}), **more}.items() if value is not None}
    for name, value in given.items():
        options.check_option(name, value, "media")
    return {"use_audio_in_video": False} | given


def _options(part: chat.Part, defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that hold for a medium: its own, and those defaults that its kind knows."""
    known = {name: value for name, value in defaults.items() if name in options.names(part.kind)}
    return options.merge_options(known, part.options)


def asked_by(messages: Any, media: Any = None) -> tuple[bool, bool]:
    """Whether the last turn of the user has text, and whether it has audio: a clip's sound counts where it is used.

    Args:
      messages: see `chat.parse_conversation`, whose errors this raises.
      media: defaults of media items, as for `Processor`.
    """
    defaults = media_defaults(media, {})
    turns = [m.parts for m in chat.parse_conversation(messages) if m.role == "user"]
    parts = turns[-1] if turns else ()
    heard = [p for p in parts if p.kind == "audio" or _options(p, defaults).get("use_audio_in_video")]
    return any(p.kind == "text" and p.source for p in parts), bool(heard)


def check_context(prompt: Prompt, context: int) -> None:
    """Raises PromptError where a prompt leaves no room for a reply in a context of so many tokens."""
    if len(prompt.ids) >= context:
        raise PromptError(
            f"the prompt has {len(prompt.ids)} tokens and leaves no room for a reply in the context of {context}; "
            "shorten it, or lower max_pixels, fps or max_frames"
        )


@dataclass(frozen=True, eq=False)
class Medium:
    """One medium of a conversation, read: its segment and its arrays. It may stand as a source in messages.

    Attributes:
      segment: its place in the layout of a prompt.
      image, video: of the vision tower; audio: log-mel [L, M], or that of each chunk as it came in.
      item: of a message, that it was read from; None for what came in live.
    """

    segment: P.Image | P.Audio | P.Video | P.AudioVideo
    image: Patches | None = None
    video: Video | None = None
    audio: np.ndarray | tuple[np.ndarray, ...] | None = None
    item: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Processor:
    """Conversation → `Prompt`, for one checkpoint."""

    cfg: ThinkerConfig
    tokenizer: Tokenizer
    template: str
    image: ImageConfig = images.PUBLISHED
    mel: MelConfig = audio.PUBLISHED

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, cfg: ThinkerConfig) -> Processor:
        """Reads the tokenizer, the chat template and `preprocessor_config.json` of a checkpoint.

        Raises:
          TokenizerError, ConversationError, MediaError: a broken file.
          ConfigError: files that contradict config.json.
        """
        path = pathlib.Path(path)
        file = path / "preprocessor_config.json"
        raw = _read_object(file)
        vision = cfg.vision
        mine = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "feature_size": cfg.audio.num_mel_bins,
        }
        for name, value in mine.items():
            if raw.get(name, value) != value:
                raise ConfigError(f"{file}: {name} is {raw[name]}, but config.json has {value}; fetch both again")
        mel = dataclasses.replace(mel_config(raw, file), bins=cfg.audio.num_mel_bins)
        tokenizer = Tokenizer.from_folder(path, [getattr(cfg, f"{name}_token_id") for name in CONTROLS])
        return cls(cfg, tokenizer, chat.read_template(path), image_config(raw, file), mel)

    def __post_init__(self) -> None:
        cfg = self.cfg
        for name in CONTROLS:
            token = getattr(cfg, f"{name}_token_id")
            if token not in self.tokenizer.controls.values():
                raise ConfigError(
                    f"config.json has {name}_token_id {token}, which is {self.tokenizer.name(token)!r} in the "
                    "tokenizer and no special token; fetch the checkpoint's files again"
                )

    def __call__(
        self,
        messages: Any,
        media: MediaSettings | Mapping[str, Any] | None = None,
        *,
        speech: bool = False,
        tools: Any = None,
        context: int | None = None,
        add_generation_prompt: bool = True,
        access: Access = ANYTHING,
        **given: Any,
    ) -> Prompt:
        """Reads a conversation and its media.

        Names of special tokens in the conversation's text are plain characters: they can neither end a turn nor
        stand for a medium. (The reference reads them as tokens.)

        Args:
          messages: see `chat.parse_conversation`.
          media: how media are read where items do not say: `MediaSettings`, or options of processing.options by name.
          speech: the reply is to be spoken, or speech is trained; see `chat.with_system_message`.
          tools: that the model may call; see `chat.render`.
          context: tokens that the model's context holds; None checks no length.
          add_generation_prompt: end with the opening of the assistant's turn.
          access: what sources may be opened.
          **given: the same by name, as a short form.
        Raises:
          ConversationError: a conversation that cannot be read, or a template that does not fit it.
          MediaError: a medium that cannot be read.
          InputError: an unknown option or one out of range, or a prompt that leaves no room in the context; the message
            says what each medium costs and which settings would fit. The option `fit` has them chosen.
        """
        defaults = media_defaults(media, given)
        fit = defaults.pop("fit", False)
        if defaults.pop("private_urls", False):
            access = dataclasses.replace(access, private_urls=True)
        conversation = chat.with_system_message(chat.parse_conversation(messages), speech=speech)
        text, mark = chat.render(
            conversation, self.template, tools=tools, add_generation_prompt=add_generation_prompt,
            controls=self.tokenizer.controls,
        )  # fmt: skip
        parts = [p for m in conversation for p in m.parts if p.kind != "text"]
        runs = self._split(text, mark, [p.kind for p in parts])
        chosen = [_options(p, defaults) for p in parts]
        limit = self.cfg.text.max_position_embeddings if context is None else context
        words = sum(map(len, runs))
        if fit:
            parts = [dataclasses.replace(p, source=hold(p.source, access)) for p in parts]
            chosen = self._fit(parts, chosen, fitting.prompt_room(limit) - words, access)
        try:
            alone = sum(p.kind == "video" for p in parts) == 1
            read = [self._read(p, c, access, alone) for p, c in zip(parts, chosen, strict=True)]
            prompt = self._assemble(text.replace(mark, ""), runs, read)
            if context is not None:
                check_context(prompt, context)
        except (TooManyTokens, PromptError) as e:
            raise self._explained(e, parts, chosen, words, limit, access) from None
        return prompt

    def _costs(
        self, parts: Sequence[chat.Part], chosen: Sequence[dict[str, Any]], access: Access
    ) -> list[fitting.Cost]:
        """What each medium costs. Raises MediaError where one cannot be read."""
        return [
            fitting.Cost(f"{p.kind} that was read before", p.kind, len(P.media_ids(p.source.segment, self.cfg)))
            if isinstance(p.source, Medium)
            else fitting.measure(p.kind, p.source, c, self._sound_tokens(p, c, access), self.cfg, self.image, access)
            for p, c in zip(parts, chosen, strict=True)
        ]

    def _sound_tokens(self, part: chat.Part, chosen: dict[str, Any], access: Access) -> int:
        if part.kind == "audio":
            return self._tokens(self._mel(part, chosen, access), part)
        if part.kind == "image" or not chosen.get("use_audio_in_video") or isinstance(part.source, list | tuple):
            return 0
        wanted = TimeRange(chosen.get("video_start"), chosen.get("video_end"), self._most_seconds)
        try:
            samples = load_audio(part.source, self.mel.rate, wanted, access=access)
        except MediaError:  # no sound, of which reading says more
            return 0
        return self.cfg.audio.token_count(-(-len(samples) // self.mel.hop)) + 2  # and the marks round them

    def _fit(
        self, parts: Sequence[chat.Part], chosen: Sequence[dict[str, Any]], room: int, access: Access
    ) -> list[dict[str, Any]]:
        """The options with which the media fit, and an InputWarning of those that changed. Where none do, the options
        stay: reading them says why."""
        costs = self._costs(parts, chosen, access)
        lowered = fitting.lower(costs, room, self.cfg)
        if lowered is None:
            return list(chosen)
        for cost, change in zip(costs, lowered, strict=True):
            if change:
                said = " and ".join(f"{name} {value}" for name, value in change.items())
                warn(f"{cost}, too much for the context; fit chose {said}")
        return [c | change for c, change in zip(chosen, lowered, strict=True)]

    def _explained(
        self, error: InputError, parts: Sequence[chat.Part], chosen: Sequence[dict[str, Any]], words: int, limit: int,
        access: Access,
    ) -> InputError:  # fmt: skip
        """The error of a prompt that is too long, with what each medium costs and which settings would fit."""
        if not parts:
            return error
        try:
            costs = self._costs(parts, chosen, access)
        except InputError:
            return error
        total = words + sum(c.tokens + c.fixed for c in costs)
        lowered = fitting.lower(costs, fitting.prompt_room(limit) - words, self.cfg)
        if lowered is not None and not any(lowered):
            return error
        return PromptError(
            f"the prompt has {total} tokens and leaves no room for a reply in the context of {limit}: text takes "
            f"{words}, {', '.join(map(str, costs))}; {fitting.advice(costs, lowered)}"
        )

    def read_item(self, item: Mapping[str, Any], media: MediaSettings | Mapping[str, Any] | None = None) -> Medium:
        """Reads one medium of a message, once for all prompts that it will stand in. Arguments and errors as for the
        whole conversation."""
        [part] = chat.parse_conversation([{"role": "user", "content": [item]}])[0].parts
        if part.kind == "text":
            raise InputError(f"a {part.kind} item is no medium; give an image, audio or a video")
        chosen = _options(part, media_defaults(media, {}))
        return dataclasses.replace(self._read(part, chosen, ANYTHING, alone=True), item=item)

    def _assemble(self, text: str, runs: Sequence[Sequence[int]], media: Sequence[Medium]) -> Prompt:
        """Runs of text with media between them as one prompt."""
        ids: list[np.ndarray] = []
        segments: list[P.Segment] = []
        for i, run in enumerate(runs):
            if run:
                segments.append(P.Text(len(run)))
                ids.append(np.asarray(run, np.int32))
            if i < len(media):
                segments.append(media[i].segment)
                ids.append(P.media_ids(media[i].segment, self.cfg))
        if not ids:
            raise chat.ConversationError("the chat template wrote nothing; use the checkpoint's own template")
        return Prompt(
            text,
            np.concatenate(ids),
            P.position_ids(segments, self.cfg),
            tuple(m.image for m in media if m.image is not None),
            tuple(m.video for m in media if m.video is not None),
            tuple(m.audio for m in media if m.audio is not None),
            tuple(segments),
        )

    def _split(self, text: str, mark: str, kinds: Sequence[str]) -> list[list[int]]:
        """Ids of the text between the media's placeholders, one run more than media.

        Raises:
          ConversationError: the template wrote other placeholders than the conversation has media.
        """
        cfg, names = self.cfg, {i: n for n, i in self.tokenizer.controls.items()}
        framed = {
            "image": (cfg.vision_start_token_id, cfg.image_token_id, cfg.vision_end_token_id),
            "video": (cfg.vision_start_token_id, cfg.video_token_id, cfg.vision_end_token_id),
            "audio": (cfg.audio_start_token_id, cfg.audio_token_id, cfg.audio_end_token_id),
        }
        runs: list[list[int]] = []
        for kind in kinds:
            placeholder = "".join(names[i] for i in framed[kind])
            before, found, text = text.partition(placeholder)
            if not found:
                raise chat.ConversationError(
                    f"the chat template wrote no {placeholder} for {kind} {len(runs)} of the conversation; "
                    "use the checkpoint's own template"
                )
            runs.append(self.tokenizer.encode(before, controls=True, mark=mark))
        runs.append(self.tokenizer.encode(text, controls=True, mark=mark))
        reserved = {i for three in framed.values() for i in three}
        if stray := reserved.intersection(i for run in runs for i in run):
            strays = ", ".join(sorted(names[i] for i in stray))
            raise chat.ConversationError(
                f"the chat template wrote {strays} beside the conversation's media; use the checkpoint's own template"
            )
        return runs

    def _read(self, part: chat.Part, chosen: dict[str, Any], access: Access, alone: bool) -> Medium:
        """Reads a medium. `alone`: it is the only clip, which must have sound where the sound of clips is asked for."""
        if isinstance(part.source, Medium):
            return part.source
        if part.kind == "image":
            patches = image_patches(
                part.source, self.cfg.vision, self.image,
                most_tokens=self.cfg.text.max_position_embeddings, access=access, **chosen,
            )  # fmt: skip
            return Medium(P.Image(patches.grid), image=patches)
        if part.kind == "audio":
            mel = self._mel(part, chosen, access)
            return Medium(P.Audio(self._tokens(mel, part)), audio=mel)
        sampling = Sampling.from_options(chosen, self.cfg.text.max_position_embeddings)
        clip, track = load_video(
            part.source, self.cfg.vision, self.image, sampling,
            with_audio=chosen.get("use_audio_in_video", False),
            silent=not alone and "use_audio_in_video" not in part.options, audio_rate=self.mel.rate,
            most_seconds=self._most_seconds, access=access,
        )  # fmt: skip
        seconds = clip.seconds_per_grid * clip.grid[0]
        if seconds * self.cfg.position_id_per_seconds >= MAX_POSITION:
            name = describe(part.source)
            raise MediaError(f"{name} lasts {seconds:.3g} s at its fps, beyond all position ids; give a larger fps")
        if track is None:
            return Medium(P.Video(clip.grid, clip.seconds_per_grid), video=clip)
        mel = log_mel(track, self.mel, f"the sound track of {describe(part.source)}")
        segment = P.AudioVideo(clip.grid, clip.seconds_per_grid, self._tokens(mel, part))
        return Medium(segment, video=clip, audio=mel)

    @property
    def _most_seconds(self) -> float:
        """The longest sound of which the context could hold the tokens: 22 minutes of the published models."""
        return self.cfg.text.max_position_embeddings / self.cfg.position_id_per_seconds

    def _mel(self, part: chat.Part, chosen: dict[str, Any], access: Access) -> np.ndarray:
        wanted = TimeRange(chosen.get("audio_start"), chosen.get("audio_end"), self._most_seconds)
        samples = load_audio(part.source, self.mel.rate, wanted, access=access, strict=chosen.get("strict", False))
        return log_mel(samples, self.mel, describe(part.source))

    def _tokens(self, mel: np.ndarray, part: chat.Part) -> int:
        tokens = self.cfg.audio.token_count(len(mel))
        if tokens < 1:
            raise MediaError(f"{describe(part.source)} is too short to become a token; give a longer sound")
        return tokens
