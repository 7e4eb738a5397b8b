"""The command `llm`, with a model of its file of OpenAI-compatible ones: text, and a recording as an attachment."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import wave

LLM = str(pathlib.Path(sys.executable).with_name("llm"))

with tempfile.TemporaryDirectory() as home:
    pathlib.Path(home, "extra-openai-models.yaml").write_text(
        f"- model_id: omni\n  model_name: {os.environ['MODEL']}\n  api_base: {os.environ['OPENAI_BASE_URL']}\n"
        "  api_key_name: omni\n  audio: true\n  vision: true\n"
    )
    pathlib.Path(home, "keys.json").write_text(json.dumps({"omni": os.environ["OPENAI_API_KEY"]}))
    environment = os.environ | {"LLM_USER_PATH": home}

    def llm(*arguments: str, given: bytes | None = None) -> str:
        done = subprocess.run([LLM, *arguments], input=given, capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    said = llm("-m", "omni", "Hello")
    assert said.strip()
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(32000))
    recording = pathlib.Path(home, "recording.wav")
    recording.write_bytes(file.getvalue())
    heard = llm("-m", "omni", "What is said?", "-a", str(recording))
    assert heard.strip()
    assert heard != said
print(f"{len(said)} characters, and {len(heard)} about a recording")
