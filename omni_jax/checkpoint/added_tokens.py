"""New tokens for a checkpoint: their ids, the files that name them, and their rows in the Thinker's tables.

A new token is read as one wherever a text names it, and is written out in replies, as Qwen's own `<tool_call>` is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.checkpoint.sources import is_small_file
from omni_jax.config import OmniConfig
from omni_jax.files import read_json
from omni_jax.processing.tokenizer import Tokenizer

TABLES = ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight")
_MULTIPLE = 128  # of a table's rows where it grows: published tables divide so


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """New tokens of one checkpoint.

    Attributes:
      ids: by name, ascending.
      reserved: of placeholders for ids between them that something else takes, by name.
      first: the first id that the tokenizer did not have.
      config: of the model, its tables as long as the ids need.
      files: new contents of the small files that name the tokens or the tables' length, by name.
    """

    ids: Mapping[str, int]
    reserved: Mapping[str, int]
    first: int
    config: OmniConfig
    files: Mapping[str, bytes]

    @contextlib.contextmanager
    def applied_to(self, folder: pathlib.Path) -> Iterator[pathlib.Path]:
        """A folder with the checkpoint's small files, those of `files` in their new form: a temporary one, if there
        are such."""
        if not self.files:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="omni-jax-") as made:
            for source in folder.iterdir():
                if is_small_file(source.name) and source.is_file():
                    shutil.copyfile(source, pathlib.Path(made) / source.name)
            for name, data in self.files.items():
                (pathlib.Path(made) / name).write_bytes(data)
            yield pathlib.Path(made)

    def add_rows(self, params: Mapping[str, Any], shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The parameters (flat) with rows for the new tokens: the mean of the rows of all tokens that there were.

        Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".

        Args:
          shardings: flat, of the longer tables; None on one device.
        """
        if not self.ids:
            return dict(params)
        out, rows = dict(params), self.config.thinker.text.vocab_size

        def extend(table: jax.Array) -> jax.Array:
            mean = jnp.mean(table[: self.first].astype(jnp.float32), axis=0).astype(table.dtype)
            longer = jnp.concatenate([table, jnp.broadcast_to(mean, (rows - len(table), table.shape[1]))])
            return longer.at[jnp.array([*self.ids.values()])].set(mean)

        for name in (n for n in TABLES if n in params):
            at = None if shardings is None else shardings[name]
            out[name] = jax.jit(extend, out_shardings=at)(params[name])
        return out


def add_tokens(folder: pathlib.Path, cfg: OmniConfig, names: Sequence[str], taken: Iterable[int] = ()) -> AddedTokens:
    """Gives new tokens ids behind the tokenizer's own.

    The published tables have spare rows there, of which speech takes some; a placeholder names each of those, since a
    tokenizer numbers its added tokens without gaps.

    Args:
      folder: of the checkpoint's small files.
      names: of the new tokens.
      taken: further ids whose rows mean something, such as the first tokens of the voices.
    Raises:
      CheckpointError: a name that is empty, there twice, or a token already.
      TokenizerError: the tokenizer cannot be read.
    """
    if not names:
        return AddedTokens({}, {}, 0, cfg, {})
    tokenizer = Tokenizer.from_folder(folder)
    for i, name in enumerate(names):
        if not name.strip() or name in names[:i] or tokenizer.has(name):
            why = "is empty" if not name.strip() else "is there twice" if name in names[:i] else "is a token already"
            raise CheckpointError(f"the new token {name!r} {why}; leave it out")
    used, first = {*taken, *_special_ids(cfg)}, tokenizer.size
    ids: dict[str, int] = {}
    reserved: dict[str, int] = {}
    at = first
    for name in names:
        while at in used:
            reserved[f"<|reserved_{at}|>"], at = at, at + 1
        ids[name], at = at, at + 1
    rows = cfg.thinker.text.vocab_size
    grown = at > rows
    if grown:
        rows = -(-at // _MULTIPLE) * _MULTIPLE
        text = dataclasses.replace(cfg.thinker.text, vocab_size=rows)
        cfg = dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text))
    every = dict(sorted((ids | reserved).items(), key=lambda named: named[1]))
    return AddedTokens(ids, reserved, first, cfg, dict(_files(folder, every, rows if grown else None)))


def _special_ids(cfg: OmniConfig) -> Iterator[int]:
    """Ids of the Thinker's table that the configuration names."""
    for part, prefix in ((cfg.thinker, ""), (cfg.talker, "tts_text")):
        for field in dataclasses.fields(part) if part is not None else ():
            if field.name.startswith(prefix) and field.name.endswith("token_id"):
                value = getattr(part, field.name)
                yield from value if isinstance(value, tuple) else () if value is None else (value,)


def _files(folder: pathlib.Path, ids: Mapping[str, int], rows: int | None) -> Iterator[tuple[str, bytes]]:
    """The files that change, each in its own form; `rows` of the tables where these grow."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}

    def read(name: str) -> Any:
        file = folder / name
        return read_json(file) if file.is_file() else None

    def written(raw: Any) -> bytes:
        return (json.dumps(raw, ensure_ascii=False, indent=2) + "\n").encode()

    if (raw := read("tokenizer.json")) is not None:
        new = [{"id": i, "content": name} | flags for name, i in ids.items()]
        yield "tokenizer.json", written(raw | {"added_tokens": [*raw["added_tokens"], *new]})
    if (raw := read("tokenizer_config.json")) is not None and "added_tokens_decoder" in raw:
        by_id = {str(i): {"content": name} | flags for name, i in ids.items()}
        yield "tokenizer_config.json", written(raw | {"added_tokens_decoder": raw["added_tokens_decoder"] | by_id})
    if (raw := read("added_tokens.json")) is not None:
        yield "added_tokens.json", written(raw | dict(ids))
    if rows is not None:
        raw = read("config.json")
        thinker = raw.get("thinker_config", raw)
        thinker["text_config"] = thinker.get("text_config", {}) | {"vocab_size": rows}
        yield "config.json", written(raw)
