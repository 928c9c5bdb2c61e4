"""Each benchmark's data as its publishers ship them, in miniature: what is asked, of which media, and the true answer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from data.schema import BadSample, UserError
from eval.benchmarks import BENCHMARKS, Row, find_benchmark
from eval.benchmarks.fields import take_apart
from eval.benchmarks.multiple_choice import lettered
from eval.benchmarks.questions import read_table


def load(benchmark: str, path: Path, **options: Any) -> list[Row]:
    return find_benchmark(benchmark).load(path, options=options)


def asked(row: Row) -> tuple[str, list[tuple[str, str, str]], str]:
    """The question (its marked part), the media as (kind, path, modality), and the true answer."""
    assert row.sample is not None, row.error
    parts = row.sample.prompt[-1].content
    question = "".join(part.text for part in parts if getattr(part, "question", False))
    return question, [(m.kind, m.path, m.modality) for m in row.sample.media], row.answer


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pope(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"image": "x"},
    ]
    first, second = load("pope", lines(tmp_path / "coco_pope_random.json", rows))
    assert asked(first) == ("Is there a dog in the image?", [("image", "COCO_1.jpg", "vision")], "yes")
    assert first.sample is not None
    assert first.sample.prompt[-1].text == "Is there a dog in the image?\nAnswer with yes or no."
    assert first.sample.prompt[-1].content[0] == first.sample.media[0]  # the image stands before the question
    assert "'text' is missing" in (second.error or "")


def test_mme(tmp_path: Path) -> None:
    for folder in ("count", "posters/images", "posters/questions_answers_YN"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "count/1.jpeg").write_bytes(b"")
    (tmp_path / "count/1.txt").write_bytes(
        "\ufeffTwo\u2028dogs?\tPlease answer yes or no.\tYes\r\nThree? Please answer yes or no. \t No\r\n".encode()
    )
    (tmp_path / "posters/images/tt1.png").write_bytes(b"")
    (tmp_path / "posters/questions_answers_YN/tt1.txt").write_bytes(b"Is it Heat\xe9?\tYes\nno tab here\n\tYes\n")
    rows = load("mme", tmp_path)
    image = [("image", "count/1.jpeg", "vision")]
    assert asked(rows[0]) == ("Two\u2028dogs?\tPlease answer yes or no.", image, "Yes")
    assert asked(rows[1]) == ("Three? Please answer yes or no.", image, "No")
    assert asked(rows[2]) == ("Is it Heat\ufffd?", [("image", "posters/images/tt1.png", "vision")], "Yes")
    assert len({row.id for row in rows}) == len(rows)
    assert [row.meta.get("subtask") for row in rows] == ["count", "count", "posters", None, None]
    assert "no tab here" in (rows[3].error or "")
    assert rows[4].error is not None
    assert rows[0].unit == rows[1].unit == "count/1.jpeg"
    rows[0].prediction, rows[1].prediction, rows[2].prediction = "Yes", "no", "no"
    assert BENCHMARKS["mme"].score(rows)["score"] == 200.0  # count 100 + 100, posters 0


def mmbench(tmp_path: Path) -> Path:
    picture = base64.b64encode(b"a picture").decode()
    table = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"],
        ["7", "Which?", "look closely", "cat", "dog", "cow", "", "C", "nature", picture, "x"],
        ["8", "What?", "nan", "one", "two", "", "", "A", "count", "7", "x"],
        ["9", "What?", "", "one", "two", "", "", "D", "count", picture, "x"],
        ["ten", "What?", "", "one", "two", "", "", "A", "count", picture, "x"],
    ]
    path = tmp_path / "mmbench_dev.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in table))
    return path


def test_mmbench(tmp_path: Path) -> None:
    rows = load("mmbench", mmbench(tmp_path))
    question = "look closely\nWhich?\nA. cat\nB. dog\nC. cow"
    assert asked(rows[0]) == (question, [("image", "mmbench_dev.images/7.jpg", "vision")], "C")
    assert (tmp_path / "mmbench_dev.images/7.jpg").read_bytes() == b"a picture"
    assert asked(rows[1])[1] == [("image", "mmbench_dev.images/7.jpg", "vision")]
    assert rows[1].unit == rows[0].unit
    assert "is none of the 2 options" in (rows[2].error or "")
    assert "'index' must be a number" in (rows[3].error or "")


def test_mmbench_asks_every_pass(tmp_path: Path) -> None:
    rows = [row for row in load("mmbench", mmbench(tmp_path), circular=True) if row.error is None]
    assert [(row.meta["index"], row.answer) for row in rows] == [
        (7, "C"), (1000007, "B"), (2000007, "A"), (8, "A"), (1000008, "B"),
    ]  # fmt: skip
    assert asked(rows[2])[0].endswith("A. cow\nB. cat\nC. dog")
    assert {row.unit for row in rows[:3]} == {"mmbench_dev.images/7.jpg"}
    for row in rows:
        row.prediction = "cow" if row.meta["index"] % 1000000 == 7 else "A"
    figures = BENCHMARKS["mmbench"].score(rows)["rules"]["strict"]
    assert (figures["circular"], figures["vanilla"], figures["questions"]) == (0.5, 1.0, 2)


def test_mmbench_replaces_pictures_that_are_torn_or_of_another_table(tmp_path: Path) -> None:
    path, picture = mmbench(tmp_path), tmp_path / "mmbench_dev.images/7.jpg"
    load("mmbench", path)
    first = picture.stat().st_ino
    load("mmbench", path)
    assert picture.stat().st_ino == first  # the same picture is left alone
    picture.write_bytes(b"a pic")
    load("mmbench", path)
    assert picture.read_bytes() == b"a picture"
    assert [file.name for file in picture.parent.glob(".*")] == []


def test_scoring_writes_no_pictures(tmp_path: Path) -> None:
    load("mmbench", mmbench(tmp_path), **BENCHMARKS["mmbench"].truth_options)
    assert not (tmp_path / "mmbench_dev.images").exists()


def test_seed_bench(tmp_path: Path) -> None:
    row = {
        "question_id": "1",
        "question": "How many?",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "3",
        "choice_d": "4",
    }
    row |= {"answer": "B", "data_type": "image", "data_id": "45_22", "question_type_id": 1}
    others = [row | {"data_type": "video", "data_id": "v"}, row | {"data_type": "audio", "data_id": "s"}, "no object"]
    del row["data_type"]  # the dimension tells then
    others += [row | {"question_type_id": number, "data_id": str(number)} for number in (0, "9", 10)]
    whole = {"questions": [row | {"data_type": "image"}, *others], "question_type": {"Scene Understanding": 1}}
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps(whole))
    first, bad, nine = load("seed_bench", path)
    assert asked(first) == ("How many?\nA. One\nB. Two\nC. 3\nD. 4", [("image", "45_22", "vision")], "B")
    assert (first.id, first.meta["dimension"], first.meta["image_path"]) == ("1", "Scene Understanding", "45_22")
    assert "expected a JSON object, found 'no object'" in (bad.error or "")
    assert (nine.unit, nine.meta["dimension"]) == ("9", None)
    first.prediction = "B"
    table = BENCHMARKS["seed_bench"].score([first, nine])["metrics"]["dimension"]
    assert table == {"Scene Understanding": {"rows": 1, "accuracy": 1.0}}
    path.write_text(json.dumps({"questions": [row]}))
    assert [found.meta["dimension"] for found in load("seed_bench", path)] == [None]


def test_mmau(tmp_path: Path) -> None:
    row = {"id": "u1", "audio_id": "./test-mini-audios/u1.wav", "question": "Who speaks?", "choices": ["Man", "Woman"]}
    row |= {"answer": "Woman", "task": "speech", "difficulty": "easy"}
    path = tmp_path / "mmau-test-mini.json"
    path.write_text(json.dumps([row, row | {"task": "music"}]))
    speech, music = load("mmau", path, speech_as="speech")
    assert asked(speech) == ("Who speaks?\nA. Man\nB. Woman", [("audio", "test-mini-audios/u1.wav", "speech")], "B")
    assert asked(music)[1][0][2] == "audio"
    assert asked(load("mmau", path)[0])[1][0][2] == "audio"
    path.write_text(json.dumps([row | {"choices": ["(A) Man", "(B) Woman"]}]))  # as they are shown, once
    assert asked(load("mmau", path)[0])[::2] == ("Who speaks?\nA. Man\nB. Woman", "B")


def test_air_bench(tmp_path: Path) -> None:
    row = {
        "path": "1.wav",
        "question": "Mood?",
        "choice_a": "sad",
        "choice_b": "glad",
        "choice_c": None,
        "answer_gt": "glad",
    }
    row |= {"task_name": "Speaker_Emotion_Recontion", "dataset_name": "meld", "uniq_id": 5}
    sound = row | {"task_name": "Audio_Grounding", "dataset_name": "g"}
    path = tmp_path / "Foundation_meta.json"
    path.write_text(json.dumps([row, sound, sound | {"task_name": "Sound_AQA"}]))
    (speech,) = load("air_bench", path)
    place = ("audio", "Speaker_Emotion_Recontion_meld/1.wav", "speech")
    assert asked(speech) == ("Mood?\nA. sad\nB. glad", [place], "B")
    assert (speech.id, speech.meta["path"]) == ("5", "1.wav")
    speech.prediction = "glad"
    assert BENCHMARKS["air_bench"].score([speech])["score"] == 1.0
    assert asked(load("air_bench", path, speech_as="audio")[0])[1][0][2] == "audio"
    _, grounding, aqa = load("air_bench", path, tasks="all")
    assert asked(grounding)[1] == [("audio", "Audio_Grounding_g/1.flac", "audio")]
    assert asked(aqa)[1] == [("audio", "Sound_AQA_g/1.wav", "audio")]


# the 25 folders of Foundation/, as published, without their data sets' names
AIR_BENCH_SPEECH = [
    "Speaker_Age_Prediction", "Speaker_Emotion_Recontion", "Speaker_Gender_Recognition",
    "Speaker_Intent_Classification", "Speaker_Number_Verification", "Speech_Entity_Reconition", "Speech_Grounding",
    "Spoken_Language_Identification", "Synthesized_Voice_Detection",
]  # fmt: skip
AIR_BENCH_OTHERS = [
    "Acoustic_Scene_Classification", "Audio_Grounding", "Sound_AQA", "vocal_sound_classification", "Music_AQA",
    "Music_Genre_Recognition", "Music_Instruments_Classfication", "Music_Midi_Pitch_Analysis",
    "Music_Midi_Velocity_Analysis", "Music_Mood_Recognition",
]  # fmt: skip


def test_air_bench_asks_all_nine_speech_tasks_and_no_task_vanishes(tmp_path: Path) -> None:
    row = {
        "path": "1.wav",
        "question": "?",
        "choice_a": "one",
        "choice_b": "two",
        "answer_gt": "one",
        "dataset_name": "d",
    }
    path = tmp_path / "Foundation_meta.json"

    def tasks(*names: str | None) -> list[Any]:
        path.write_text(json.dumps([row | {"task_name": name} for name in names]))
        return [found.meta.get("task_name", found.error) for found in load("air_bench", path)]

    assert tasks(*AIR_BENCH_SPEECH, *AIR_BENCH_OTHERS) == AIR_BENCH_SPEECH
    corrected = [
        "Emotion_Recognition",
        "Speaker_Emotion_Recognition",
        "Speech_Entity_Recognition",
        "Intent_Classification",
    ]
    assert tasks(*corrected, "Music_Instruments_Classification") == corrected
    assert "'task_name' is missing" in tasks(None)[0]
    with pytest.raises(UserError, match="Speech_Groundin, X; did you mean 'Speech_Grounding'"):
        tasks("X", "Speech_Groundin")
    assert len(load("air_bench", path, tasks="all")) == 2


def test_ave_and_music_avqa(tmp_path: Path) -> None:
    (tmp_path / "testSet.txt").write_text("Church bell&RUhOCu3LNXM&good&0&10\n")
    (ave,) = load("ave", tmp_path / "testSet.txt")
    assert asked(ave)[1:] == (
        [("video", "AVE/RUhOCu3LNXM.mp4", "vision"), ("audio", "AVE/RUhOCu3LNXM.mp4", "audio")],
        "Church bell, from 0 to 10 seconds",
    )
    row = {
        "video_id": "00000093",
        "question_id": 9,
        "type": '["Audio", "Counting"]',
        "question_content": "How many <Object>?",
    }
    (tmp_path / "avqa-test.json").write_text(json.dumps([row | {"templ_values": '["flutes"]', "anser": "two"}]))
    (music,) = load("music_avqa", tmp_path / "avqa-test.json")
    media = [("video", "videos/00000093.mp4", "vision"), ("audio", "videos/00000093.mp4", "audio")]
    assert asked(music) == ("How many flutes?", media, "two")


def test_librispeech(tmp_path: Path) -> None:
    folder = tmp_path / "1089" / "134686"
    folder.mkdir(parents=True)
    (folder / "1089-134686.trans.txt").write_bytes(
        b"1089-134686-0000 HE HOPED\xe2\x80\xa8THERE\r\n 1089-134686-0001  CAF\xc9 \n1089-134686-0002\n"
    )
    (folder / "notes.txt").write_text("1089-134686-0003 NOT READ\n")
    good, spaced, bad = load("librispeech", tmp_path)
    assert asked(good)[1:] == ([("audio", "1089/134686/1089-134686-0000.flac", "speech")], "HE HOPED\u2028THERE")
    assert asked(spaced)[1:] == ([("audio", "1089/134686/1089-134686-0001.flac", "speech")], "CAF\ufffd")
    assert good.unit == spaced.unit == "1089-134686"
    assert "expected `ID WORDS`, found '1089-134686-0002'" in (bad.error or "")


@pytest.mark.parametrize(
    ("row", "unit"),
    [
        ({"audio_filepath": "/a/1089-134686-0000.flac", "id": "x", "text": "a", "pred_text": "a"}, "1089-134686"),
        ({"id": "1089-134686-0001", "text": "a", "pred_text": "a"}, "1089-134686"),
        ({"id": "solo", "text": "a", "pred_text": "a"}, "solo"),
        ({"id": "1089-134686-0001", "prediction": "a", "answer": "a", "unit": "own-unit"}, "own-unit"),
    ],
)
def test_recordings_of_a_chapter_are_drawn_together(row: dict[str, Any], unit: str) -> None:
    assert BENCHMARKS["librispeech"].from_record(take_apart(row), 0).unit == unit


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"audio_filepath": "a.flac", "text": " hello there\n"}, "a.flac"),
        ({"key": "k", "source": "a.flac", "target": "hello there"}, "k"),
        ({"id": 1, "speech": "a.flac", "transcript": "hello there", "language": "de"}, "1"),
        ({"id": "i", "key": "k", "wav": "a.flac", "sentence": "hello there", "answer": "no"}, "i"),
        ({"audio_filepath": "a.flac", "path": "b", "audio": "c", "text": "hello there", "transcript": "no"}, "a.flac"),
        ({"path": "a.flac", "answer": "hello there"}, "a.flac"),
    ],
)
def test_manifests(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    (only,) = load("asr", lines(tmp_path / "m.jsonl", [row]))
    assert asked(only)[1:] == ([("audio", "a.flac", "speech")], "hello there")
    assert (only.id, only.meta["audio"]) == (name, "a.flac")


@pytest.mark.parametrize("row", [{"audio": "a.flac"}, {"text": "hello"}, {"audio": "a.flac", "text": 3}])
def test_manifests_without_a_path_or_a_text(tmp_path: Path, row: dict[str, Any]) -> None:
    (only,) = load("asr", lines(tmp_path / "m.jsonl", [row]))
    assert "expected a path under audio_filepath" in (only.error or "")


def test_audiocaps(tmp_path: Path) -> None:
    table = 'audiocap_id,youtube_id,start_time,caption\n1,abc,10,A dog barks\n2,abc,10,"Barking, loud"\n3,xyz,0,Rain\n'
    (tmp_path / "test.csv").write_text(table)
    rows = load("audiocaps", tmp_path / "test.csv", name="Y{youtube_id}.wav")
    assert asked(rows[0])[1:] == ([("audio", "Yabc.wav", "audio")], "A dog barks")
    assert [row.meta["references"] for row in rows] == [["A dog barks", "Barking, loud"], ["Rain"]]
    rows[0].prediction, rows[1].prediction = "barking loud", "rain"
    # clip 2 has no bigram, so that only its unigrams are alike; clip 1 has two of its four orders in one of two captions
    assert BENCHMARKS["audiocaps"].score(rows)["score"] == pytest.approx((10 * 2 / 4 / 2 + 10 * 1 / 4) / 2)


def test_audiocaps_tells_clips_of_one_video_apart_and_leaves_out_what_is_empty(tmp_path: Path) -> None:
    table = "1,ab,10,A dog barks\n2,ab,40,Rain\n3,cd,0, \n4,cd,0,Wind\n5,ef,0\n"
    path = tmp_path / "test.csv"
    path.write_text(f"audiocap_id,youtube_id,start_time,caption\n{table}")
    rows = load("audiocaps", path)
    assert [asked(row)[1][0][1] for row in rows] == ["ab.wav", "ab.wav", "cd.wav", "ef.wav"]
    assert [row.meta["references"] for row in rows] == [["A dog barks"], ["Rain"], ["Wind"], []]
    assert [row.meta["audiocap_ids"] for row in rows] == [["1"], ["2"], ["3", "4"], ["5"]]
    assert [row.error is None for row in rows] == [True, True, True, False]
    named = load("audiocaps", path, name="{audiocap_id}.wav")
    assert [asked(row)[1][0][1] for row in named] == ["1.wav", "2.wav", "3.wav", "5.wav"]
    path.write_text("youtube_id,caption\nab,Rain\n")
    assert load("audiocaps", path)[0].meta["audiocap_ids"] == []


def test_sets_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {
            "question": "Colour?",
            "choices": ["red", "blue"],
            "answer": 1,
            "image": "i.png",
            "speech": "s.wav",
            "video": None,
        },
        {
            "id": "q2",
            "question": "Colour?",
            "options": ["red", "blue"],
            "answer": "red",
            "video": ["a.mp4", "b.mp4"],
            "category": "hue",
        },
        {"question": "Colour?", "choices": ["red", "blue"], "answer": "green"},
        {"question": "Colour?", "choices": "red"},
        {"question": "Colour?", "choices": ["red"], "answer": "red", "image": [1]},
        {"question": "How many?", "choices": [1, 2], "answer": "A"},
        {"question": "How many?", "choices": ["None", "one"]},
    ]
    path = lines(tmp_path / "mine.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n" + '{"a":' * 100_000 + "\n")
    first, second, *bad = load("multiple_choice", path)
    media = [("image", "i.png", "vision"), ("audio", "s.wav", "speech")]
    assert asked(first) == ("Colour?\nA. red\nB. blue", media, "B")
    assert (second.id, asked(second)[2], len(asked(second)[1])) == ("q2", "A", 2)
    assert second.meta["category"] == "hue"
    assert all(row.error for row in bad)
    assert len(bad) == 7
    row = '{"question": "Red\u2028?", "answer": "yes", "audio": "a.wav"}'
    for text in (f"{row}\n", f"\ufeff\n {row} \n\n", f"\n [{row}]"):
        path.write_text(text, encoding="utf-8")
        (yes,) = load("yes_no", path)
        assert (yes.id, asked(yes)) == ("0", ("Red\u2028?", [("audio", "a.wav", "audio")], "yes"))
    path.write_text("".join(row.replace('"yes"', truth) + "\n" for truth in ("true", "false", "null")))
    assert [row.sample and asked(row)[2] for row in load("yes_no", path)] == ["yes", "no", None]


def test_there_are_letters_for_ten_options() -> None:
    own = BENCHMARKS["multiple_choice"]
    ten = [f"option {k}" for k in range(10)]
    sample = own.prompt({"question": "Which?", "choices": ten, "answer": "option 9"}, 0)
    assert (sample.answer, sample.meta["choices"]) == ("J", ten)
    assert sample.prompt[-1].text.endswith("J. option 9\nAnswer with the option's letter.")
    for answer in (True, -1, 10):  # neither the number of an option nor its text
        with pytest.raises(BadSample, match="is none of the 10 options"):
            own.prompt({"question": "Which?", "choices": ten, "answer": answer}, 0)
    assert lettered({"choice_a": 0, "choice_b": "one", "choice_c": None}) == ["0", "one"]
    with pytest.raises(BadSample, match="11 options; there are letters for 10"):
        own.prompt({"question": "Which?", "choices": [*ten, "more"], "answer": "A"}, 0)


def test_a_table_of_any_make(tmp_path: Path) -> None:
    long = "x" * 200_000  # above csv's own limit
    (tmp_path / "t.csv").write_bytes(f'\ufeffa,b\r\n"one\r\ntwo",{long}\r\n'.encode())
    assert read_table(tmp_path / "t.csv", ",", ("a", "b")) == [{"a": "one\r\ntwo", "b": long}]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not name.startswith("miniworld_")])
def test_absent_data_say_where_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such annotation file.*(get |write a )"):
        load(name, tmp_path / "absent")


@pytest.mark.parametrize("name", ["mme", "librispeech"])
def test_folders_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="holds no"):
        load(name, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        load(name, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mmbench", "index\tquestion\n1\tx\n", "has no column A, B, answer, image"),
        ("seed_bench", "[]", 'expected {"questions"'),
        ("seed_bench", '{"questions": 3}', 'expected {"questions"'),
        ("seed_bench", "{", "is not JSON"),
        ("seed_bench", '{"a": "one\u2028two",\n oops}', "line 2, column 2: .*; found 'oops}'"),
        ("air_bench", "{}", "expected a JSON array"),
        ("audiocaps", "", "has no column youtube_id, caption; found: nothing"),
        ("audiocaps", "x,y\n1,2\n", "has no column youtube_id, caption"),
        ("multiple_choice", "\n", "holds no rows"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(name, path)


def test_absolute_paths_of_mokas_files_are_looked_for_in_the_media_folder(tmp_path: Path) -> None:
    (tmp_path / "media/clips").mkdir(parents=True)
    (tmp_path / "media/clips/7.mp4").touch()
    row = {"video_id": "7", "question": "Is it loud?", "answer": "yes", "video_path": "/old/clips/7.mp4"}
    path = tmp_path / "rows" / "test.json"
    path.parent.mkdir()
    path.write_text(json.dumps([row]))
    found = find_benchmark("music_avqa").load(path, media_dir=tmp_path / "media")
    assert found[0].sample is not None
    assert [medium.path for medium in found[0].sample.media] == ["clips/7.mp4"] * 2
