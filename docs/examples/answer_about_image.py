"""Answer a question about an image: python docs/examples/answer_about_image.py CHECKPOINT [IMAGE]"""

import pathlib
import sys

import omni_jax

CAT = pathlib.Path(__file__).parents[1] / "media" / "cat.jpg"


def main(checkpoint: str, image: str = str(CAT)) -> omni_jax.Reply:
    model = omni_jax.load(checkpoint)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this image?"}]
    messages = [{"role": "user", "content": question}]
    for event in model.stream(messages, max_new_tokens=16, media={"max_pixels": 100_000}):
        if isinstance(event, omni_jax.DoneEvent):
            print(f"\n{event.reply.prompt_tokens} tokens read, ended by {event.reply.finish_reason}")
            return event.reply
        print(event.text, end="", flush=True)
    raise AssertionError("a stream ends with a DoneEvent")


if __name__ == "__main__":
    main(*sys.argv[1:])
