"""langchain-openai: text whole and streamed, a picture, a tool, and a spoken answer."""

import base64
import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
model = ChatOpenAI(model=os.environ["MODEL"], max_retries=0)

whole = model.invoke("Hello")
streamed = "".join(chunk.content for chunk in model.stream("Hello"))
assert whole.content == streamed, (whole.content, streamed)
assert whole.content
assert whole.usage_metadata["input_tokens"] > 5

image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
seen = model.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])
assert seen.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


assert model.bind_tools([weather]).invoke("How is the weather?").content is not None

speaking = model.bind(modalities=["text", "audio"], audio={"voice": "Chelsie", "format": "wav"})
spoken = speaking.invoke("Hello").additional_kwargs["audio"]
wav = base64.b64decode(spoken["data"])
assert wav[:4] == b"RIFF"
assert len(wav) > 10_000
print(f"{len(whole.content)} characters whole and streamed alike, {len(wav)} bytes of wav")
