"""What of a conversation is learned, and what the check before training refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from omni_jax.processing import chat
from omni_jax.train.data.lines import DataError
from tests import conversations, training


def _said(text, **more):
    return {"role": "assistant", "content": text} | more


ASK = {"role": "user", "content": "Why?"}


def _learned(read, messages):
    (sample,) = read.samples({"messages": messages, "name": "x line 1"})
    return read.processor.tokenizer.decode(sample.labels[sample.labels >= 0], skip_controls=False)


@pytest.mark.parametrize("quiet", [{"loss": False}, {"weight": 0}])
def test_turns_may_be_left_out_of_the_loss(quiet, model, checkpoint):
    read = training.reader(model, checkpoint)
    messages = [ASK, _said("One.", **quiet), ASK | {"loss": False}, _said("Two.", weight=1), ASK, _said("Three.")]
    read.check({"messages": messages})
    assert _learned(read, messages) == "Two.<|im_end|>Three.<|im_end|>"


@pytest.mark.parametrize(("messages", "message"), [
    ([ASK, _said("a", lost=False)], "message 1 has lost; known are content, loss"),
    ([ASK, _said("a", weight=0.5)], "message 1: weight is 0.5; give 0 or 1"),
    ([ASK, _said("a", loss="no")], "message 1: loss is 'no'; give true or false"),
    ([ASK | {"loss": True}, _said("a")], r"message 0 \(user\) cannot be learned"),
    ([ASK, _said("a", loss=False)], "leaves no message to learn; take the line out"),
])  # fmt: skip
def test_keys_of_messages_are_known_or_refused(messages, message, model, checkpoint):
    with pytest.raises(DataError, match=message) as e:
        training.reader(model, checkpoint).check({"messages": messages})
    assert "\n" not in str(e.value)


def test_preferences_learn_the_last_reply_alone(model, checkpoint):
    read = training.reader(model, checkpoint, "dpo")
    record = {"messages": [ASK, _said("One."), ASK], "chosen": [{"type": "text", "text": "Yes."}], "rejected": "No."}
    read.check(record)
    both = read.samples(record | {"name": "x line 1"})
    said = [read.processor.tokenizer.decode(s.labels[s.labels >= 0], skip_controls=False) for s in both]
    assert said == ["Yes.<|im_end|>", "No.<|im_end|>"]
    with pytest.raises(DataError, match="loss and weight have no place in preferences"):
        read.check(record | {"messages": [ASK, _said("One.", loss=False), ASK]})


def test_a_medium_of_the_assistant_is_none_of_its_words(model, checkpoint):
    read = training.reader(model, checkpoint)
    image = conversations._image(56, 56)
    assert _learned(read, [ASK, _said([image, {"type": "text", "text": "This."}])]) == "This.<|im_end|>"


def test_what_an_evaluation_answers_must_have_an_answer(model, checkpoint):
    """A last message of the user, or with an image; answers as lists of texts are texts."""
    read = training.reader(model, checkpoint)
    image = conversations._image(56, 56)
    for messages, message in (
        ([ASK, _said("a"), ASK], "the last message must be the assistant's: the one that answers are compared with"),
        ([ASK, _said([image])], "must be a text of the assistant"),
        ([_said("a")], "must be a text of the assistant after what it answers"),
    ):
        with pytest.raises(DataError, match=message):
            read.check({"messages": messages}, answered=True)
        read.check({"messages": messages})  # a loss is taken of each
    read.check({"messages": [ASK, _said(["a", {"type": "text", "text": "b"}])]}, answered=True)


def _png(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(conversations._image(56, 56)["image"])


@pytest.mark.parametrize("item", [
    {"type": "image", "image": "{}"}, {"type": "image_url", "image_url": {"url": "{}"}},
    {"type": "image_url", "image_url": "{}"}, {"type": "image", "path": "{}"},
    {"type": "video", "video": ["{}", "{}"]},
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.png", "take 1: a.png", "b/c.png"])
def test_relative_paths_begin_at_the_file(item, name, model, checkpoint, tmp_path):
    """Of every form, of frames, of names with a colon: the JSONL's folder counts; and what is missing is seen."""

    def named(value):
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        return [named(v) for v in value] if isinstance(value, list) else value.replace("{}", name)

    read = dataclasses.replace(training.reader(model, checkpoint), folder=tmp_path)
    record = {"messages": [{"role": "user", "content": [named(item)]}, _said("a")], "name": "x line 1"}
    with pytest.raises(DataError, match=f"{tmp_path / name} does not exist; correct the path"):
        read.check(record)
    _png(tmp_path / name)
    read.check(record)
    (sample,) = read.samples(record)
    assert len(sample.vision) == 1
    assert np.count_nonzero(sample.labels >= 0) > 0


def test_addresses_are_no_paths(tmp_path):
    urls = ["https://x.org/a.png", "data:image/png;base64,AA==", "file:///a/b.png", "s3://bucket/a.png"]
    messages = [{"role": "user", "content": [{"type": "image", "image": u} for u in [*urls, str(tmp_path / "a.png")]]}]
    (message,) = chat.resolve(chat.parse_conversation(messages), tmp_path / "other")
    found = [p.source for p in message.parts]
    assert found[:2] + found[3:] == [*urls[:2], urls[3], str(tmp_path / "a.png")]
    assert found[2] in (urls[2], "/a/b.png")
