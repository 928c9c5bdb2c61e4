"""Audio-visual questions of the miniature world, in MUSIC-AVQA's published rows and nine question types.

File: SPLIT/avqa.json; media: SPLIT/videos/ID.mp4 (silent) and SPLIT/audio/ID.wav.
"""

from __future__ import annotations

from typing import Any, ClassVar

from eval.benchmarks.short_answer import TypedShortAnswer


class MiniworldAvqa(TypedShortAnswer):
    name = "miniworld_avqa"
    source = "music_avqa"
    options: ClassVar[dict[str, Any]] = {"video_dir": "videos", "audio_dir": "audio"}
