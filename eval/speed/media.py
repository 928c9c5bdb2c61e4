"""How fast a loader's worker decodes, beside plain loops:  python eval/speed/media.py [--rounds 7] [--json]

One process, one thread, files that this program writes itself, in turns (medians of the rounds; ratios are ours over the
plain loop's, so above 1 is faster):

    video    a 10 s clip of 320 x 240 at 25 frames a second (H.264) to ten pictures
             plain: PyAV decodes every frame, ten are made RGB; OpenCV likewise, where `cv2` can be imported
             (uv run --with opencv-python-headless python eval/speed/media.py)
    short    a clip of the miniature world's size: 64 x 64, 8 frames a second
    sound    10 s of 16 kHz mono FLAC to windows of a second       plain: soundfile.read
    stereo   10 s of 44.1 kHz stereo WAV to the same               plain: soundfile.read, the mean, torchaudio's resample

`ours` is data/media.py: paths checked, limits and headers checked, decoded to the end to notice files that were cut off.
The result is also written to eval/speed/results/media.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from data.media import SAMPLE_RATE, MediaLoader
from data.schema import Media
from eval.speed.reporting import RESULTS, keep, surroundings
from mokamm.arguments import at_least_one

SEGMENTS = SECONDS = 10
Decode = Callable[[], Any]


def write_video(path: Path, size: tuple[int, int], rate: int) -> None:
    """SECONDS of a moving gradient with noise, as H.264."""
    random = np.random.default_rng(0)
    width, height = size
    ramp = np.add.outer(np.arange(height), np.arange(width))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(rate * SECONDS):
            noise = random.integers(0, 20, (height, width))
            grey = ((ramp + 3 * k) % 200 + noise).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path: Path, rate: int, channels: int) -> None:
    import soundfile

    samples = np.random.default_rng(0).normal(0, 0.1, (rate * SECONDS, channels)).astype(np.float32)
    soundfile.write(path, samples, rate)


def plain_pyav(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
    picked = [frames[(2 * k + 1) * len(frames) // (2 * SEGMENTS)] for k in range(SEGMENTS)]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in picked])


def plain_opencv(path: Path) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    wanted = {(2 * k + 1) * total // (2 * SEGMENTS) for k in range(SEGMENTS)}
    picked = []
    for k in range(total):
        capture.grab()
        if k in wanted:
            picked.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(picked)


def plain_sound(path: Path) -> torch.Tensor:
    import soundfile
    from torchaudio.functional import resample

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(samples.mean(axis=1))
    return (mono if rate == SAMPLE_RATE else resample(mono, rate, SAMPLE_RATE)).view(SEGMENTS, -1)


def cases(folder: Path) -> dict[str, dict[str, Decode]]:
    """What is decoded, and the ways to do it."""
    loader = MediaLoader(folder)
    found: dict[str, dict[str, Decode]] = {}
    for name, size, rate in (("video", (320, 240), 25), ("short", (64, 64), 8)):
        path = folder / f"{name}.mp4"
        write_video(path, size, rate)
        media = Media("video", path.name, "vision")
        found[name] = {"ours": partial(loader.frames, media, SEGMENTS), "pyav": partial(plain_pyav, path)}
        if _has_opencv():
            found[name]["opencv"] = partial(plain_opencv, path)
    for name, suffix, rate, channels in (("sound", "flac", 16_000, 1), ("stereo", "wav", 44_100, 2)):
        path = folder / f"{name}.{suffix}"
        write_sound(path, rate, channels)
        media = Media("audio", path.name, "audio")
        found[name] = {
            "ours": partial(loader.windows, media, SEGMENTS, 1.0, whole=False),
            "soundfile": partial(plain_sound, path),
        }
    return found


def _has_opencv() -> bool:
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """{case: {way: clips a second, ...}}; a first round warms up. CPU seconds, so that other programs do not count."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        todo = cases(Path(folder))
        times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in todo for way in todo[name]}
        for _ in range(rounds + 1):
            for name, way in times:
                began = time.process_time()
                todo[name][way]()
                times[name, way].append(time.process_time() - began)
    rates = {key: 1 / statistics.median(values[1:]) for key, values in times.items()}
    return {name: {way: round(rates[name, way], 2) for way in ways} for name, ways in todo.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    clips = measure(args.rounds)
    ratios = {
        name: {f"over_{way}": round(rates["ours"] / rate, 3) for way, rate in rates.items() if way != "ours"}
        for name, rates in clips.items()
    }
    samples = {name: round(SECONDS * SAMPLE_RATE * clips[name]["ours"]) for name in ("sound", "stereo")}
    result = {
        **surroundings("media.py", args), "seconds": "CPU",
        "clips_per_second": clips, "ratios": ratios, "samples_per_second": samples,
    }  # fmt: skip
    if keep(result, RESULTS / "media.json", args.json):
        return
    for name, rates in clips.items():
        beside = ", ".join(f"{way} {rate:.1f}" for way, rate in rates.items() if way != "ours")
        also = f" = {samples[name]:,} samples/s" if name in samples else ""
        print(f"{name:>7}: {rates['ours']:.1f} clips/s{also}; plain: {beside}; ratios {ratios[name]}")


if __name__ == "__main__":
    main()
