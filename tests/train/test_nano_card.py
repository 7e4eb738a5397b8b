"""How nano is judged: word errors, the recogniser's language model, pitch, and the rows of the card."""

from __future__ import annotations

import math

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.train.nano import card, scores, words
from omni_jax.train.nano.card import Answer


@pytest.mark.parametrize(("wanted", "got", "errors"), [
    ("", "", 0), ("a b c", "a b c", 0), ("a b c", "", 3), ("", "a b", 2), ("a b c", "a c", 1), ("a b c", "a x b c", 1),
    ("a b c", "c b a", 2), ("the cat sat", "a cat sat down", 2),
])  # fmt: skip
def test_word_errors(wanted, got, errors):
    assert scores.errors(wanted.split(), got.split()) == errors
    if wanted:
        assert scores.word_error_rate([(wanted, got)] * 3) == errors / len(wanted.split())


def test_word_errors_of_several_texts_weigh_by_words():
    assert scores.word_error_rate([("a", "b"), ("a b c", "a b c")]) == 0.25


def test_the_language_model_is_a_distribution_over_the_vocabulary():
    """After each word, the bigrams' shares and the discounted rest add up to 1, as do the unigrams'."""
    texts = words.sentences("train", 200, 0)
    arpa = scores.language_model(texts)
    ones, twos = (part.splitlines() for part in arpa.split("\\1-grams:\n")[1].split("\n\n\\2-grams:\n"))
    share, back = {}, {}
    for line in ones:
        log, word, rest = line.split()
        share[word], back[word] = 10 ** float(log), 10 ** float(rest)
    assert set(share) == {*words.WORDS, "<s>", "</s>"}
    assert math.isclose(sum(p for w, p in share.items() if w != "<s>"), 1, abs_tol=1e-3)
    after: dict[str, float] = {}
    for line in twos[: twos.index("")]:
        log, first, _ = line.split()
        after[first] = after.get(first, 0) + 10 ** float(log)
    assert len(after) > 200
    assert all(math.isclose(p + back[w], 1, abs_tol=2e-3) for w, p in after.items())


@pytest.mark.parametrize("hertz", [85, 120, 210, 300])
def test_pitch_of_a_harmonic_tone(hertz):
    t = np.arange(24000) / 24000
    tone = sum(np.sin(2 * np.pi * k * hertz * t) / k for k in range(1, 8)).astype(np.float32)
    assert abs(scores.pitch(tone * 0.2) / hertz - 1) < 0.02
    assert scores.pitch(np.zeros(24000, np.float32)) == 0
    assert scores.pitch(np.random.default_rng(0).standard_normal(24000).astype(np.float32)) == 0


def test_baselines_are_of_each_kind_of_question():
    said = [Answer("digit", d, "one") for d in ("one", "one", "two", "six")] + [Answer("way", "up", "up")] * 4
    assert card.right(said) == 6 / 8
    assert card.commonest(said) == 6 / 8  # "one" of the digits, "up" of the ways
    assert card.commonest([]) == card.right([]) == 0


def test_rows_say_what_is_missed():
    seeds = [
        {"digit": (0.98, 200, 0.12), "thing": (0.9, 200, 0.01), "originals": (0.05, 50, None),
         "codes to sound": (0.085, 50, None), "text to sound": (0.07, 50, None), "voices never heard": (0.2, 9, None)},
        {"digit": (0.96, 200, 0.12)},
    ]  # fmt: skip
    made = card.rows(seeds)
    assert {r.task: r.met for r in made} == {
        "digit": True, "thing": False, "originals": None, "codes to sound": False, "text to sound": True,
        "voices never heard": False,
    }  # fmt: skip
    text = card.table(made)
    assert "| digit | ≥ 97.0% | 98.0% | 200 | 96.0% | 12.0% |" in text
    assert "| codes to sound | ≤ 8.0% | 8.5% **missed** | 50 |  | – |" in text


def test_the_second_recogniser_has_a_limit_of_its_own():
    seeds = [{"originals, Whisper base": (0.25, 9, None), "codes to sound, Whisper base": (0.32, 9, None)}]
    (_, row) = card.rows(seeds)
    assert (row.goal, row.met) == ("≤ 33.0%", True)


def test_what_an_open_recogniser_writes_is_brought_into_the_vocabulary():
    assert scores.plain_words(" The Gray cat's 3 colours, 12 boats.") == "the grey cats three colours twelve boats"


def test_the_table_goes_between_the_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- card -->\nold\n<!-- /card -->\nafter\n")
    card.into_card("| new |", file)
    assert file.read_text() == "before\n<!-- card -->\n| new |\n<!-- /card -->\nafter\n"
    file.write_text("before")
    with pytest.raises(InputError, match="<!-- card -->"):
        card.into_card("| new |", file)
