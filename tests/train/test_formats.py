"""Other trainers' records become ours, by detection and by name."""

from __future__ import annotations

import dataclasses

import pytest

from omni_jax.train.data.formats import canonical, detect
from omni_jax.train.data.lines import DataError
from tests import training

USER, SAID = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
ASKED = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Why?"}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]

FORMS = [
    ("messages", {"messages": [USER, SAID]}, {"messages": [USER, SAID]}),
    ("sharegpt", {"conversations": SHAREGPT}, {"messages": [USER, SAID]}),
    (
        "sharegpt",
        {"system": "Be brief.", "conversations": [
            SHAREGPT[0], {"from": "function_call", "value": '{"name": "f"}'}, {"from": "observation", "value": "1"},
            SHAREGPT[1] | {"weight": 0},
        ]},
        {"messages": [
            {"role": "system", "content": "Be brief."}, USER,
            {"role": "assistant", "content": '<tool_call>\n{"name": "f"}\n</tool_call>'},
            {"role": "tool", "content": "1"}, SAID | {"weight": 0},
        ]},
    ),
    (
        "sharegpt",
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}},
        {"messages": [USER], "chosen": "Because.", "rejected": "No."},
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "<image>Why?"}, SHAREGPT[1]], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": ASKED}, SAID]},
    ),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "Because."}, {"messages": [USER, SAID]}),
    (
        "alpaca",
        {"instruction": "Why", "input": "so?", "output": "Because.", "history": [["a", "b"]], "system": "Be brief."},
        {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, {"role": "user", "content": "Why\nso?"}, SAID,
        ]},
    ),
    (
        "alpaca", {"instruction": "Why?", "chosen": "Because.", "rejected": "No."},
        {"messages": [USER], "chosen": "Because.", "rejected": "No."},
    ),
    (
        "swift",
        {"messages": [{"role": "user", "content": "<image>Why?"}, SAID], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": ASKED}, SAID]},
    ),
    (
        "swift", {"messages": [USER, SAID], "images": [{"path": "a.png"}]},
        {"messages": [{"role": "user", "content": ASKED}, SAID]},
    ),
    (
        "swift",
        {"messages": [{"role": "user", "content": "<audio><video>"}, SAID], "audios": ["a.wav"], "videos": ["a.mp4"]},
        {"messages": [{"role": "user", "content": [
            {"type": "audio", "audio": "a.wav"}, {"type": "video", "video": "a.mp4"}]}, SAID]},
    ),
    ("swift", {"query": "Why?", "response": "Because."}, {"messages": [USER, SAID]}),
    (
        "swift", {"messages": [USER, SAID], "rejected_response": "No."},
        {"messages": [USER], "chosen": "Because.", "rejected": "No."},
    ),
    ("trl", {"prompt": [USER], "completion": [SAID]}, {"messages": [USER, SAID]}),
    ("trl", {"prompt": "Why?", "completion": "Because."}, {"messages": [USER, SAID]}),
    (
        "trl", {"prompt": [USER], "chosen": [SAID], "rejected": [{"role": "assistant", "content": "No."}]},
        {"messages": [USER], "chosen": "Because.", "rejected": "No."},
    ),
    (
        "trl", {"chosen": [USER, SAID], "rejected": [USER, {"role": "assistant", "content": "No."}]},
        {"messages": [USER], "chosen": "Because.", "rejected": "No."},
    ),
    (
        "swift",  # TRL's form of conversations with images
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}, SAID]},
        {"messages": [{"role": "user", "content": ASKED}, SAID]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "given", "wanted"), FORMS)
def test_forms(form, given, wanted, model, checkpoint):
    given, extra = given | {"name": "x line 1"}, {"name": "x line 1"}
    assert detect(given) == form
    assert canonical(given) == canonical(given, form) == wanted | extra
    if form != "swift" and "tool" not in str(wanted) and "images" not in given:
        read = training.reader(model, checkpoint, "dpo" if "chosen" in wanted else "thinker")
        (got, *_), (want, *_) = read.samples(given), read.samples(wanted | extra)
        assert got.ids.tolist() == want.ids.tolist()
        assert got.labels.tolist() == want.labels.tolist()


@pytest.mark.parametrize(("given", "message"), [
    ({"conversations": "a"}, "its conversations are str; give a list"),
    ({"conversations": [{"from": "nobody", "value": "a"}]}, "turn 0 is from 'nobody'; known are human"),
    ({"instruction": 3, "output": "a"}, "its instruction is int; give a string"),
    ({"prompt": "a"}, "it has neither completion nor chosen and rejected"),
    ({"prompt": 3, "completion": "b"}, "its prompt is neither a text nor a list of messages"),
    ({"query": "a"}, "it lacks response"),
    ({"messages": [USER], "rejected_response": "a"}, "its last message is not the assistant's"),
    ({"messages": [{"role": "user", "content": "<image><image>"}, SAID], "images": ["a"]}, "more <image> marks than"),
    ({"messages": [{"role": "user", "content": "<image>"}, SAID], "images": ["a", "b"]}, "2 images and fewer <image>"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "its history must be a list of pairs"),
    ({"instruction": "a", "output": "b", "label": 1}, "it has label; known are"),
])  # fmt: skip
def test_records_that_are_not_of_their_form_are_refused_by_name(given, message, model, checkpoint):
    read = training.reader(model, checkpoint)
    with pytest.raises(DataError, match=message) as e:
        read.check(given | {"name": "x line 1"})
    assert "\n" not in str(e.value)
    assert dataclasses.replace(read, form="messages").form == "messages"
