"""New tokens: ids, files of both tokenizer forms, rows."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.checkpoint.added_tokens import TABLES, add_tokens
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.config import load_config
from omni_jax.processing.tokenizer import Tokenizer


@pytest.mark.parametrize("whole", [True, False])
def test_ids_follow_the_tokenizers_and_pass_those_that_speech_takes(checkpoint, tmp_path, whole):
    """1264 to 1266 are the Talker's; the files of either form give the tokens their ids again."""
    for name in ("tokenizer.json",) if whole else ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    cfg = load_config(checkpoint)
    added = add_tokens(tmp_path, cfg, ["<calm>", "<angry>"], taken=[1268])
    assert added.ids == {"<calm>": 1267, "<angry>": 1269}
    assert added.reserved == {f"<|reserved_{i}|>": i for i in (1264, 1265, 1266, 1268)}
    assert added.config == cfg
    with added.applied_to(tmp_path) as folder:
        assert len(Tokenizer.from_folder(tmp_path).encode("<calm>")) > 1
        tokenizer = Tokenizer.from_folder(folder)
    assert [i for i in tokenizer.encode("so<calm>, <angry>") if i >= 1264] == [1267, 1269]
    assert tokenizer.decode([1267, 1269]) == "<calm><angry>"
    assert not folder.exists()


def test_tables_grow_where_they_are_too_short(checkpoint):
    """To a multiple of 128 rows; the new ones are the mean of the rows that meant something, others stay."""
    names = [f"<n{i}>" for i in range(20)]
    added = add_tokens(checkpoint, load_config(checkpoint), names, taken=[1277, 1279])
    assert max(added.ids.values()) == 1288
    assert added.config.thinker.text.vocab_size == 1408
    assert json.loads(added.files["config.json"])["thinker_config"]["text_config"]["vocab_size"] == 1408
    table = np.random.default_rng(0).standard_normal((1280, 4)).astype(np.float32)
    params = added.add_rows({TABLES[0]: jnp.asarray(table), "other": 1})
    got = np.asarray(params[TABLES[0]])
    assert (got.shape, params["other"]) == ((1408, 4), 1)
    for i in (1267, 1288, 1407):
        np.testing.assert_allclose(got[i], table[:1264].mean(0), atol=1e-6)
    np.testing.assert_array_equal(got[:1264], table[:1264])
    np.testing.assert_array_equal(got[1279], table[1279])  # a voice's


@pytest.mark.parametrize(("names", "said"), [([" "], "is empty"), (["<a>", "<a>"], "is there twice"),
                                             (["<tool_call>"], "is a token already")])  # fmt: skip
def test_names_that_cannot_be(checkpoint, names, said):
    with pytest.raises(CheckpointError, match=said):
        add_tokens(checkpoint, load_config(checkpoint), names)
