"""`omni-jax chat`: a conversation in the terminal, or with a program that writes lines."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from omni_jax.cli import players
from omni_jax.cli.flags import Flags
from omni_jax.cli.generate import load_model
from omni_jax.cli.speaking import speech_of
from omni_jax.errors import InputError, unknown_name
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event, TextEvent, TrimEvent, TurnEvent
from omni_jax.settings import (
    GenerationSettings,
    MediaSettings,
    ModelSettings,
    OutputMode,
    SpeechSettings,
    WhenFull,
    check,
    option,
)

# Seconds between two looks at the player and the microphone while there is nothing to compute.
IDLE = 0.02
SPEECH_DIR = "speech"


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is held."""

    output: OutputMode = option(
        "auto", "How turns are answered. auto: typed text in text, speech in speech, a mixture in both."
    )
    speech_dir: str | None = option(
        None, f"Folder for spoken replies. Default: the loudspeaker; {SPEECH_DIR} where there is none."
    )
    system: str | None = option(None, "System message. Default: the one that speech needs, else the chat template's.")
    context: int | None = option(
        None, "Tokens of the conversation that are kept; older media and turns are given up. Default: 8192.", (64, None)
    )
    when_full: WhenFull = option(
        "drop",
        "What becomes of older media and turns. transcribe: what is said in media stays as text. refuse: an error.",
    )
    no_watchdog: bool = option(False, "Do not cut off speech that loops, falls silent or outgrows its text.")

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


class Interrupts:
    """While it is entered, Ctrl-C is noted and not raised: an exception in the middle of a round of the engine would
    leave its slots half-way."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self._asked = True

    def take(self) -> bool:
        """Whether Ctrl-C was pressed since the last call."""
        asked, self._asked = self._asked, False
        return asked


class Chat:
    """A conversation whose turns are lines: text, or commands that begin with a slash.

    Attributes:
      begin: makes a new session.
      session: the conversation.
      player: where speech goes.
      output: how turns are answered.
    """

    def __init__(
        self, model: Any, begin: Callable[[], Any], media: MediaSettings, output: OutputMode, player: players.Player,
        notes: Any, open_microphone: Callable[[], players.Microphone] = players.open_microphone,
    ):  # fmt: skip
        """`notes`: a rich console for everything but the replies' text."""
        self.begin, self.player, self.output = begin, player, output
        self._model, self._media, self._notes, self._open_microphone = model, media, notes, open_microphone
        self.session = begin()
        self._set_output(output)
        self._added = False  # something that no text has followed yet
        self._shown = False  # text of the reply, without the end of its line

    def run(self, lines: Iterable[str], *, answer_rest: bool) -> None:
        """Takes lines until they end or one says /quit.

        Args:
          answer_rest: at the end, answer files that no text has followed.
        """
        try:
            for line in lines:
                if not self._attempt(lambda line=line: self.take(line)):  # type: ignore[misc]
                    return
            if answer_rest and self._added:
                self._attempt(self._answer)
        finally:
            self.session.close()
            self.player.close()

    def _attempt(self, call: Callable[[], bool | None]) -> bool:
        """Whether to go on after a call; what goes wrong in it is a line."""
        try:
            return call() is not False
        except InputError as e:
            self._end_line()
            self._notes.print(f"omni-jax: {' '.join(str(e).split())}", soft_wrap=True)
        except KeyboardInterrupt:
            self._end_line()
        return True

    def take(self, line: str) -> bool:
        """One line; false where it ends the conversation. Raises InputError."""
        try:
            line.encode()
        except UnicodeEncodeError:
            raise InputError("the line is not UTF-8; set the terminal's encoding, or convert the file") from None
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in COMMANDS:
                raise InputError(f"{unknown_name('command', f'/{name}', [f'/{c}' for c in COMMANDS])} /help lists all")
            return COMMANDS[name][0](self, rest.strip()) is not False
        if line:
            self.session.send_text(line.removeprefix("/") if line.startswith("//") else line)
        if line or self._added:
            self._answer()
        return True

    # Replies

    def _answer(self) -> None:
        """Ends the turn and shows the reply, until it has been played or Ctrl-C stops it."""
        self._added = False
        with Interrupts() as interrupts:
            self.session.commit()
            while True:
                if interrupts.take():
                    self._stop()
                answering = self.session.is_answering
                self._show_all(self.session.poll())
                if not answering:
                    if not self.player.is_playing:
                        return
                    time.sleep(IDLE)

    def _stop(self) -> bool:
        """Ends the reply; whether there was one."""
        if not (self.session.is_answering or self.player.is_playing):
            return False
        self.session.interrupt(self.player.stop())
        self._end_line()
        self._notes.print("interrupted", style="dim")
        return True

    def _show_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, TextEvent):
            print(event.text, end="", flush=True)
            self._shown = True
        elif isinstance(event, AudioEvent):
            self.player.play(event.samples, event.head_start)
        elif isinstance(event, DoneEvent):
            self._end_line()
            self.player.finish()
        elif isinstance(event, TrimEvent):
            self._notes.print(f"the context was full: {event.dropped} older media or turns were given up", style="dim")
        elif isinstance(event, TurnEvent):
            if event.what == "begin":
                self.player.stop()
            self._notes.print("listening" if event.what == "begin" else "thinking", style="dim")
        elif isinstance(event, ErrorEvent):
            self.player.stop()
            raise event.error

    def _end_line(self) -> None:
        if self._shown:
            print(flush=True)
        self._shown = False

    # Commands

    def _add(self, kind: str, path: str) -> None:
        if not path:
            raise InputError(f"/{kind} names no file; write /{kind} FILE")
        self.session.send_item({"type": kind, kind: path.strip("'\"")}, self._media)
        self._added = True

    def _image(self, path: str) -> None:
        self._add("image", path)

    def _audio(self, path: str) -> None:
        self._add("audio", path)

    def _video(self, path: str) -> None:
        self._add("video", path)

    def _listen(self, _: str) -> None:
        """Takes turns from the microphone, whose ends voice activity finds. Ctrl-C stops a reply, and where there is
        none, the listening."""
        with self._open_microphone() as microphone, Interrupts() as interrupts:
            self._notes.print("speak; Ctrl-C stops a reply, and then the microphone", style="dim")
            while True:
                if interrupts.take() and not self._stop():
                    return
                blocks = microphone.blocks()
                for block in blocks:
                    self.session.played_seconds = self.player.played_seconds
                    self._attempt(lambda block=block: self.session.send_audio(block, microphone.rate))  # type: ignore[misc]
                events = self.session.poll()
                self._attempt(lambda events=events: self._show_all(events))  # type: ignore[misc]
                if not blocks and not self.session.is_answering:
                    time.sleep(IDLE)

    def _save(self, path: str) -> None:
        if not path:
            raise InputError("/save names no file; write /save FILE.json")
        from omni_jax.processing.encode import write_atomically

        text = json.dumps(self.session.to_json(), ensure_ascii=False, indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def _voice(self, name: str) -> None:
        if not name:
            self._notes.print(", ".join(self._model.voices) or "this model has no voices", soft_wrap=True)
            return
        speech = dataclasses.replace(self.session.speech, voice=name)
        self._model.check_speech([speech])
        self.session.speech = speech

    def _reset(self, _: str) -> None:
        speech = self.session.speech
        self.session.close()
        self.session = self.begin()
        self.session.speech, self._added = speech, False
        self._set_output(self.output)

    def _output(self, mode: str) -> None:
        if mode not in get_args(OutputMode):
            raise InputError(unknown_name("output", mode, get_args(OutputMode)))
        if mode in ("speech", "both"):
            self._model.check_speech([self.session.speech])
        self._set_output(mode)  # type: ignore[arg-type]

    def _set_output(self, mode: OutputMode) -> None:
        self.output = mode
        self.session.options = dataclasses.replace(self.session.options, output=mode)

    def _help(self, _: str) -> None:
        self._notes.print(HELP)

    def _quit(self, _: str) -> bool:
        return False


# Name → (what it does, its argument, help).
COMMANDS: dict[str, tuple[Callable[[Chat, str], bool | None], str, str]] = {
    "image": (Chat._image, "FILE", "Add a picture to your turn."),
    "audio": (Chat._audio, "FILE", "Add a recording."),
    "video": (Chat._video, "FILE", "Add a clip; with --use-audio-in-video, its sound too."),
    "listen": (Chat._listen, "", "Speak: turns come from the microphone until Ctrl-C."),
    "output": (Chat._output, "auto|text|speech|both", "How turns are answered."),
    "voice": (Chat._voice, "NAME", "Who speaks; without a name, the voices that there are."),
    "save": (Chat._save, "FILE", "Write the conversation as JSON messages."),
    "reset": (Chat._reset, "", "Begin another conversation."),
    "help": (Chat._help, "", "Show this."),
    "quit": (Chat._quit, "", "End the program, as does Ctrl-D."),
}
HELP = "\n".join([
    "A line of text ends your turn; after files alone, an empty line does. Ctrl-C stops a reply.",
    *(f"  /{f'{name} {argument}'.strip():<28} {about}" for name, (_, argument, about) in COMMANDS.items()),
    "  //…                           Text that begins with a slash.",
])  # fmt: skip


def chat(
    model: Flags[ModelSettings],
    options: Flags[ChatOptions],
    generation: Flags[GenerationSettings],
    media: Flags[MediaSettings],
    speech: Flags[SpeechSettings],
) -> None:
    """Hold a conversation in the terminal, by text, files, microphone and loudspeaker.

    A line is a turn; /help lists the commands. Replies' text goes to stdout, everything else to stderr. Standard input
    may be a pipe: one line, one turn.
    """
    if generation.logprobs is not None:
        raise InputError("--logprobs has no place in a conversation; omni-jax generate --json reports them")
    wanted = speech_of(
        options.output != "text", speech, model, seed=generation.seed, no_watchdog=options.no_watchdog,
        audio_format=None, needs="an output that speaks; leave --output text out",
    )  # fmt: skip
    from rich.console import Console

    notes = Console(stderr=True, highlight=False, markup=False)
    loaded = load_speaking(model, options.output, notes.is_terminal)
    driver = loaded.driver(capacity=options.context)
    detector = _turn_detector()

    def begin() -> Any:
        speaks = "talker" in loaded.params
        return loaded.session(
            generation, speech=wanted, turns=detector() if detector else None, driver=driver,
            output="auto" if speaks else "text", system=options.system, when_full=options.when_full,
        )  # fmt: skip

    player: players.Player | None = players.open_loudspeaker() if options.speech_dir is None and wanted else None
    player = player or players.WavFolder(pathlib.Path(options.speech_dir or SPEECH_DIR), notes)
    typed = sys.stdin.isatty()
    if typed:
        notes.print("/help lists the commands; Ctrl-D ends the conversation", style="dim")
    Chat(loaded, begin, media, options.output, player, notes).run(_lines(typed), answer_rest=not typed)


def load_speaking(model: ModelSettings, output: OutputMode, progress: bool) -> Any:
    """The model with all its parts, where it is to speak and can."""
    if output == "text":
        return load_model(model, False, progress)
    from omni_jax.runtime.speech import SpeechError

    try:
        return load_model(model, True, progress)
    except SpeechError:
        if output != "auto":
            raise
        return load_model(model, False, progress)


def _turn_detector() -> Callable[[], Any] | None:
    """Makes what finds the ends of spoken turns: by the network of the extra `live`, else by energy; None where no
    microphone can be opened anyway."""
    if players.sound_devices() is None:
        return None
    from omni_jax.processing.voice_activity import EnergyDetector, SileroDetector, TurnDetector

    try:
        SileroDetector()
    except InputError:
        return lambda: TurnDetector(EnergyDetector())
    return lambda: TurnDetector(SileroDetector())


def _lines(typed: bool) -> Iterator[str]:
    """Lines of standard input, with line editing and a history where somebody types them."""
    if typed:
        import readline  # noqa: F401  `input` uses it once it is imported
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if typed else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line
