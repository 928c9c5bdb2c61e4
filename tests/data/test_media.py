"""Media against what was written into the files: colours by time, samples, true lengths; where paths may not go."""

from __future__ import annotations

import math
import os
import struct

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image

from data.media import MediaLimits, MediaLoader, cut_windows
from data.schema import BadSample, Media, MediaError, OverLimit, UserError
from data.sound import mono_sound


def video(path: str) -> Media:
    return Media("video", path, "vision")


def audio(path: str) -> Media:
    return Media("audio", path, "audio")


def image(path: str) -> Media:
    return Media("image", path, "vision")


# --- pictures


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_are_those_shown_at_the_middle_of_equal_parts(tmp_path, write_video, colour_of, name):
    colours = [k // 5 % 8 for k in range(40)]  # 4 s, a new colour every half second
    write_video(tmp_path / name, colours)
    for segments in (1, 3, 4, 8, 10):
        times = [(k + 0.5) * 4 / segments for k in range(segments)]
        frames = MediaLoader(tmp_path).frames(video(name), segments)
        assert frames.shape == (segments, 3, 48, 64)
        assert frames.dtype == torch.uint8
        assert colour_of(frames) == [int(t / 0.5) % 8 for t in times]


def test_a_target_on_a_frames_own_timestamp_takes_that_frame(tmp_path, write_video, colour_of):
    write_video(tmp_path / "a.mp4", [0, 1, 2, 3])  # 0.4 s; the middles of two parts are 0.1 and 0.3 s, both timestamps
    assert colour_of(MediaLoader(tmp_path).frames(video("a.mp4"), 2)) == [1, 3]


def test_variable_frame_rate(tmp_path, write_video, colour_of):
    starts = [0, 40, 80, 1000, 1040, 3000, 3900]
    write_video(tmp_path / "v.mkv", [0, 1, 2, 3, 4, 5, 6], starts, codec="libvpx")
    frames = MediaLoader(tmp_path).frames(video("v.mkv"), 8)  # middles: 0.25, 0.75, ..., 3.75 of about 4 s
    assert colour_of(frames) == [2, 2, 4, 4, 4, 4, 5, 5]


def test_slides_with_b_frames_are_seen_to_the_last(tmp_path, write_video, colour_of):
    """Their MP4's header claims 35.0 s, the sum of the frames' durations in decoding order."""
    starts = [0, 3000, 9000, 9500, 20000, 26000, 30000, 50000]
    write_video(tmp_path / "v.mp4", list(range(8)), starts)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].duration * container.streams.video[0].time_base < 36
    frames = MediaLoader(tmp_path).frames(video("v.mp4"), 10)  # middles: 2.7, 8.2, 13.6, ... of 54.4 s
    assert colour_of(frames) == [0, 1, 3, 3, 4, 5, 6, 6, 6, 7]


def test_duration_is_counted_where_no_header_has_it(tmp_path, write_video, colour_of):
    write_video(tmp_path / "live.mkv", [k // 5 for k in range(20)], options={"live": "1"})
    write_video(tmp_path / "raw.h264", [k // 5 for k in range(20)])
    loader = MediaLoader(tmp_path)
    assert colour_of(loader.frames(video("live.mkv"), 4)) == [0, 1, 2, 3]
    assert colour_of(loader.frames(video("raw.h264"), 4)) == [0, 1, 2, 3]


def test_more_segments_than_frames_repeats_frames(tmp_path, write_video, colour_of):
    write_video(tmp_path / "a.mp4", [0, 1])
    assert colour_of(MediaLoader(tmp_path).frames(video("a.mp4"), 6)) == [0, 0, 0, 1, 1, 1]


def test_decoding_twice_gives_the_same_bits(tmp_path, write_video):
    write_video(tmp_path / "a.mp4", list(range(8)))
    first, second = (MediaLoader(tmp_path).frames(video("a.mp4"), 5) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "matrix",  # a, b, c, d of x' = a x + c y, y' = b x + d y: the four turns, and what is seen in a mirror
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)],
)
def test_a_clip_filmed_upright_is_shown_upright(tmp_path, matrix):
    """Phones store a turned picture and, in the track header, the matrix that turns it back (ISO 14496-12, 8.3.2)."""
    path, (a, b, c, d) = tmp_path / "phone.mp4", matrix
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:24, :32] = (240, 0, 0)
    pixels[:24, 32:] = (0, 0, 240)
    pixels[24:, :32] = 240
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    shown = struct.pack(">9i", a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 2**30)
    data = path.read_bytes()
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(unit, shown, 1))
    frames = MediaLoader(tmp_path).frames(video("phone.mp4"), 2)
    assert frames.shape == ((2, 3, 48, 64) if a else (2, 3, 64, 48))
    for y, x in ((10, 14), (10, 50), (38, 14), (38, 50)):
        to_x, to_y = a * x + c * y, b * x + d * y  # negative: counted from the other side
        assert (frames[:, :, to_y, to_x] - torch.from_numpy(pixels[y, x]).float()).abs().max() < 40, (y, x)


def test_image_exactly_and_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = MediaLoader(tmp_path).frames(image("a.png"), 10)
    assert torch.equal(got, torch.from_numpy(pixels).permute(2, 0, 1)[None])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for name in ("turned.png", "turned.tif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        turned = MediaLoader(tmp_path).frames(image(name), 1)
        assert torch.equal(turned[0].permute(1, 2, 0), torch.from_numpy(np.rot90(pixels, -1).copy())), name


def test_grey_and_16_bit_images(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        got = MediaLoader(tmp_path).frames(image(name), 1)
        assert torch.equal(got[0], torch.from_numpy(grey)[None].expand(3, 3, 4)), name


def test_16_bits_in_formats_that_pillow_opens_as_wider_ones(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 8 8 4095\n" + (ramp >> 4).astype(">u2").tobytes())
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    for name in ("a.pgm", "b.pgm", "a.tif"):
        got = MediaLoader(tmp_path).frames(image(name), 1)[0, 0]
        assert torch.equal(got, torch.from_numpy((ramp >> 8).astype(np.uint8))), name
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "wide.tif")
    Image.fromarray(ramp.astype(np.int32) >> 8).save(tmp_path / "dark.tif")
    for name in ("float.tif", "wide.tif", "dark.tif"):
        with pytest.raises(MediaError, match="no white that is known"):
            MediaLoader(tmp_path).frames(image(name), 1)


def test_avif(tmp_path):
    Image.new("RGB", (16, 8), (200, 40, 40)).save(tmp_path / "a.avif")
    got = MediaLoader(tmp_path).frames(image("a.avif"), 1)
    assert got.shape == (1, 3, 8, 16)
    assert (got[0, :, 4, 8] - torch.tensor([200, 40, 40]).float()).abs().max() < 8


def test_a_damaged_exif_entry_beside_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    Image.fromarray(np.zeros((24, 32, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    at = data.index(b"\x01\x1a")
    data[at : at + 2] = b"\x01\x00"  # now an ImageWidth that is a fraction
    (tmp_path / "a.jpg").write_bytes(data)
    assert MediaLoader(tmp_path).frames(image("a.jpg"), 1).shape == (1, 3, 32, 24)


# --- sound


@pytest.mark.parametrize(
    ("subtype", "error"),
    [("PCM_U8", 1 / 127), ("PCM_16", 1 / 32767), ("PCM_24", 1e-6), ("PCM_32", 1e-7), ("FLOAT", 1e-7), ("DOUBLE", 1e-7)],
)
def test_samples_in_every_format_and_the_mean_of_channels(tmp_path, noise, subtype, error):
    mono = noise(0.5)
    stereo = np.stack([mono, -mono / 4], axis=1)
    loader = MediaLoader(tmp_path)
    for name, samples, expected in (("m.wav", mono, mono), ("s.wav", stereo, stereo.mean(1))):
        soundfile.write(tmp_path / name, samples, 16_000, subtype=subtype)
        windows = loader.windows(audio(name), 1, 0.5, whole=True)
        assert windows.lengths.tolist() == [8000]
        np.testing.assert_allclose(windows.samples[0].numpy(), expected, atol=error)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg"])
def test_planar_and_compressed_sound(tmp_path, name):
    t = np.arange(16_000) / 16_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / name, np.stack([tone, tone], 1), 16_000)
    windows = MediaLoader(tmp_path).windows(audio(name), 1, 1.0, whole=True)
    assert windows.lengths.tolist() == [16_000]
    np.testing.assert_allclose(windows.samples[0].numpy(), tone, atol=0.02)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_the_exact_length(tmp_path, rate):
    n = 2 * rate + 7
    soundfile.write(tmp_path / "t.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate), rate, subtype="FLOAT")
    windows = MediaLoader(tmp_path).windows(audio("t.wav"), 1, 3.0, whole=True)
    length = math.ceil(n * 16_000 / rate)
    assert windows.lengths.tolist() == [length]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(length) / 16_000)
    np.testing.assert_allclose(windows.samples[0, 200 : length - 200].numpy(), expected[200:-200], atol=2e-3)


def test_a_videos_own_track(tmp_path, write_video):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    write_video(tmp_path / "av.mp4", [0, 1] * 10, sound=tone)
    windows = MediaLoader(tmp_path).windows(audio("av.mp4"), 3, 1.0, whole=True)
    heard = windows.samples.flatten()[: int(windows.lengths.sum())].numpy()
    assert abs(len(heard) - 32_000) <= 1024  # AAC codes blocks of 1024
    np.testing.assert_allclose(heard[2000:30_000], tone[2000:30_000], atol=0.05)
    assert torch.equal(MediaLoader(tmp_path).windows(video("av.mp4"), 3, 1.0, True).samples, windows.samples)


def test_a_track_that_starts_later_is_moved_to_its_time(tmp_path, write_video, noise):
    sound = noise(1.0)
    write_video(tmp_path / "late.mkv", [0] * 15, sound=sound, sound_delay_ms=500, sound_codec="pcm_s16le")
    windows = MediaLoader(tmp_path).windows(audio("late.mkv"), 2, 1.0, whole=True)
    assert windows.lengths.tolist() == [16_000, 8_000]
    heard = windows.samples.flatten().numpy()
    assert not heard[:8000].any()
    np.testing.assert_allclose(heard[8000:24_000], sound, atol=1e-4)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mp4", "aac")])
def test_silence_stands_for_packets_that_were_dropped(tmp_path, write_video, noise, name, codec):
    write_video(tmp_path / "whole.mkv", [0] * 40, sound=noise(4.0), sound_codec=codec)

    def heard(lost):
        with av.open(str(tmp_path / "whole.mkv")) as source, av.open(str(tmp_path / name), "w") as target:
            streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                time = packet.pts and packet.pts * packet.time_base
                if packet.size and not (packet.stream.type == "audio" and lost(time)):
                    packet.stream = streams[packet.stream.index]
                    target.mux(packet)
        windows = MediaLoader(tmp_path).windows(audio(name), 5, 1.0, whole=True)
        return windows.samples.flatten()[: int(windows.lengths.sum())].numpy()

    whole, found = heard(lambda time: False), heard(lambda time: 1 < time < 2)
    assert len(found) == len(whole)
    for kept in (slice(0, 15_000), slice(35_000, 63_000)):  # packets of 64 ms, and AAC's decoder remembers one
        np.testing.assert_allclose(found[kept], whole[kept], atol=2e-4)
    assert not found[18_000:32_000].any()


def test_windows_that_hold_the_whole_sound(tmp_path, noise):
    sound = noise(2.5)
    soundfile.write(tmp_path / "a.wav", sound, 16_000, subtype="FLOAT")
    windows = MediaLoader(tmp_path).windows(audio("a.wav"), 10, 1.0, whole=False)
    assert windows.lengths.tolist() == [16_000, 16_000, 8_000]
    assert windows.samples.shape == (3, 16_000)
    np.testing.assert_array_equal(windows.samples.flatten()[:40_000].numpy(), sound.astype(np.float32))
    assert not windows.samples[2, 8_000:].any()


def test_windows_of_longer_sound_are_centred_in_equal_parts(tmp_path, noise):
    sound = noise(7.3)
    soundfile.write(tmp_path / "a.wav", sound, 16_000, subtype="FLOAT")
    windows = MediaLoader(tmp_path).windows(audio("a.wav"), 3, 1.0, whole=False)
    assert windows.lengths.tolist() == [16_000] * 3
    for k in range(3):
        first = int((k + 0.5) * 7.3 / 3 * 16_000) - 8_000
        np.testing.assert_array_equal(windows.samples[k].numpy(), sound[first : first + 16_000].astype(np.float32))


def test_speech_is_heard_to_its_end_or_refused(tmp_path, noise):
    soundfile.write(tmp_path / "talk.wav", noise(2.1), 16_000)
    loader = MediaLoader(tmp_path)
    assert loader.windows(audio("talk.wav"), 3, 1.0, whole=True).lengths.tolist() == [16_000, 16_000, 1_600]
    with pytest.raises(OverLimit, match=r"talk\.wav: lasts 2\.10 s, longer than the 2 x 1 s .* raise `segments`"):
        loader.windows(audio("talk.wav"), 2, 1.0, whole=True)


def test_the_padding_of_a_codec_behind_speech_that_fills_its_windows_is_cut(noise):
    sound = torch.from_numpy(noise(2.05))
    windows = cut_windows(sound, 2, 1.0, whole=True)
    assert windows.lengths.tolist() == [16_000, 16_000]
    assert torch.equal(windows.samples.flatten(), sound[:32_000])


def test_nist_sphere(tmp_path, noise):
    """A recording as TIMIT, WSJ and Switchboard have it: a text of 1024 bytes, then PCM."""
    fields = ("sample_count -i 8000", "sample_n_bytes -i 2", "channel_count -i 1", "sample_byte_format -s2 01",
              "sample_rate -i 16000", "sample_coding -s3 pcm")  # fmt: skip
    head = "\n".join(["NIST_1A", "   1024", *fields, "end_head\n"]).ljust(1024).encode()
    pcm = (noise(0.5) * 32767).astype("<i2")
    (tmp_path / "a.sph").write_bytes(head + pcm.tobytes())
    heard = MediaLoader(tmp_path).windows(audio("a.sph"), 1, 0.5, whole=True)
    np.testing.assert_allclose(heard.samples[0].numpy(), pcm / 32768, atol=1e-6)


@pytest.mark.parametrize("total", [1, 15_999, 16_000, 16_001, 47_999, 48_000, 48_001, 100_003])
def test_cut_windows_against_a_loop(total):
    samples = torch.arange(1, total + 1, dtype=torch.float32)
    windows = cut_windows(samples, 3, 1.0, whole=False)
    assert (windows.lengths >= 1).all()
    if total <= 48_000:
        pieces = [samples[k : k + 16_000] for k in range(0, total, 16_000)]
        assert windows.lengths.tolist() == [len(p) for p in pieces]
        for piece, window in zip(pieces, windows.samples, strict=True):
            assert torch.equal(window[: len(piece)], piece)
            assert not window[len(piece) :].any()
    else:
        assert windows.samples[:, 0].tolist() == [int((k + 0.5) * total / 3) - 8_000 + 1 for k in range(3)]


# --- where media may lie


def test_paths_stay_inside_media_dir(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "secret.png"
    (inside / "sub").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(outside)
    Image.new("RGB", (4, 4)).save(inside / "sub" / "ok.png")
    os.symlink(outside, inside / "link.png")
    os.symlink(tmp_path, inside / "up")
    os.symlink(inside / "sub" / "ok.png", inside / "good_link.png")
    loader, free = MediaLoader(inside), MediaLoader(inside, allow_outside=True)
    assert loader.frames(image("sub/ok.png"), 1).shape == (1, 3, 4, 4)
    assert loader.frames(image("good_link.png"), 1).shape == (1, 3, 4, 4)
    refused = {
        str(outside): "is an absolute path",
        str(inside / "sub" / "ok.png"): None,
        "../secret.png": r"climbs with '\.\.'",
        "sub/../../secret.png": r"climbs with '\.\.'",
        "link.png": "is a link that leads out of",
        "up/secret.png": "is a link that leads out of",
    }
    for name, message in refused.items():
        with pytest.raises(MediaError, match=f"{message or 'absolute'}.*allow_outside"):
            loader.frames(image(name), 1)
        assert free.frames(image(name), 1).shape == (1, 3, 4, 4)


def test_a_file_url_is_the_path_in_it(tmp_path):
    (tmp_path / "a b%.mp4").write_bytes(b"x")
    url = f"file://{tmp_path}/a%20b%25.mp4"
    assert MediaLoader(None, allow_outside=True).resolve(video(url)) == tmp_path / "a b%.mp4"
    for name in (url, url.replace("file:", "FILE:")):
        with pytest.raises(MediaError, match=rf"'{tmp_path}/a b%.mp4' is an absolute path"):
            MediaLoader(tmp_path).resolve(video(name))
    with pytest.raises(MediaError, match="names no file"):
        MediaLoader(tmp_path).resolve(video("file:///a%00b"))


@pytest.mark.parametrize(
    "name", ["https://host/a.mp4", "file://host/etc/passwd", "file:a.mp4", "data:video/mp4;base64,AA", "s3://b/a"]
)
def test_urls_are_never_read(tmp_path, name):
    for allow in (False, True):
        with pytest.raises(MediaError, match="is a URL; media are read from local files only"):
            MediaLoader(tmp_path, allow_outside=allow).resolve(video(name))


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "clip_01.mp4").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    loader = MediaLoader(tmp_path)
    with pytest.raises(MediaError, match=r"clip_1\.mp4: not found; did you mean 'clip_01\.mp4'\?"):
        loader.resolve(video("clip_1.mp4"))
    with pytest.raises(MediaError, match=r"not found, nor is its folder; check data\.media_dir"):
        loader.resolve(video("videos/clip.mp4"))
    with pytest.raises(MediaError, match=r"not found; folders are told apart by '/', not by '\\'"):
        loader.resolve(video("folder\\clip_01.mp4"))
    with pytest.raises(MediaError, match="is a folder"):
        loader.resolve(video("folder"))
    with pytest.raises(MediaError, match=r"media_dir = .*nowhere does not exist"):
        MediaLoader(tmp_path / "nowhere").resolve(video("a.mp4"))
    with pytest.raises(MediaError, match=r"data\.media_dir is not set"):
        MediaLoader(None).resolve(video("a.mp4"))
    with pytest.raises(MediaError, match="names no file"):
        loader.resolve(video("a\0b"))
    assert issubclass(MediaError, BadSample)
    assert issubclass(BadSample, UserError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_medium_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"a\.mp4: is no regular file"):
        MediaLoader(tmp_path).frames(Media("video", "a.mp4", "vision"), 2)


def test_paths_that_the_file_system_refuses(tmp_path, monkeypatch):
    loader = MediaLoader(tmp_path)
    for name, reason in (
        ("a" * 300 + ".mp4", "File name too long"),
        ("x/" * 3000 + "a.mp4", "File name too long"),
        ("a\ud83d.mp4", "surrogates not allowed"),
        ("loop/a.mp4", "[Ll]oop|symbolic links"),
    ):
        if "loop" in name:
            (tmp_path / "loop").symlink_to("loop")
        for read in (loader.resolve, loader.fingerprint):
            with pytest.raises(MediaError, match=f"cannot be resolved .*({reason}).* correct the row's path"):
                read(video(name))
    monkeypatch.setattr(os, "scandir", refuse)  # a folder that may be entered but not listed
    with pytest.raises(MediaError, match=r"'b\.mp4': cannot be resolved \(Permission denied\).*check the permissions"):
        loader.resolve(video("b.mp4"))
    monkeypatch.setattr(os, "stat", refuse)  # a folder that may not be entered
    with pytest.raises(MediaError, match=r"'c\.mp4': cannot be resolved \(Permission denied\)"):
        loader.resolve(video("c.mp4"))


def refuse(*_args, **_options):
    raise PermissionError(13, "Permission denied")


def test_fingerprint_follows_the_content(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b.bin").write_bytes(b"abc")
    loader = MediaLoader(tmp_path)
    first = loader.fingerprint(video("a.bin"))
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert loader.fingerprint(video("b.bin")) == first
    (tmp_path / "a.bin").write_bytes(b"abcd")
    assert loader.fingerprint(video("a.bin")) != first


# --- limits, from headers


def test_limits_come_before_decoding(tmp_path, write_video, noise):
    write_video(tmp_path / "a.mp4", [0] * 20)
    soundfile.write(tmp_path / "a.wav", noise(2.0), 16_000)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(OverLimit, match=r"a\.mp4: .*64 x 48 = 3072 pixels, more than data\.limits\.max_pixels = 3071"):
        MediaLoader(tmp_path, MediaLimits(max_pixels=3071)).frames(video("a.mp4"), 2)
    with pytest.raises(OverLimit, match=r"a\.png: .*64 x 48 = 3072 pixels, more than data\.limits\.max_pixels = 3071"):
        MediaLoader(tmp_path, MediaLimits(max_pixels=3071)).frames(image("a.png"), 1)
    with pytest.raises(OverLimit, match=r"a\.mp4: lasts 2\.0 s, more than data\.limits\.max_seconds = 1\.5"):
        MediaLoader(tmp_path, MediaLimits(max_seconds=1.5)).frames(video("a.mp4"), 2)
    with pytest.raises(OverLimit, match=r"a\.wav: lasts 2\.0 s, more than data\.limits\.max_seconds = 1\.5"):
        MediaLoader(tmp_path, MediaLimits(max_seconds=1.5)).windows(audio("a.wav"), 2, 1.0, False)
    with pytest.raises(OverLimit, match=r"a\.wav: has \d+ bytes, more than data\.limits\.max_bytes = 1000"):
        MediaLoader(tmp_path, MediaLimits(max_bytes=1000)).windows(audio("a.wav"), 2, 1.0, False)
    with pytest.raises(OverLimit, match=r"a\.wav: has \d+ bytes, more than data\.limits\.max_bytes = 1000"):
        MediaLoader(tmp_path, MediaLimits(max_bytes=1000)).fingerprint(audio("a.wav"))
    exact = MediaLoader(tmp_path, MediaLimits(max_pixels=3072, max_seconds=2.0))
    assert exact.frames(video("a.mp4"), 2).shape == (2, 3, 48, 64)
    assert exact.windows(audio("a.wav"), 2, 1.0, True).samples.shape == (2, 16_000)


def test_limits_hold_where_the_header_lies_or_is_silent(tmp_path, write_video, noise):
    limits = MediaLimits(max_seconds=2.0)
    path = write_video(tmp_path / "long.mkv", [0] * 60)
    written = path.read_bytes()
    assert written.count(b"00:00:06.000") == 1  # the track's own DURATION
    path.write_bytes(written.replace(b"00:00:06.000", b"00:00:01.000"))
    with pytest.raises(OverLimit, match=r"long\.mkv: lasts 2\.1 s, more than data\.limits\.max_seconds = 2"):
        MediaLoader(tmp_path, limits).frames(video("long.mkv"), 2)
    late = write_video(tmp_path / "late.mkv", [0] * 5, sound=noise(1.0), sound_delay_ms=60_000, sound_codec="pcm_s16le")
    assert late.stat().st_size < 100_000
    with pytest.raises(OverLimit, match=r"late\.mkv: lasts 60\.9 s, more than data\.limits\.max_seconds = 2"):
        MediaLoader(tmp_path, limits).windows(audio("late.mkv"), 2, 1.0, False)


@pytest.mark.parametrize("rate", [1_000, 3_999, 8_000, 11_127, 22_050, 22_254, 44_056, 44_101, 47_952, 65_537, 999_983])
def test_every_sampling_rate_with_few_filters(rate, monkeypatch):
    """Against the sine that was sampled; a filter for each phase of 44101 Hz would take 3 GB."""
    asked = []
    plain = torchaudio.functional.resample
    monkeypatch.setattr(torchaudio.functional, "resample", lambda x, *rates: asked.append(rates) or plain(x, *rates))
    hertz = min(300.0, rate / 10)
    track = mono_sound(np.sin(2 * np.pi * hertz * np.arange(rate // 2 + 1) / rate), rate, "x", MediaLimits())
    assert len(track) == math.ceil((rate // 2 + 1) * 16_000 / rate)
    wanted = np.sin(2 * np.pi * hertz * np.arange(len(track)) / 16_000)
    assert all(phases <= 4000 for _, phases in asked)
    middle = slice(500, -500)  # what lies outside is silence to the filter
    assert np.abs(track.numpy() - wanted)[middle].max() < 0.02


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_a_rate_that_no_recording_has(tmp_path, noise, rate):
    soundfile.write(tmp_path / "a.wav", noise(0.1), 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(MediaError, match=r"a second|lasts"):
        MediaLoader(tmp_path).windows(audio("a.wav"), 1, 1.0, False)
