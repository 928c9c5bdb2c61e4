"""Requests as lmms-eval makes them, to the model `mokamm`; run by the Python of an environment with lmms-eval.

python tests/eval/lmms_requests.py RUN DATA     one JSON object on the last line of standard output
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

from data.headers import MediaLimits
from data.sound import sound_track
from data.video import video_frames

Turn = list[dict[str, Any]]


def requests(conversations: list[Any], kind: str = "generate_until", **kwargs: Any) -> list[Instance]:
    """One request a conversation, whose task hands it out as it is."""
    found = []
    for index, conversation in enumerate(conversations):
        arguments = ("?" * index, conversation, dict(kwargs), index, "given", "test")
        metadata = {"task": "given", "doc_id": index, "repeats": 1}
        found.append(Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata))
    return found


def said(text: str, *media: tuple[str, Any]) -> Turn:
    parts = [{"type": kind, "url": value} for kind, value in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def main(run: str, folder: Path) -> dict[str, Any]:
    model = get_model("mokamm").create_from_arg_string(f"run={run}", {"batch_size": 3})
    model.task_dict = {"given": {"test": [None] * 20}}

    def answers(*conversations: Turn, **kwargs: Any) -> list[str]:
        return model.generate_until(requests([lambda _, turn=turn: turn for turn in conversations], **kwargs))

    def refused(call: Any) -> str:
        try:
            return str(call())
        except Exception as error:
            return str(error)

    video, sound = sorted((folder / "videos").iterdir())[0], sorted((folder / "audio").iterdir())[0]
    picture = Image.fromarray(video_frames(video, 1, MediaLimits())[0].permute(1, 2, 0).numpy())
    file = Path(run) / "frame.png"
    picture.save(file)
    samples = {"array": sound_track(sound, MediaLimits()).numpy(), "sampling_rate": 16000}
    images = answers(said("Which shape?", ("image", str(file))), said("Which shape?", ("image", picture)))
    sounds = answers(said("What is heard?", ("audio", str(sound))), said("What is heard?", ("audio", samples)))
    several = [
        said("How many shapes are there?"),
        said("Which shape is in the middle?", ("image", picture)),
        said("Is it red?"),
    ]
    history = [*said("A red ring."), {"role": "assistant", "content": "Yes."}, *said("Which colour?")]

    def rounds(_: Any, round_idx: int = 0, previous_output: Any = None, previous_round_info: Any = None) -> Any:
        return said("Which shape?") if round_idx == 0 else (said("Again?"), round_idx == 2, previous_output, None)

    return {
        "image": dict(zip(("path", "array"), images, strict=True)),
        "sound": dict(zip(("path", "array"), sounds, strict=True)),
        "order": answers(*several),
        "alone": [answers(one)[0] for one in several],
        "history": answers(history)[0],
        "text": answers(said("What is a flute?"))[0],
        "beams": answers(said("What is a flute?"), num_beams=2, max_new_tokens=5)[0],
        "rounds": model.generate_until_multi_round(requests([rounds], "generate_until_multi_round")),
        "bad": answers(said("What?", ("image", "nowhere.png")))[0],
        "sampled": refused(lambda: answers(said("?"), do_sample=True, temperature=0.7)),
        "likelihood": refused(lambda: model.loglikelihood([])),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
