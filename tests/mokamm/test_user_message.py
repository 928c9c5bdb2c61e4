"""A user's question with markers becomes the message that a training row of the same content has."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.schema import Media, Text, UserError
from mokamm.model import user_message


def test_media_come_first_or_where_the_marker_stands() -> None:
    question = "one circle. {speech} Answer the spoken question."
    message = user_message(question, video="a.mp4", speech=["b.wav", "c.wav"])
    here = Path.cwd()
    assert message.content == (
        Media("video", str(here / "a.mp4"), "vision"),
        Media("audio", str(here / "c.wav"), "speech"),
        Text("one circle.", question=True),
        Media("audio", str(here / "b.wav"), "speech"),
        Text("Answer the spoken question.", question=True),
    )
    assert user_message("{speech}", speech="b.wav").content == (Media("audio", str(here / "b.wav"), "speech"),)
    assert user_message("what is {this}?").content == (Text("what is {this}?", question=True),)


def test_a_marker_without_a_file_is_refused() -> None:
    with pytest.raises(UserError, match="one more --video FILE"):
        user_message("{video} {video} same?", video="a.mp4")
