"""Readers against rows written as they are published, and every way in which a row or a file can be wrong."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.schema import BadSample, Media, Message, Text, UserError
from data.sources import open_source
from data.sources.ave import format_event, parse_event

AVQA = {
    "video_id": "00001234",
    "question_id": 17,
    "type": '["Audio-Visual", "Counting"]',
    "question_content": "How many <Object> in the <LL> are sounding in the video?",
    "templ_values": '["flute", "left part"]',
    "question_deleted": 0,
    "anser": "two",
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def jsonl(path, *rows):
    return write(path, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


# --- MUSIC-AVQA


def test_music_avqa_as_published(tmp_path):
    path = write(tmp_path / "train.json", [AVQA, {**AVQA, "question_id": 18, "templ_values": '["horn", "middle"]'}])
    rows = open_source("music_avqa", path)
    assert len(rows) == 2
    sample = rows[0]
    assert sample.messages == (
        Message(
            "user",
            (
                Media("video", "videos/00001234.mp4", "vision"),
                Media("audio", "videos/00001234.mp4", "audio"),
                Text("How many flute in the left part are sounding in the video?", question=True),
            ),
        ),
        Message("assistant", (Text("two"),)),
    )
    assert sample.meta == {"question_type": ["Audio-Visual", "Counting"], "question_id": 17, "video_id": "00001234"}
    assert (sample.id, sample.source, sample.row, sample.answer) == ("00001234-17", "music_avqa", 0, "two")
    assert rows[1].prompt[0].text == "How many horn in the middle are sounding in the video?"


def test_music_avqa_options(tmp_path):
    path = write(tmp_path / "train.json", [AVQA])
    rows = open_source("music_avqa", path, video_dir="v", audio_dir="a", instruction="Answer with one word.")
    assert rows[0].messages[0].content[:3] == (
        Media("video", "v/00001234.mp4", "vision"),
        Media("audio", "a/00001234.wav", "audio"),
        Text("Answer with one word.\n", question=False),
    )


def test_music_avqa_correct_spelling_and_plain_lists(tmp_path):
    row = {k: v for k, v in AVQA.items() if k != "anser"} | {"answer": 2, "type": ["Audio", "Counting"]}
    row |= {"question_content": "How many?", "templ_values": []}
    sample = open_source("music_avqa", write(tmp_path / "a.json", [row]))[0]
    assert sample.answer == "2"
    assert sample.meta["question_type"] == ["Audio", "Counting"]


def test_music_avqa_in_mokas_own_files(tmp_path):
    """The question is whole, the media are named by paths of another machine."""
    for name in ("set/videos/1.mp4", "set/audio/1.mp3", "2.mp4"):
        write(tmp_path / "media" / name, "")
    row = {"video_id": "1", "question_id": 5, "type": '["Audio"]', "question": "Is <it> loud?", "answer": "yes"}
    named = {"video_path": "/data/old/set/videos/1.mp4", "audio_path": "/data/old/set/audio/1.mp3"}
    rows = open_source(
        "music_avqa",
        write(
            tmp_path / "a.json",
            [
                row | named,
                row,
                row | {"video_path": "2.mp4"},
                row | {"video_path": "/old/3.mp4"},
                row | {"video_path": "/x/../2.mp4"},
                row | {"video_path": f"/old/{'x' * 300}.mp4"},
            ],
        ),
        media_dir=tmp_path / "media",
    )
    assert [[medium.path for medium in sample.media] for sample in rows] == [
        ["set/videos/1.mp4", "set/audio/1.mp3"],
        ["videos/1.mp4", "videos/1.mp4"],
        ["2.mp4", "2.mp4"],
        ["/old/3.mp4", "/old/3.mp4"],  # the loader refuses it, and says what to do
        ["/x/../2.mp4", "/x/../2.mp4"],
        [f"/old/{'x' * 300}.mp4"] * 2,
    ]
    assert rows[0].prompt[0].text == "Is <it> loud?"
    assert rows[0].answer == "yes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anser": ""}, "the row has no answer: 'anser' is missing or empty"),
        ({"anser": None}, "the row has no answer"),
        ({"video_id": None}, "'video_id' is missing"),
        ({"question_content": "How?"}, "the question has 0 placeholders, but templ_values 2 values"),
        ({"templ_values": '["flute"'}, "'templ_values' holds no JSON list"),
        ({"type": "{}"}, "'type' must be a list of texts"),
    ],
)
def test_music_avqa_broken_rows(tmp_path, change, message):
    path = write(tmp_path / "train.json", [AVQA, AVQA | change, "text"])
    rows = open_source("music_avqa", path)
    assert rows[0].answer == "two"
    with pytest.raises(BadSample, match=rf"train\.json, row 1: {message}"):
        rows[1]
    with pytest.raises(BadSample, match=r"train\.json, row 2: expected an object, found a string"):
        rows[2]


# --- AVE


ANNOTATIONS = """Category&VideoID&Quality&StartTime&EndTime
Church bell&RUhOCu3LNXM&good&0&10
Male speech, man speaking&-_abc&good&2&7
"""


@pytest.mark.parametrize("text", [ANNOTATIONS, ANNOTATIONS.split("\n", 1)[1]])
def test_ave_as_published(tmp_path, text):
    rows = open_source("ave", write(tmp_path / "Annotations.txt", text))
    assert len(rows) == 2
    sample = rows[1]
    assert sample.answer == "Male speech, man speaking, from 2 to 7 seconds"
    assert sample.prompt[0].content == (
        Media("video", "videos/-_abc.mp4", "vision"),
        Media("audio", "videos/-_abc.mp4", "audio"),
        Text("Which event is seen and heard together, and when?", question=True),
    )
    assert sample.meta == {"category": "Male speech, man speaking", "start": 2, "end": 7, "video_id": "-_abc"}
    assert parse_event(sample.answer) == ("Male speech, man speaking", 2, 7)


def test_ave_finds_the_folder_of_the_published_archive(tmp_path):
    path = write(tmp_path / "data" / "trainSet.txt", ANNOTATIONS)
    (tmp_path / "data" / "videos").mkdir()
    (tmp_path / "elsewhere" / "AVE").mkdir(parents=True)

    def first(**options):
        return open_source("ave", path, **options)[0].media[0].path

    assert first() == "videos/RUhOCu3LNXM.mp4"
    assert first(media_dir=tmp_path / "elsewhere") == "AVE/RUhOCu3LNXM.mp4"
    assert first(media_dir=tmp_path / "elsewhere", video_dir="v") == "v/RUhOCu3LNXM.mp4"
    (tmp_path / "data" / "AVE").mkdir()
    assert first() == "AVE/RUhOCu3LNXM.mp4"


def test_ave_in_mokas_own_files(tmp_path):
    row = {"event": "Horn", "vid": "x1", "start_time": 1, "end_time": "4"}
    write(tmp_path / "clips" / "x1.mp4", "")
    rows = open_source("ave", write(tmp_path / "a.json", [row, row | {"video_path": "/old/clips/x1.mp4"}]))
    assert [sample.answer for sample in rows] == ["Horn, from 1 to 4 seconds"] * 2
    assert [sample.media[1].path for sample in rows] == ["videos/x1.mp4", "clips/x1.mp4"]


def test_ave_json(tmp_path):
    row = {"category": "Horn", "video_id": "x1", "start": 1.5, "end": 4}
    rows = open_source("ave", write(tmp_path / "a.json", [row, row | {"end": "soon"}]), audio_dir="audio")
    assert rows[0].answer == "Horn, from 1.5 to 4 seconds"
    assert rows[0].media[1] == Media("audio", "audio/x1.wav", "audio")
    with pytest.raises(BadSample, match=r"a\.json, row 1: 'end' must be a number of seconds, found 'soon'"):
        rows[1]


def test_ave_broken_rows_and_files(tmp_path):
    rows = open_source(
        "ave", write(tmp_path / "a.txt", ANNOTATIONS + "Bell&x&good&5\nBell&x&good&5&5\nBell&x&good&nan&5\n")
    )
    with pytest.raises(BadSample, match=r"a\.txt, row 2: expected the 5 fields Category&VideoID.*found 4"):
        rows[2]
    with pytest.raises(BadSample, match=r"row 3: the event's range is empty: from 5 to 5"):
        rows[3]
    with pytest.raises(BadSample, match=r"row 4: 'start' must be a number of seconds"):
        rows[4]
    rows = open_source("ave", write(tmp_path / "a.json", [{"category": "Bell", "video_id": "x", "start": 10**400}]))
    with pytest.raises(BadSample, match=r"row 0: 'start' must be a number of seconds"):
        rows[0]
    with pytest.raises(UserError, match=r"b\.txt: is neither JSON nor AVE's annotations; .* found 'hello'"):
        open_source("ave", write(tmp_path / "b.txt", "hello\n"))
    with pytest.raises(UserError, match=r"c\.txt: holds no annotations"):
        open_source("ave", write(tmp_path / "c.txt", ANNOTATIONS.split("\n")[0]))


@given(
    category=st.from_regex(r"[A-Z][a-z]+( [a-z]+)?(, [a-z]+)?", fullmatch=True),
    start=st.integers(0, 9),
    length=st.integers(1, 9),
)
def test_events_survive_writing_and_parsing(category, start, length):
    text = format_event(category, start, start + length)
    assert parse_event(text) == (category, start, start + length)
    assert parse_event(f" {text.upper()}. ") == (category.upper(), start, start + length)


@pytest.mark.parametrize(
    "text", ["", "Bell", "Bell, from 5 to 2 seconds", "from 1 to 2 seconds", "Bell, from a to b seconds"]
)
def test_what_is_no_event(text):
    assert parse_event(text) is None


# --- messages


def user(*parts):
    return {"role": "user", "content": list(parts)}


def said(text):
    return {"role": "assistant", "content": text}


QUESTION = {"type": "text", "text": "What is heard?"}


def test_messages_with_every_kind_of_content(tmp_path):
    row = {
        "id": "a1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            user(
                {"type": "video", "path": "c.mp4"},
                {"type": "audio", "path": "c.mp4"},
                {"type": "audio", "path": "q.wav", "as": "speech"},
                {"type": "image", "path": "p.png"},
                {"type": "text", "text": "Look. "},
                QUESTION | {"question": True},
            ),
            said("A flute."),
        ],
        "meta": {"k": 1},
        "split": "x",
    }
    rows = open_source("messages", jsonl(tmp_path / "m.jsonl", row))
    sample = rows[0]
    assert sample.messages == (
        Message("system", (Text("Be brief."),)),
        Message(
            "user",
            (
                Media("video", "c.mp4", "vision"),
                Media("audio", "c.mp4", "audio"),
                Media("audio", "q.wav", "speech"),
                Media("image", "p.png", "vision"),
                Text("Look. "),
                Text("What is heard?", question=True),
            ),
        ),
        Message("assistant", (Text("A flute."),)),
    )
    assert (sample.id, sample.meta) == ("a1", {"k": 1, "split": "x"})


def test_media_under_the_keys_of_hugging_face_chats_and_the_modality_of_a_source(tmp_path):
    content = [
        {"type": "video", "video": "c.mp4"},
        {"type": "image", "url": "p.png", "path": None, "image": None, "as": None},
        {"type": "audio", "audio": "a.wav"},
        {"type": "audio", "path": "b.wav", "as": "audio"},
        QUESTION,
    ]
    path = jsonl(tmp_path / "m.jsonl", {"messages": [user(*content), said("A.")]})
    expected = [Media("video", "c.mp4", "vision"), Media("image", "p.png", "vision"), Media("audio", "a.wav", "audio")]
    expected += [Media("audio", "b.wav", "audio")]
    assert list(open_source("messages", path)[0].media) == expected
    expected[2] = Media("audio", "a.wav", "speech")
    assert list(open_source("messages", path, audio_as="speech")[0].media) == expected


def test_a_conversation_becomes_one_sample_an_answer(tmp_path):
    talk = {"id": "t", "messages": [user(QUESTION), said("A."), {"role": "user", "content": "And now?"}, said("B.")]}
    single = {"messages": [{"role": "user", "content": "Hi"}, said("Ho")]}
    for path in (jsonl(tmp_path / "m.jsonl", talk, "", single), write(tmp_path / "m.json", [talk, single])):
        rows = open_source("messages", path)
        assert [sample.answer for sample in rows] == ["A.", "B.", "Ho"]
        assert [sample.id for sample in rows][:2] == ["t#0", "t#1"]
        assert [sample.row for sample in rows] == [0, 1, 2]
        assert rows[0].prompt == (Message("user", (Text("What is heard?", question=True),)),)
        assert rows[1].prompt == (
            Message("user", (Text("What is heard?"),)),  # history is plain: no keys from an earlier question
            Message("assistant", (Text("A."),)),
            Message("user", (Text("And now?", question=True),)),
        )
        again = pickle.loads(pickle.dumps(rows))
        assert list(again) == list(rows)
        assert len(rows.head(2)) == 2
    assert [s.answer for s in open_source("messages", tmp_path / "m.jsonl", limit=2)] == ["A.", "B."]


GOOD = {"messages": [user(QUESTION), said("A.")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', r"line 3, column 15: is not JSON \(Expecting value\); found '\{\"messages\": \['"),
        ("[1]", 'expected {"messages".*found an array'),
        ({"text": "x"}, r"there is no 'messages' \(the row has: text\)"),
        ({"mesages": []}, "there is no 'messages' .*is 'messages' called 'mesages' there"),
        ({"messages": []}, "the row has no answer"),
        ({"messages": [user(QUESTION)]}, "the row has no answer: none of its messages is the assistant's"),
        ({"messages": [user(QUESTION), said(" ")]}, "message 1: the answer is empty"),
        ({"messages": [user(QUESTION), user(QUESTION), said("A")]}, "expected the assistant as turn 1, found the user"),
        (
            {"messages": [{"role": "usr", "content": "x"}, said("A")]},
            "message 0: unknown role 'usr'; did you mean 'user'",
        ),
        (
            {"messages": [user({"type": "vidio", "path": "x"}), said("A")]},
            "unknown type 'vidio' of content; did you mean 'video'",
        ),
        ({"messages": [user({"type": 1, "path": "x"}), said("A")]}, "message 0: unknown type '1' of content"),
        ({"messages": [user({"type": "video"}), said("A")]}, "message 0: 'path' is missing or empty"),
        ({"messages": [user({"type": "text"}), said("A")]}, "a text part wants 'text'"),
        (
            {"messages": [user(QUESTION), {"role": "assistant", "content": [{"type": "image", "path": "x"}]}]},
            "not in the assistant's",
        ),
        (
            {"messages": [{"role": "user", "content": 5}, said("A")]},
            "'content' must be a text or a list of parts, found a number",
        ),
        ({"messages": [user(), said("A")]}, "'content' is an empty list"),
        ({**GOOD, "meta": 3}, "'meta' must be an object, found a number"),
    ],
)
def test_messages_broken_rows(tmp_path, row, message):
    rows = open_source("messages", jsonl(tmp_path / "m.jsonl", GOOD, "", row, GOOD))
    assert len(rows) == 3
    assert rows[0].answer == rows[2].answer == "A."
    with pytest.raises(BadSample, match=rf"m\.jsonl, row 1: (line 3: )?.*{message}"):
        rows[1]


def test_bytes_that_are_no_text(tmp_path):
    path = jsonl(tmp_path / "m.jsonl", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"messages": "\xff\xfe"}\n')
    rows = open_source("messages", path)
    assert rows[0].answer == "A."
    with pytest.raises(BadSample, match="line 2: is not UTF-8 text"):
        rows[1]
    (tmp_path / "x.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match=r"x\.json: is not UTF-8 text \(byte 1\)"):
        open_source("music_avqa", tmp_path / "x.json")


@pytest.mark.parametrize("broken", [b'{"messages": [', b"\xff\xfe", b"hello"])
def test_a_first_line_that_is_broken_is_a_bad_row_like_any_other(tmp_path, broken):
    path = jsonl(tmp_path / "m.jsonl", GOOD, GOOD)
    path.write_bytes(broken + b"\n" + path.read_bytes())
    rows = open_source("messages", path)
    assert [rows[i].answer for i in (1, 2)] == ["A.", "A."]
    with pytest.raises(BadSample, match=r"m\.jsonl, row 0: line 1(, column \d+)?: is not"):
        rows[0]


# --- files that are not of the format


def test_files_that_are_not_json(tmp_path):
    page = write(tmp_path / "a.json", '[\n {"video_id": 1},\n <html>\n]')
    with pytest.raises(UserError, match=r"a\.json, line 3, column 2: is not JSON \(Expecting value\); found '<html>'"):
        open_source("music_avqa", page)
    with pytest.raises(UserError, match=r"a\.json, line 3, column 2: is not JSON"):
        open_source("ave", page)
    with pytest.raises(UserError, match=r"a\.json, line 3, column 2: is not JSON"):
        open_source("messages", page)
    with pytest.raises(UserError, match=r"b\.jsonl, line 2, column 1: is not JSON .* on each line"):
        open_source("messages", jsonl(tmp_path / "b.jsonl", "", "hello", "<html>"))
    with pytest.raises(UserError, match=r"p\.jsonl, line 1, column 1: is not JSON .* on each line"):
        open_source("messages", jsonl(tmp_path / "p.jsonl", *["a page of text"] * 30, GOOD))
    with pytest.raises(UserError, match=r"c\.jsonl: holds no rows"):
        open_source("messages", write(tmp_path / "c.jsonl", "\n\n"))
    with pytest.raises(UserError, match=r"d\.json: expected a JSON array of rows, found an object with keys a, b"):
        open_source("music_avqa", write(tmp_path / "d.json", {"a": 1, "b": 2}))
    with pytest.raises(UserError, match=r"e\.json: the JSON array holds no rows"):
        open_source("music_avqa", write(tmp_path / "e.json", []))
    for caught in (page, tmp_path / "d.json"):
        with pytest.raises(UserError) as error:
            open_source("music_avqa", caught)
        assert not isinstance(error.value, BadSample)  # a whole file is no bad sample: the run does not start


def test_unknown_names_and_missing_files(tmp_path):
    path = write(tmp_path / "train.json", [AVQA])
    with pytest.raises(UserError, match="unknown data source 'musik_avqa'; did you mean 'music_avqa'"):
        open_source("musik_avqa", path)
    with pytest.raises(UserError, match="'music_avqa': unknown option 'vidio_dir'; did you mean 'video_dir'"):
        open_source("music_avqa", path, vidio_dir="x")
    with pytest.raises(UserError, match=r"trian\.json: the annotation file .* did you mean 'train\.json'"):
        open_source("music_avqa", tmp_path / "trian.json")
    with pytest.raises(UserError, match="nor is its folder"):
        open_source("music_avqa", tmp_path / "no" / "train.json")
    with pytest.raises(UserError, match="is a folder"):
        open_source("music_avqa", tmp_path)
    with pytest.raises(UserError, match="limit must be at least 1"):
        open_source("music_avqa", path, limit=0)
    with pytest.raises(IndexError):
        open_source("music_avqa", path)[1]


# --- half a surrogate pair: json.loads takes it, no tokenizer does


HALF = "cut \ud83d here"


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": HALF}]}),
        (
            "messages",
            {"id": HALF, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ),
        ("music_avqa", {**AVQA, "anser": HALF}),
        ("music_avqa", {**AVQA, "templ_values": json.dumps(["flute", HALF])}),
        ("music_avqa", {**AVQA, "video_id": HALF}),
        ("ave", {"category": HALF, "video_id": "v", "start": 0, "end": 1}),
    ],
)
def test_half_a_character_is_a_bad_row(tmp_path, source, row):
    rows = open_source(source, write(tmp_path / "rows.json", [row]))
    with pytest.raises(BadSample, match=r"row 0: a text holds half a character, '\\ud83d' in '.*cut \\ud83d here"):
        rows[0]
