"""The miniature world: determinism of decoded content, truth of the answers, balance, splits that share nothing, files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from data.media import MediaLoader
from data.miniworld.__main__ import main
from data.miniworld.ask import AVQA, IMAGES, NUMBERS, SPOKEN, questions
from data.miniworld.draw import draw_frame
from data.miniworld.german import WORDS, in_german
from data.miniworld.scene import COLOURS, PLAYED_BY, SECONDS, sample_scene
from data.miniworld.sound import RATE, render_sound
from data.miniworld.speech import TEST_VOICES, sample_utterance, speak
from data.miniworld.tell import split_of
from data.miniworld.write import (
    VOICES,
    Request,
    avqa_rows,
    clip_scene,
    event_lines,
    image_rows,
    run_jobs,
    sentences,
    spoken,
    told_rows,
    write_split,
)
from data.schema import Media, UserError
from data.sources import open_source

ROOT = Path(__file__).resolve().parents[2]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_same_seed_gives_the_same_decoded_content_with_any_number_of_processes(tmp_path: Path) -> None:
    one, two = (write_split(tmp_path / name, "train", 3, seed=5, workers=n) for name, n in (("a", 1), ("b", 2)))
    other = write_split(tmp_path / "c", "train", 3, seed=6, workers=1)
    texts = sorted(path.name for path in one.iterdir() if path.suffix in (".json", ".jsonl", ".txt"))
    assert len(texts) == 8
    for name in texts:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    video, sound = "videos/00000002.mp4", "audio/00000002.wav"
    assert np.array_equal(frames_of(one / video), frames_of(two / video))
    assert np.array_equal(soundfile.read(one / sound)[0], soundfile.read(two / sound)[0])
    assert not np.array_equal(frames_of(one / video), frames_of(other / video))
    for speech in sorted((one / "speech").iterdir()):
        assert np.array_equal(soundfile.read(speech)[0], soundfile.read(two / "speech" / speech.name)[0])


def test_annotations_do_not_depend_on_the_process() -> None:
    """Python's string hashes differ from process to process, and with them the order of a set."""
    program = (
        "import hashlib; from data.miniworld.write import *; r = Request('train', 40, 0);"
        "rows = [avqa_rows(r), list(spoken(r)), image_rows(r, 40), told_rows(r, 40)];"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_files_show_and_sound_what_the_scene_says(world: Path) -> None:
    request = Request("train", 8, 0)
    loader = MediaLoader(world / "train")
    for index in range(4):
        scene = clip_scene(request, index)
        frames = loader.frames(Media("video", f"videos/{index:08d}.mp4", "vision"), 10)
        for i, frame in enumerate(frames):
            drawn = draw_frame(scene, i + 0.5).astype(float)
            assert np.abs(frame.permute(1, 2, 0).numpy() - drawn).mean() < 6  # what H.264 costs
        windows = loader.windows(Media("audio", f"audio/{index:08d}.wav", "audio"), 10, 1.0, whole=False)
        heard = render_sound(scene).reshape(SECONDS, RATE)
        assert np.abs(windows.samples.numpy() - heard).max() < 1e-4
        loud = np.sqrt((heard**2).mean(1)) > 0.01
        truth = [any(s.start <= second < s.end for s in scene.sounds) for second in range(SECONDS)]
        assert loud.tolist() == truth


def test_colours_are_where_the_scene_puts_the_shapes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = sample_scene(rng, still=True)
        frame = draw_frame(scene, 5.0).astype(float)
        for thing in scene.things:
            column = {"left": slice(0, 22), "middle": slice(21, 43), "right": slice(42, 64)}[thing.column]
            row = slice(0, 32) if thing.row == "top" else slice(32, 64)
            distance = np.abs(frame[row, column] - np.array(COLOURS[thing.colour])).max(-1)
            assert (distance < 25).sum() > 20, thing


def told_otherwise(scene, kind: str, text: str) -> str:  # type: ignore[no-untyped-def]
    """The answer to a question, worked out from the scene's fields by other means than ask.py's."""
    heard = {PLAYED_BY[s.instrument]: (s.start, s.end) for s in scene.sounds}
    seen = {t.shape: t for t in scene.things}
    words = text.rstrip("?").split()
    number = ["zero", "one", "two", "three", "four"]
    if kind == "audio_counting":
        return number[len(heard)]
    if kind == "visual_counting":
        return number[len(seen)]
    if kind == "av_counting":
        return number[len(heard.keys() & seen.keys())]
    if kind == "visual_location":
        (shape,) = [word for word in words if word in seen]
        return seen[shape].column
    if kind == "av_existential":
        shapes = set(PLAYED_BY.values()) & set(words)
        return "yes" if shapes <= heard.keys() & seen.keys() else "no"
    if kind == "audio_comparative":
        a, b = (heard[PLAYED_BY[word]] for word in words if word in PLAYED_BY)
        return "yes" if a[1] - a[0] > b[1] - b[0] else "no"
    order = sorted(heard, key=lambda shape: heard[shape][0])
    if kind == "av_temporal":
        order = [shape for shape in order if shape in seen]
        return order[0] if "first" in words else order[-1]
    if kind == "av_location":
        shape = order[0] if "first" in words else order[-1]
        return seen[shape].column if shape in seen else "outside"
    assert kind == "av_comparative"
    sides = [word for word in words if word in ("left", "right")]
    a, b = (next(heard.get(t.shape, (0, 0)) for t in scene.things if t.column == side) for side in sides)
    return "yes" if a[1] - a[0] > b[1] - b[0] else "no"


def test_answers_are_true() -> None:
    rng, asked = np.random.default_rng(11), Counter[str]()
    for _ in range(400):
        scene = sample_scene(rng)
        for question in questions(scene, AVQA, rng, base=False):
            assert question.answer == told_otherwise(scene, question.kind, question.text), (scene, question)
            asked[question.kind] += 1
    assert asked.keys() == AVQA.keys()
    assert min(asked.values()) > 50


def test_scenes_are_well_formed() -> None:
    rng = np.random.default_rng(2)
    for _ in range(2000):
        scene = sample_scene(rng)
        assert 1 <= len(scene.things) <= 4
        assert 1 <= len(scene.sounds) <= 4
        assert len({s.start for s in scene.sounds}) == len(scene.sounds)
        assert all(0 <= s.start < s.start + 2 <= s.end <= SECONDS for s in scene.sounds)
        for thing in scene.sounding:
            sound = scene.sound_of(thing.shape)
            assert sound is not None
            assert min(thing.leave, sound.end) > max(thing.enter, sound.start), "seen and heard must meet"


def question_only_gain(train: list[tuple[str, str, str]], test: list[tuple[str, str, str]]) -> float:
    """Accuracy of the best answer for each question text, learnt on one world and tried on another, minus that of the
    majority answer of each type. Rows: (type, text, answer)."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, text, answer in train:
        by_text[text][answer] += 1
        by_type[kind][answer] += 1
    known = [row for row in test if row[1] in by_text]
    text_right = sum(by_text[text].most_common(1)[0][0] == answer for _, text, answer in known)
    majority = Counter((kind, answer) for kind, _, answer in test)
    best = {kind: max(n for (k, _), n in majority.items() if k == kind) for kind in by_type}
    return text_right / len(known) - sum(best.values()) / len(test)


def asked(request: Request) -> dict[str, list[tuple[str, str, str]]]:
    """(type, text, answer) of all that one split asks; of spoken questions, the words that are said."""
    return {
        "clips": [(row["type"], row["question_content"], row["anser"]) for row in avqa_rows(request)],
        "spoken": [
            (row["meta"]["question_type"][1], utterance.text, row["messages"][1]["content"])
            for row, (_, utterance) in spoken(request)
        ],
        "images": [
            ("object", row["messages"][0]["content"][1]["text"], row["messages"][1]["content"])
            for row in image_rows(request, request.num)
        ],
    }


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_question_alone_tells_nothing(split: str) -> None:
    one, other = (asked(Request(split, 1500, seed)) for seed in (0, 1))
    for name in one:
        assert len({text for _, text, _ in one[name]}) > 20, name
        assert abs(question_only_gain(one[name], other[name])) < 0.05, name


def test_answers_are_balanced() -> None:
    rows = asked(Request("train", 1500, 0))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, _, answer in rows["clips"]:
        counts[kind][answer] += 1
    for kind, answers in counts.items():
        assert max(answers.values()) <= 1.15 * min(answers.values()) + 3, (kind, answers)
    yes = Counter(answer for _, _, answer in rows["images"])
    assert abs(yes["yes"] - yes["no"]) <= 2


def test_splits_share_no_scene_and_no_sentence() -> None:
    requests = [Request(split, 150, 0) for split in ("train", "validation", "test")]
    scenes = [{clip_scene(request, i) for i in range(150)} for request in requests]
    said = [{u.text for _, (_, u) in [*spoken(request), *sentences(request, 150)]} for request in requests]
    for groups in (scenes, said):
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
    assert all(split_of(text) == request.split for request, texts in zip(requests, said, strict=True) for text in texts)


def test_test_voices_are_heard_in_the_test_split_only() -> None:
    assert set(VOICES["test"]) == set(TEST_VOICES)
    assert not set(VOICES["train"]) & set(TEST_VOICES)
    assert not set(VOICES["validation"]) & set(TEST_VOICES)


def test_speech_is_deterministic_and_varied() -> None:
    rng = np.random.default_rng(0)
    utterance = sample_utterance(rng, "where is the circle", TEST_VOICES)
    again = speak(utterance)
    speak(sample_utterance(rng, "count the shapes", ("en-us",)))
    assert np.array_equal(again, speak(utterance))
    assert 0.5 < len(again) / RATE < 3
    lengths = {len(speak(sample_utterance(rng, "count the shapes", TEST_VOICES))) for _ in range(5)}
    assert len(lengths) > 1


def test_the_readers_of_the_real_data_sets_read_it(world: Path) -> None:
    folder = world / "test"
    avqa = open_source("music_avqa", folder / "avqa.json", video_dir="videos", audio_dir="audio")
    kinds = {tuple(avqa[i].meta["question_type"]) for i in range(len(avqa))}
    kinds_of_avqa = {kind.type for kind in AVQA.values()}
    assert kinds <= kinds_of_avqa
    assert {media.modality for media in avqa[0].media} == {"vision", "audio"}
    events = open_source("ave", folder / "events.txt", video_dir="videos", audio_dir="audio")
    lines = event_lines(Request("test", 6, 0))[1:]
    assert len(events) == len(lines)
    loader = MediaLoader(folder)
    for name, modality in (("spoken", "speech"), ("transcription", "speech"), ("images", "vision")):
        rows = open_source("messages", folder / f"{name}.jsonl")
        assert len(rows) >= 3
        (media,) = rows[0].media
        assert media.modality == modality
        assert loader.resolve(media).is_file()
    told = open_source("messages", folder / "told.jsonl")
    assert len(told) == 12
    assert all(not row.media and tuple(row.meta["question_type"]) in kinds_of_avqa for row in told)
    question = open_source("messages", folder / "spoken.jsonl")[0]
    assert all(word not in question.prompt[-1].text for word in ("which", "where", "how many"))


def test_german_rows_ask_the_same_in_words_of_their_own(world: Path) -> None:
    english, german = (json.loads((world / "train" / name).read_text()) for name in ("avqa.json", "avqa_german.json"))
    told = ("question_content", "anser")
    for one, other in zip(english, german, strict=True):
        assert {k: v for k, v in one.items() if k not in told} == {k: v for k, v in other.items() if k not in told}
    rng = np.random.default_rng(7)
    pairs = set()
    for _ in range(1500):
        for question in questions(sample_scene(rng), AVQA, rng, base=False):
            said = in_german(question)
            pairs.add(((question.text, said.text), (question.answer, said.answer)))
    texts, answers = ({pair[i] for pair in pairs} for i in (0, 1))
    for found in (texts, answers):  # one to one: nothing is lost in translation
        assert len(found) == len({one for one, _ in found}) == len({other for _, other in found})
    wordings = sum(len(kind.wordings) for kind in AVQA.values())
    assert len({re.sub("|".join(WORDS.values()), "_", other) for _, other in texts}) == wordings
    assert ("Where in the video is the star?", "Wo im Video ist der Stern?") in texts
    assert {other for _, other in answers} >= {"ja", "vier", "Mitte", "außerhalb", "Raute"}


def test_spoken_and_image_kinds_have_all_their_answers() -> None:
    rng = np.random.default_rng(1)
    for kinds, still in ((SPOKEN, False), (IMAGES, True)):
        answers: dict[str, set[str]] = defaultdict(set)
        for _ in range(1500):
            for question in questions(sample_scene(rng, still=still), kinds, rng, base=False):
                answers[question.kind].add(question.answer)
        assert {name: set(kind.answers) for name, kind in kinds.items()} == answers


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--split", "test", "--num", "1", "--workers", "1"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "test" / "DONE.json").read_text())["num"] == 1
    before = (tmp_path / "test" / "DONE.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "test" / "DONE.json").stat().st_mtime_ns == before, "what is there is not made again"
    for name in ("told.jsonl", "avqa_german.json"):
        later = tmp_path / "test" / name
        rows = later.read_bytes()
        later.unlink()  # as in a split of before these rows existed
        assert main(arguments) == 0
        assert later.read_bytes() == rows
    assert (tmp_path / "test" / "DONE.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*arguments[:4], "--num", "2"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--split", "tset", "--num", "2"]) == 2
    assert "train, validation, test" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least 1"):
        write_split(tmp_path, "train", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_told_questions_are_answered_by_the_text_and_are_balanced() -> None:
    """Nobody who reads the question alone does better than chance; no scene is told twice, or in another split too."""
    rows = told_rows(Request("train", 300, 0), 600)
    scenes = [row["messages"][0]["content"][0]["text"] for row in rows]
    assert len(set(scenes)) == len(scenes) == 600
    assert not set(scenes) & {r["messages"][0]["content"][0]["text"] for r in told_rows(Request("test", 100, 0), 200)}
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_type[" ".join(row["meta"]["question_type"])][row["messages"][1]["content"]] += 1
    assert len(by_type) == 9
    for name, answers in by_type.items():
        kind = next(kind for kind in AVQA.values() if " ".join(kind.type) == name)
        assert set(answers) == set(kind.answers), name
        assert max(answers.values()) / sum(answers.values()) < 1.3 / len(kind.answers), name
    for scene, row in zip(scenes, rows, strict=True):
        if row["meta"]["question_type"] == ["Audio", "Counting"]:
            heard = scene.strip().rstrip(".").partition(". ")[2].split(", ")  # things, then sounds
            assert NUMBERS[len(heard)] == row["messages"][1]["content"]


def test_a_killed_process_ends_the_rendering_with_one_message() -> None:
    jobs = [
        partial(signal.raise_signal, number) for number in (signal.SIGINT, signal.SIGKILL)
    ]  # a Ctrl-C is not its own
    with pytest.raises(UserError, match="a process that renders was killed"):
        run_jobs(jobs, 2, "jobs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_rendering_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "data.miniworld", "--out", str(tmp_path), "--split", "train", "--num", "400"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list(tmp_path.glob(".train.*.unfinished/videos/*")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "stopped" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_another_process_has_made_meanwhile_is_taken(tmp_path: Path, monkeypatch) -> None:
    def render(folder: Path, request: Request, workers: int) -> None:
        monkeypatch.undo()
        write_split(tmp_path, "test", 2, workers=1)

    monkeypatch.setattr("data.miniworld.write._fill", render)
    assert write_split(tmp_path, "test", 2) == tmp_path / "test"
    assert (tmp_path / "test" / "DONE.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
