"""Where media come from."""

from __future__ import annotations

import base64
import http.server
import io
import socket
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import torch
from PIL import Image

from omni_jax.config import VisionConfig, load_config
from omni_jax.errors import InputError
from omni_jax.processing.audio import load_audio
from omni_jax.processing.images import load_image
from omni_jax.processing.media import Access, MediaError, describe, fetch
from omni_jax.processing.processor import Processor
from omni_jax.processing.video import load_video
from omni_jax.settings import MediaSettings
from tests.media import encode_sound, encode_video, grey_levels, picture, tone

DATA = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = {
            "/to-file": "file:///etc/passwd",
            "/to-ftp": "ftp://localhost/a",
            "/moved": "/a.bin",
            "/loop": "/loop",
            "/inside": "http://127.0.0.1:9/",
        }
        if self.path in where:
            self.send_response(302)
            self.send_header("Location", where[self.path])
            self.end_headers()
        elif self.path == "/a.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif self.path == "/torn":  # breaks off within a chunk
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nhalf")
        elif self.path == "/huge":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\nsome")
        elif self.path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(20):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.05)
        else:
            self.send_response(200)
            length = len(DATA) + (10 if self.path == "/short" else 0)
            self.send_header("Content-Length", str(0 if self.path == "/empty" else length))
            self.end_headers()
            self.wfile.write(b"" if self.path == "/empty" else DATA)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


LOCAL = Access(private_urls=True)  # the test's server is on this machine


def read(source, access: Access = LOCAL) -> bytes:
    with fetch(source, access) as file:
        assert file.seekable()
        return file.read()


def test_paths_and_bytes(tmp_path):
    file = tmp_path / "a file äß%20.bin"
    file.write_bytes(DATA)
    for source in (file, str(file), file.as_uri(), DATA, bytearray(DATA), memoryview(DATA)):
        assert read(source) == DATA


def test_data_urls():
    coded = base64.b64encode(DATA).decode()
    for url in (
        f"data:audio/wav;base64,{coded}",
        f"DATA:;base64,{coded}".replace("DATA", "data"),
        f"data:audio/wav;base64,{coded.rstrip('=')}",
        f"data:audio/wav;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        f"data:audio/wav;base64,{urllib.parse.quote(coded)}",
        f"data:audio/wav;base64,{coded[:70]}\n{coded[70:]}",
        f"data:application/octet-stream,{urllib.parse.quote(DATA)}",
    ):
        assert read(url) == DATA


def test_web_addresses(server):
    assert read(f"{server}/a.bin") == DATA
    assert read(f"{server}/moved") == DATA


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "cannot be fetched (404 Not Found)"),
        ("/to-file", "redirects to 'file://"),
        ("/to-ftp", "redirects to 'ftp://localhost/a'"),
        ("/loop", "cannot be fetched"),
        ("/short", "cannot be fetched"),
        ("/empty", "is empty"),
        ("/garbage", "cannot be fetched ("),
        ("/torn", "cannot be fetched ("),
        ("/huge", "is larger than 1073741824 bytes"),
    ],
)
def test_bad_web_addresses(server, path, message):
    with pytest.raises(MediaError) as e:
        fetch(server + path, LOCAL)
    assert message in str(e.value)
    assert path in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "192.168.1.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0",
        "[fd00::1]", "[fe80::1]", "2130706433", "100.64.0.1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1",
        "10.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(host):
    with pytest.raises(MediaError, match="is a private, local or reserved address, which is not allowed"):
        fetch(f"http://{host}/a.wav")


def test_a_name_is_resolved_once_and_redirects_are_checked(server, monkeypatch):
    """A name server that answers differently the second time, and a public page that redirects to a private one."""
    port = int(server.rsplit(":", 1)[1])
    real, asked = socket.getaddrinfo, []

    def resolve(host, *args, **kwargs):
        asked.append(host)
        if host == "public.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8" if len(asked) == 1 else "10.0.0.1", port))]
        return real("127.0.0.1" if host == "8.8.8.8" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert read(f"http://public.example:{port}/a.bin", Access()) == DATA
    assert asked == ["public.example", "8.8.8.8"]
    asked.clear()
    with pytest.raises(MediaError, match=r"127\.0\.0\.1 is a private, local or"):
        fetch(f"http://public.example:{port}/inside", Access())


def test_spaces_and_letters_beyond_ascii(server):
    assert read(f"{server}/a file äß.bin") == DATA


def test_size_cap(server):
    with pytest.raises(MediaError, match="is larger than 1000 bytes"):
        fetch(f"{server}/a.bin", Access(private_urls=True, max_bytes=1000))


def test_a_server_that_drips(server):
    with pytest.raises(MediaError, match=r"/drip cannot be fetched \(only \d+ bytes came in 0 s\)"):
        fetch(f"{server}/drip", Access(private_urls=True, patience=0.2))


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/", "http://", "http://[::1/", "http://127.0.0.1/a b\n"])
def test_addresses_that_are_none(url):
    with pytest.raises(MediaError, match="cannot be fetched") as e:
        fetch(url)
    assert "\n" not in str(e.value)


def test_nobody_there():
    with pytest.raises(MediaError, match=r"http://127.0.0.1:9/x cannot be fetched .* check the address"):
        fetch("http://127.0.0.1:9/x", Access(private_urls=True, timeout=2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.wav", "no/such/file.wav does not exist; check the path"),
        (".", "is a folder; name a file in it"),
        ("s3://bucket/a.wav", "s3 addresses cannot be opened; use http, https, data or a path"),
        ("ftp://host/a.wav", "ftp addresses cannot be opened; use http, https, data or a path"),
        ("data:audio/wav;base64", "has no comma"),
        ("data:audio/wav;base64,§§§", "is not valid base64"),
        (b"", "is empty"),
        ("a\0b", "cannot be opened"),
        (None, "is no path, URL or bytes"),
        (7, "is no path, URL or bytes"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(MediaError) as e:
        fetch(source)
    assert message in str(e.value)


def test_a_server_can_forbid_files_and_addresses(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(DATA)
    closed = Access(files=False, urls=False)
    for source in (file, str(file), file.as_uri(), "http://127.0.0.1:9/", "/etc/passwd", "FILE:///etc/passwd"):
        with pytest.raises(MediaError, match="not allowed here; send the bytes as a data: URL"):
            fetch(source, closed)
    assert read(DATA, closed) == DATA
    assert read("data:,hello", closed) == b"hello"


def test_names_in_messages_are_short():
    assert describe("data:image/png;base64," + "A" * 5000) == "data:image/png;base64… (5022 characters)"
    assert describe(b"123") == "<3 bytes>"
    assert len(describe("/x" * 500)) < 200


def test_kinds_that_are_no_media_are_named():
    for start, said in (
        (b"%PDF-1.7 ...", "is a PDF; save its pages as pictures"),
        (b"\n<!DOCTYPE html><html>", "is a web page; check the address"),
        (b"PK\x03\x04abc", "is a ZIP archive; unpack it"),
    ):
        for load in (load_image, load_audio, lambda data: load_video(data, VisionConfig())):
            with pytest.raises(MediaError, match=said):
                load(start + bytes(300))


def test_a_cut_mp4_is_not_told_to_become_one():
    whole = encode_video(grey_levels(10), 10)
    with pytest.raises(MediaError) as e:
        load_video(whole[: len(whole) // 2], VisionConfig())
    assert "is damaged or cut short (the index of the MP4, which often stands at its end, is not there)" in str(e.value)
    assert "convert" not in str(e.value)
    with pytest.raises(MediaError, match=r"FFmpeg can read; convert it to MP4$"):
        load_video(b"no clip at all" * 30, VisionConfig())


def test_open_files_stay_open(tmp_path):
    for load, data in ((load_audio, encode_sound(tone(0.5), 16000, "WAV")), (load_image, png())):
        (tmp_path / "file").write_bytes(data)
        with open(tmp_path / "file", "rb") as file:
            file.read(7)
            np.testing.assert_array_equal(load(file), load(data))
            assert not file.closed
        with open(tmp_path / "file", encoding="latin-1") as file, pytest.raises(MediaError, match="opened as text"):
            load(file)


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(56, 84)).save(out, "PNG")
    return out.getvalue()


def test_sound_of_datasets_and_tensors():
    wave = tone(0.5)
    want = load_audio((wave, 16000))
    for given in (
        {"array": wave, "sampling_rate": 16000, "path": None},
        {"array": wave.tolist(), "sampling_rate": 16000},
        {"bytes": encode_sound(wave, 16000, "FLAC"), "path": "a.flac"},
        (torch.from_numpy(wave), 16000),
        (torch.from_numpy(wave)[None], 16000),
        {"array": torch.from_numpy(wave)[None].repeat(2, 1), "sampling_rate": 16000},
    ):
        np.testing.assert_allclose(load_audio(given), want, atol=1e-4)
    with pytest.raises(MediaError, match='has neither "array" and "sampling_rate" nor'):
        load_audio({"path": None})
    with pytest.raises(MediaError, match="comes without its rate"):
        load_audio(torch.from_numpy(wave))
    frame = picture(56, 84)
    chw = torch.from_numpy(frame).permute(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(load_image(chw)), frame)
    clip, _ = load_video(torch.stack([chw, chw]), VisionConfig())
    np.testing.assert_array_equal(clip.pixels, load_video([frame, frame], VisionConfig())[0].pixels)


def test_heic(monkeypatch):
    import pillow_heif

    out = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture(56, 84))).save(out, quality=95)
    image = load_image(out.getvalue())
    assert np.abs(np.asarray(image).astype(int) - picture(56, 84)).mean() < 15
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MediaError, match=r"is a HEIC picture; pip install omni-jax\[heic\], or convert it to JPEG"):
        load_image(out.getvalue())


def test_private_addresses_are_an_option(server, checkpoint):
    processor = Processor.from_folder(checkpoint, load_config(checkpoint).thinker)
    ask = [{"role": "user", "content": [{"type": "image", "image": f"{server}/a.png"}]}]
    with pytest.raises(MediaError, match="is a private, local or reserved address"):
        processor(ask)
    assert processor(ask, MediaSettings(private_urls=True)).images
    ask[0]["content"][0]["private_urls"] = True
    with pytest.raises(InputError, match="'private_urls', which image items do not know"):
        processor(ask)
