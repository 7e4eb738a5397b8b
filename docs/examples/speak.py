"""Answer aloud, into a WAV file: python docs/examples/speak.py CHECKPOINT [OUT.wav]"""

import sys

import soundfile

import omni_jax

# The published models speak well under this system message only.
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)


def main(checkpoint: str, out: str = "answer.wav", max_codes: int = 500) -> omni_jax.Reply:
    model = omni_jax.load(checkpoint, parts=omni_jax.PARTS)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is a cat?"}]
    speech = omni_jax.SpeechSettings(voice="Ethan", max_codes=max_codes)
    reply = model.generate(messages, max_new_tokens=16, speech=speech)
    soundfile.write(out, reply.waveform, 24_000)
    print(f"{reply.text}\n{reply.seconds:.2f} s of speech in {out}")
    return reply


if __name__ == "__main__":
    main(*sys.argv[1:3])
