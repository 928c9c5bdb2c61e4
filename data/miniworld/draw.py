"""The picture of a scene: 64 x 64 RGB frames, shapes by signed distance with soft edges, on a faint noisy background.

A frame costs about 0.2 ms. Shapes sway within their cell; one that enters or leaves slides over the nearest edge.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np

from data.miniworld.scene import COLOURS, COLUMNS, SECONDS, Scene, Thing

SIZE = 64
FPS = 5
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of a shape of radius r centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * r) - 0.28 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if shape == "diamond":
        return (1.5 * np.abs(x) + 0.85 * np.abs(y) - r) / 1.7
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - r, b - 0.3 * r), np.maximum(b - r, a - 0.3 * r))
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.55 * r
    if shape == "star":
        angle = np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
        radius = np.hypot(x, y)
        return radius * (np.cos(angle) + 0.95 * np.abs(np.sin(angle))) - 0.95 * r
    raise ValueError(f"no shape '{shape}'")


def centre(thing: Thing, second: float) -> tuple[float, float]:
    """(x, y) in pixels of a thing's middle."""
    column, row = COLUMNS.index(thing.column), 0 if thing.row == "top" else 1
    x = SIZE * (column + 0.5) / 3 + 1.2 * np.sin(0.9 * second + thing.phase)
    y = SIZE * (row + 0.5) / 2 + 3.5 * np.sin(0.7 * second + 2 * thing.phase)
    edge = -thing.size - 2 if row == 0 else SIZE + thing.size + 2
    gone = max(0.0, thing.enter - second, second - thing.leave) if (thing.enter or thing.leave < SECONDS) else 0.0
    slide = min(1.0, gone / 0.4)
    return float(x), float(y + slide * (edge - y))


def draw_frame(scene: Scene, second: float) -> np.ndarray:
    """One frame, uint8 (64, 64, 3)."""
    rng = np.random.default_rng(scene.texture)
    tint = rng.uniform(10, 55, 3).astype(np.float32)
    image = tint * (0.7 + 0.6 * _Y[..., None] / SIZE) + rng.normal(0, 3, (SIZE, SIZE, 1)).astype(np.float32)
    for thing in scene.things:
        x, y = centre(thing, second)
        cover = np.clip(0.5 - _distance(thing.shape, _X - x, _Y - y, thing.size), 0, 1)[..., None]
        image = image * (1 - cover) + np.asarray(COLOURS[thing.colour], np.float32) * cover
    return np.clip(image, 0, 255).astype(np.uint8)


def write_video(scene: Scene, path: Path) -> None:
    """Write the clip as a silent H.264 MP4; one thread, so that the same scene gives the same bytes decoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "16", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        for i in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(draw_frame(scene, (i + 0.5) / FPS), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png_bytes(frame: np.ndarray) -> bytes:
    """A frame as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()
