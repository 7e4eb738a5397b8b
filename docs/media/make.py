"""Makes the files of this folder from one photograph: `python docs/media/make.py chelsea.png` (needs espeak-ng).

speech.flac is the sentence below, spoken by espeak-ng; clip.mp4 pans over the photograph to that sound.
"""

import pathlib
import subprocess
import sys
import tempfile

import av
import numpy as np
import soundfile
from PIL import Image

HERE = pathlib.Path(__file__).parent
SENTENCE = "This is Chelsea, a cat with green eyes. She looks straight into the camera."
FPS, SECONDS, SIZE = 15, 4, (240, 320)


def main() -> None:
    photo = Image.open(sys.argv[1]).convert("RGB")
    photo = photo.resize((448, round(448 * photo.height / photo.width)), Image.Resampling.LANCZOS)
    photo.save(HERE / "cat.jpg", quality=88)
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/speech.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", wav, SENTENCE], check=True)
        samples, rate = soundfile.read(wav, dtype="float32")
    soundfile.write(HERE / "speech.flac", samples, rate)
    with av.open(str(HERE / "clip.mp4"), "w", options={"movflags": "faststart"}) as clip:
        picture = clip.add_stream("libx264", rate=FPS, options={"crf": "28"})
        picture.height, picture.width, picture.pix_fmt = *SIZE, "yuv420p"
        sound = clip.add_stream("aac", rate=rate, layout="mono")
        sound.bit_rate = 48000
        pixels = np.asarray(photo)
        room = np.array(pixels.shape[:2]) - SIZE
        for i in range(FPS * SECONDS):
            y, x = (room * i / (FPS * SECONDS - 1)).astype(int)
            frame = av.VideoFrame.from_ndarray(pixels[y : y + SIZE[0], x : x + SIZE[1]], format="rgb24")
            clip.mux(picture.encode(frame))
        clip.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(samples[None, : rate * SECONDS], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(sound.format, "mono", rate, frame_size=sound.codec_context.frame_size or 1024)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            clip.mux(sound.encode(part))
        clip.mux(sound.encode(None))


if __name__ == "__main__":
    main()
