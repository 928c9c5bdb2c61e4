"""Audio-visual events of the miniature world, as in AVE.

File: SPLIT/events.txt (lines NAME&VIDEO_ID&quality&start&end); media: SPLIT/videos/ID.mp4 and SPLIT/audio/ID.wav.
Scored as in events.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from eval.benchmarks.events import Events


class MiniworldEvents(Events):
    name = "miniworld_events"
    options: ClassVar[dict[str, Any]] = {"video_dir": "videos", "audio_dir": "audio"}
