"""Every kind of broken media file ends in a MediaError that names the file and says what to do."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data.media import MediaLimits, MediaLoader
from data.schema import Media, MediaError, NoTrack
from data.sound import sound_track


def frames(folder, name, kind="video"):
    return MediaLoader(folder).frames(Media(kind, name, "vision"), 4)


def windows(folder, name):
    return MediaLoader(folder).windows(Media("audio", name, "audio"), 4, 1.0, False)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_mp4_without_its_index(tmp_path, write_video):
    write_video(tmp_path / "a.mp4", [k % 8 for k in range(50)])  # the index (moov) is written last
    cut(tmp_path / "a.mp4", 0.6)
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be read as a media file .*cut off"):
        frames(tmp_path, "a.mp4")


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("name", "options"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})])
def test_video_cut_in_the_middle_of_its_data(tmp_path, write_video, name, options, share):
    write_video(tmp_path / name, [k % 8 for k in range(100)], options=options)
    assert frames(tmp_path, name).shape[0] == 4
    cut(tmp_path / name, share)
    with pytest.raises(MediaError, match=r"a\.m.*cut off"):
        frames(tmp_path, name)


def test_sound_cut_in_the_middle(tmp_path, noise, write_video):
    soundfile.write(tmp_path / "a.wav", noise(5), 16_000)
    soundfile.write(tmp_path / "a.flac", noise(5), 16_000)
    write_video(tmp_path / "av.mp4", [0] * 50, sound=noise(5), options={"movflags": "faststart"})
    for name in ("a.wav", "a.flac", "av.mp4"):
        assert windows(tmp_path, name).samples.shape == (4, 16_000)
        cut(tmp_path / name, 0.6)
        with pytest.raises(MediaError, match=rf"{name}.*cut off"):
            windows(tmp_path, name)


def test_stray_bytes_in_a_recording(tmp_path, noise):
    """Behind the sound they cost nothing, in its middle a moment; where they are more than a few, the file is bad."""
    stray = b"\0" * 3000
    soundfile.write(tmp_path / "a.mp3", noise(3), 16_000)
    whole = sound_track(tmp_path / "a.mp3", MediaLimits())
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data + stray)
    behind = sound_track(tmp_path / "a.mp3", MediaLimits())
    assert torch.equal(behind[: len(whole)], whole)
    assert len(behind) - len(whole) < 1600
    middle = len(data) // 2
    (tmp_path / "a.mp3").write_bytes(data[:middle] + stray + data[middle:])
    assert abs(len(sound_track(tmp_path / "a.mp3", MediaLimits())) - len(whole)) < 3200
    soundfile.write(tmp_path / "a.mp3", noise(0.5), 16_000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + stray)
    with pytest.raises(MediaError, match=r"a\.mp3: 1 of its \d\d packets of sound cannot be decoded .*is damaged"):
        windows(tmp_path, "a.mp3")


def test_damaged_bytes_in_the_middle(tmp_path, write_video):
    write_video(tmp_path / "a.mp4", [k % 8 for k in range(50)], options={"movflags": "faststart"})
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        frames(tmp_path, "a.mp4")


def test_text_named_mp4(tmp_path):
    (tmp_path / "a.mp4").write_text("<!DOCTYPE html><title>404 Not Found</title>\n" * 20)
    for read in (frames, windows):
        with pytest.raises(
            MediaError, match=r"a\.mp4: .*holds text, beginning '<!DOCTYPE html>.*put the real media file"
        ):
            read(tmp_path, "a.mp4")


@pytest.mark.parametrize("letter", ["ü", "网", "🎻"])
@pytest.mark.parametrize("shift", range(4))
def test_text_whose_first_bytes_end_within_a_letter(tmp_path, letter, shift):
    (tmp_path / "a.mp4").write_text("x" * shift + letter * 500, encoding="utf-8")
    with pytest.raises(MediaError, match=r"a\.mp4: .*holds text, beginning"):
        frames(tmp_path, "a.mp4")


def test_a_playlist_opens_no_other_file(tmp_path, write_video):
    write_video(tmp_path / "real.ts", [0] * 10, codec="libx264")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.ts\n#EXT-X-ENDLIST\n")
    assert frames(tmp_path, "real.ts").shape[0] == 4
    with pytest.raises(MediaError, match=r"list\.m3u8: cannot be read as a media file"):
        frames(tmp_path, "list.m3u8")


def test_empty_files(tmp_path):
    for name in ("a.mp4", "a.wav", "a.png"):
        (tmp_path / name).touch()
        with pytest.raises(MediaError, match=rf"{name}: is empty \(0 bytes\)"):
            frames(tmp_path, name, "image" if name == "a.png" else "video")


def test_wav_of_zero_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    with pytest.raises(MediaError, match=r"a\.wav: holds no sound samples .*record or export it again"):
        windows(tmp_path, "a.wav")


def test_wav_with_nan(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan, 0.5] * 100), 16_000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"a\.wav: its samples hold NaN"):
        windows(tmp_path, "a.wav")


def test_missing_tracks(tmp_path, write_video, noise):
    write_video(tmp_path / "silent.mp4", [0] * 10)
    soundfile.write(tmp_path / "a.wav", noise(1), 16_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(NoTrack, match=r"silent\.mp4: has no sound track \(it has: video\)"):
        windows(tmp_path, "silent.mp4")
    with pytest.raises(NoTrack, match=r"a\.wav: has no picture track \(it has: audio\)"):
        frames(tmp_path, "a.wav")
    with pytest.raises(NoTrack, match="has no pictures"):
        frames(tmp_path, "a.wav", "audio")
    with pytest.raises(NoTrack, match="has no sound"):
        MediaLoader(tmp_path).windows(Media("image", "a.png", "vision"), 1, 1.0, False)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 10_000), (9_000, 8_000)])
def test_image_bomb(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"bomb\.png: .*header claims.*scale it down"):
            frames(tmp_path, "bomb.png", "image")


@pytest.mark.parametrize("size", [(1, 1_000_000), (101, 1), (2, 201)])
def test_strips_are_refused(tmp_path, size):
    Image.new("L", size).save(tmp_path / "strip.png")
    with pytest.raises(MediaError, match=rf"strip\.png: .*{size[0]} x {size[1]} pixels, a strip more than 100 times"):
        frames(tmp_path, "strip.png", "image")


def test_strips_just_within_the_limit_and_of_video(tmp_path, write_video):
    Image.new("L", (2, 200)).save(tmp_path / "long.png")
    assert frames(tmp_path, "long.png", "image").shape == (1, 3, 200, 2)
    write_video(tmp_path / "strip.mkv", [0] * 3, codec="libvpx", size=(16, 1616))
    with pytest.raises(MediaError, match=r"strip\.mkv: .*16 x 1616 pixels, a strip"):
        frames(tmp_path, "strip.mkv")


def test_a_shortage_of_memory_is_no_broken_image(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(torch, "from_numpy", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        frames(tmp_path, "a.png", "image")


def test_broken_images(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    cut(tmp_path / "cut.png", 0.5)
    Image.new("RGB", (16, 8)).save(tmp_path / "item.avif")  # of which Pillow says a bare RuntimeError
    whole = (tmp_path / "item.avif").read_bytes()
    (tmp_path / "item.avif").write_bytes(whole.replace(b"pitm", b"none"))
    start = whole.index(b"mdat") + 4  # the header stays whole
    (tmp_path / "pixels.avif").write_bytes(whole[:start] + bytes(len(whole) - start))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("cut.png", "item.avif", "pixels.avif", "text.png", "a.eps"):
        with pytest.raises(MediaError, match=rf"{name}: cannot be read as an image"):
            frames(tmp_path, name, "image")
