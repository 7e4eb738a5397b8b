"""Small models learn what only their media tell, and to speak given codes."""

from __future__ import annotations

import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from omni_jax import PARTS, SpeechSettings
from omni_jax.api import Omni
from omni_jax.checkpoint.load import load_params
from omni_jax.processing import chat
from omni_jax.settings import GenerationSettings
from omni_jax.train import step as S
from omni_jax.train.config import Optimizer
from omni_jax.train.data.lines import Lines
from tests import by_hand, media, training

# The answer is in the medium alone: the question is the same for all.
ANSWERS = {"image": ("red", "blue"), "audio": ("high", "low"), "video": ("down", "up")}
QUESTION = "Which?"


def _medium(kind, which, rng):
    """A picture of a colour, a tone of a pitch, a clip that darkens or brightens; no two are the same."""
    noise = rng.integers(0, 60, (28, 28, 3))
    if kind == "image":
        colour = np.array([[200, 20, 20], [20, 20, 200]][which])
        file = io.BytesIO()
        Image.fromarray((noise + colour * 0.7).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()
    if kind == "audio":
        hertz = rng.uniform(1500, 2500) if which == 0 else rng.uniform(150, 400)
        return media.encode_sound(media.tone(0.4, hertz=hertz, seed=int(rng.integers(1 << 30))), 16000, "WAV")
    levels = np.linspace(20, 200, 4)[:: 1 if which else -1] + rng.uniform(-10, 10)
    frames = [(noise * 0.5 + level).clip(0, 255).astype(np.uint8) for level in levels]
    return media.encode_video(frames, 2)


def _records(folder, count, seed):
    rng = np.random.default_rng(seed)
    records = []
    for number, (kind, which) in enumerate(itertools.product(ANSWERS, (0, 1))):
        for i in range(count):
            suffix = {"image": "png", "audio": "wav", "video": "mp4"}[kind]
            name = f"{seed}-{number}-{i}.{suffix}"
            (folder / name).write_bytes(_medium(kind, which, rng))
            asked = [{"type": kind, kind: name}, {"type": "text", "text": QUESTION}]
            records.append({"messages": [
                {"role": "user", "content": asked}, {"role": "assistant", "content": ANSWERS[kind][which]},
            ]})  # fmt: skip
    return records


def test_a_tiny_model_learns_what_it_sees_and_hears(model, checkpoint, tmp_path):
    """Held-out pictures, sounds and clips are answered far better than by the likeliest answer of each kind (half)."""
    train = training.write_lines(tmp_path / "train.jsonl", _records(tmp_path, 8, 0))
    held = training.write_lines(tmp_path / "held.jsonl", _records(tmp_path, 3, 1))
    sizes = {"min_pixels": 28 * 28, "max_pixels": 28 * 28}
    read = dataclasses.replace(training.reader(model, checkpoint, media=sizes), folder=tmp_path)
    lines = Lines(train)
    samples = [s for i in range(len(lines)) for s in read.samples(lines[i])]
    # All of them in one batch, four rows of every kind: one shape, which compiles once.
    batch = jax.tree.map(lambda x: x[None], training.batch(model, [samples[i::4] for i in range(4)], (512,)))
    run = training.run(checkpoint, tmp_path, train, rates={"thinker": 3e-3}, steps=20, optimizer=Optimizer(warmup=3))
    trainer = S.make_trainer(run, model.config)
    params = S.flatten(training.stacked(checkpoint, model))
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    for _ in range(run.steps):
        state, metrics = trainer.step(state, frozen, None, batch)
    trained = Omni(model.config, jax.jit(trainer.assemble)(state.params, frozen), model.processor, model.eos, "float32")
    right = dict.fromkeys(ANSWERS, 0)
    records = Lines(held)
    for record in (records[i] for i in range(len(records))):
        *asked, answer = record["messages"]
        question = chat.resolve(chat.parse_conversation(asked), tmp_path)
        (reply,) = trained.answer([trained.prepare(question, sizes)], [GenerationSettings(max_new_tokens=8)])
        right[asked[-1]["content"][0]["type"]] += reply.text == answer["content"]
    print("right of 6 each:", right, "loss", float(metrics["loss"]))
    assert all(n >= 5 for n in right.values()), right


def test_a_tiny_talker_learns_to_speak_given_codes(speaker, checkpoint, tmp_path):
    """Two sentences, two voices: greedy speech gives exactly the codes that were taught, and then ends."""
    codes = {"Chelsie": [5, 9, 2, 77, 41, 8, 130, 3], "Ethan": [200, 14, 66, 91, 7, 33]}
    records = [
        {"messages": [{"role": "user", "content": "Speak."}, {"role": "assistant", "content": text}],
         "codes": codes[voice], "voice": voice, "name": f"x line {i}"}
        for i, (voice, text) in enumerate((("Chelsie", "A cat sat."), ("Ethan", "The dog ran off.")))
    ]  # fmt: skip
    read = training.reader(speaker, checkpoint, "talker")
    run = training.run(checkpoint, tmp_path, "x", task="talker", rates={"talker": 3e-3}, steps=80)
    trainer = S.make_trainer(run, speaker.config)
    params = S.flatten(training.stacked(checkpoint, speaker, ("thinker", "talker")))
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    batch = training.batch(speaker, [[s for r in records for s in read.samples(r)]])
    batch = jax.tree.map(lambda x: x[None], batch)
    for _ in range(run.steps):
        state, metrics = trainer.step(state, frozen, None, batch)
    assert float(metrics["accuracy"]) == 1.0
    tree = jax.jit(trainer.assemble)(state.params, frozen)
    sound = load_params(checkpoint, speaker.config, parts=("token2wav",), dtype="float32", unroll=True)
    model = Omni(speaker.config, tree | sound, speaker.processor, speaker.eos, "float32", speaker.voices)
    assert set(model.params) == set(PARTS)
    # The written reply must be the taught one: its ids are forced, as a frozen Thinker need not write them.
    for record in records:
        spoken = _say(model, record, SpeechSettings(record["voice"], temperature=0.0, max_codes=40, watchdog=None))
        assert spoken.codes == record["codes"]
        assert spoken.finish_reason == "eos"


def _say(model, record, settings):
    """The Talker's codes for a given written reply: prompt and reply are read, then the Talker speaks."""
    prompt = model.prepare(record["messages"][:-1])
    ids = [*model.processor.tokenizer.encode(record["messages"][-1]["content"]), model.eos[0]]
    return by_hand.talk(model, by_hand.talker_inputs(model, prompt, ids, settings), settings)


@pytest.mark.parametrize(("answer", "truth", "errors"), [
    ("a b c", "a b c", 0), ("a x c", "a b c", 1), ("a c", "a b c", 1), ("a b b c", "a b c", 1), ("", "a b", 2),
    ("a b", "", 2), ("c b a", "a b c", 2), ("b c d e", "a b c d", 2),
])  # fmt: skip
def test_word_errors(answer, truth, errors):
    from omni_jax.train import evaluate

    assert evaluate.distance(answer.split(), truth.split()) == errors
    if truth:
        assert evaluate.word_error_rate([answer], [truth]) == errors / len(truth.split())
