"""Qwen's byte-level BPE through `tokenizers`, and detokenisation that streams."""

from __future__ import annotations

import codecs
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from omni_jax.errors import InputError
from omni_jax.files import read_json

# How Qwen2 splits text before merging (`Qwen2Converter` in transformers 4.57.6); `tokenizer.json` carries it,
# `vocab.json` and `merges.txt` do not.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(InputError):
    """Tokenizer files that cannot be used; the message names the file and the remedy."""


def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters by which a byte-level vocabulary writes bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_alphabet()


class Tokenizer:
    """Text to ids and back.

    Attributes:
      controls: names → ids of the special tokens. Only `encode` with `controls=True` reads them as such; in any other
        text they are plain characters.
    """

    def __init__(self, backend: tokenizers.Tokenizer, controls: Iterable[int] = ()):
        added = backend.get_added_tokens_decoder()
        unmarked = [added[i].content for i in controls if i in added and not added[i].special]
        if unmarked:
            backend.add_special_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in unmarked])
            added = backend.get_added_tokens_decoder()
        self.controls: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        # The backend never turns a special token's name into its id; `encode` splits them off itself.
        backend.encode_special_tokens = True
        self._backend = backend
        names = sorted(self.controls, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        self._added = {i: t.content for i, t in added.items()}

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, controls: Iterable[int] = ()) -> Tokenizer:
        """Reads `tokenizer.json`, or else `vocab.json`, `merges.txt` and `tokenizer_config.json`, of a checkpoint.

        Args:
          controls: ids of added tokens that are special even where the files do not mark them so.
        Raises:
          TokenizerError: missing or broken files.
        """
        folder = pathlib.Path(folder)
        whole = folder / "tokenizer.json"
        if whole.exists():
            try:
                return cls(tokenizers.Tokenizer.from_str(whole.read_text("utf-8")), controls)
            except Exception as e:  # the backend raises bare Exception
                raise TokenizerError(f"{whole} cannot be read ({e}); fetch it again") from None
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).exists():
                raise TokenizerError(f"{folder} has neither tokenizer.json nor {name}; fetch the tokenizer's files")
        return cls(_from_parts(folder), controls)

    @property
    def size(self) -> int:
        """Ids in use, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def has(self, name: str) -> bool:
        """Whether a token has this name, as the vocabulary writes it."""
        return self._backend.token_to_id(name) is not None

    def id(self, name: str) -> int:
        """The id of a token by its name. Raises TokenizerError for an unknown one."""
        found = self._backend.token_to_id(name)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {name!r}; its special tokens are {sorted(self.controls)}")
        return found

    def name(self, token: int) -> str | None:
        """The name of a token as the vocabulary writes it, None for an id that is not in use."""
        return self._backend.id_to_token(int(token))

    def encode(self, text: str, *, controls: bool = False, mark: str = "") -> list[int]:
        """Ids of a text.

        Args:
          controls: read the names of special tokens as these tokens. Leave it off for text from outside.
          mark: a character to leave out of the text once the special tokens are found (see `chat.render`).
        """
        if not controls:
            text = text.replace(mark, "") if mark else text
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        at = 0
        for found in self._split.finditer(text):
            ids += self.encode(text[at : found.start()], mark=mark)
            ids.append(self.controls[found.group()])
            at = found.end()
        return ids + self.encode(text[at:], mark=mark)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for ids that are not in use (models have spare rows).

        Raises:
          TokenizerError: a negative id.
        """
        if token < 0:
            raise TokenizerError(f"token id {token} is negative")
        if token in self._added:
            return self._added[token].encode()
        name = self.name(token)
        if name is None:
            return b""
        return bytes(BYTES[c] for c in name) if all(c in BYTES for c in name) else name.encode()

    def decode(self, ids: Iterable[int], *, skip_controls: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
          skip_controls: leave special tokens out.
        """
        stream = Detokenizer(self, skip_controls=skip_controls)
        return "".join([stream.push(i) for i in ids]) + stream.finish()


class Detokenizer:
    """Turns ids into text as they come. No piece ends within a character: bytes wait until theirs is whole."""

    def __init__(self, tokenizer: Tokenizer, *, skip_controls: bool = True):
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.controls.values()) if skip_controls else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that has become certain with this id; often none."""
        token = int(token)
        return "" if token in self._skip else self._decoder.decode(self._tokenizer.token_bytes(token))

    @property
    def pending(self) -> bool:
        """Whether the bytes so far end within a character."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, else nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class _Added:
    content: str
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def _read_json(file: pathlib.Path) -> Any:
    try:
        return read_json(file, TokenizerError)
    except FileNotFoundError:
        raise TokenizerError(f"{file} does not exist; fetch it again") from None


def _added_tokens(folder: pathlib.Path) -> Mapping[int, _Added]:
    """Added tokens by id, from `tokenizer_config.json`, else from `added_tokens.json` (all of them special)."""
    config = folder / "tokenizer_config.json"
    raw = _read_json(config).get("added_tokens_decoder") if config.exists() else None
    if raw:
        fields = _Added.__dataclass_fields__
        return {int(i): _Added(**{k: v for k, v in t.items() if k in fields}) for i, t in raw.items()}
    plain = folder / "added_tokens.json"
    return {i: _Added(name, special=True) for name, i in _read_json(plain).items()} if plain.exists() else {}


def _from_parts(folder: pathlib.Path) -> tokenizers.Tokenizer:
    vocab = _read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        merges = [tuple(line.split(" ")) for line in lines if line]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=False))
    except Exception as e:  # the backend raises bare Exception
        raise TokenizerError(f"{folder}/merges.txt does not fit vocab.json ({e}); fetch both again") from None
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for i, token in sorted(_added_tokens(folder).items()):
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content, special=token.special, normalized=token.normalized, lstrip=token.lstrip,
                    rstrip=token.rstrip, single_word=token.single_word,
                )
            ]
        )  # fmt: skip
        if backend.token_to_id(token.content) != i:
            raise TokenizerError(
                f"{folder}: added token {token.content!r} should be {i} but becomes "
                f"{backend.token_to_id(token.content)}; the files do not belong together"
            )
    return backend
