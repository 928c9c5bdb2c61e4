"""Every format as it is published, in small files of its true layout, and the ways in which its rows can be wrong."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import soundfile

from data.media import MediaLoader
from data.schema import BadSample, Media, MediaError, Message, Sample, Text, UserError
from data.sources import SOURCES, Source, annotation_files, is_there, open_source
from data.sources.index import lines
from data.sources.rows import Rows, ask


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def user(*parts):
    """A user's message; texts of the turn that is asked are the question."""
    return Message("user", tuple(Text(p, question=True) if isinstance(p, str) else p for p in parts))


def told(*parts):
    """A user's message in the history."""
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def said(text):
    return Message("assistant", (Text(text),))


def image(path):
    return Media("image", path, "vision")


def video(path):
    return Media("video", path, "vision")


def audio(path, modality="audio"):
    return Media("audio", path, modality)


def talk(*texts, keys=("from", "value"), names=("human", "gpt")):
    return [{keys[0]: names[k % 2], keys[1]: text} for k, text in enumerate(texts)]


def openai(*texts):
    return talk(*texts, keys=("role", "content"), names=("user", "assistant"))


def reason(source, tmp_path, row, good=None, **options):
    """Why a row is bad, in a file where it does not stand alone."""
    rows = open_source(source, write(tmp_path / "rows.json", [row]), **options)
    with pytest.raises(BadSample) as error:
        rows[0]
    return str(error.value)


# --- LLaVA, Video-LLaVA, Valley


LLAVA = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": talk("<image>\nWhat are the colors of the bus?", "White and red.", "Is it moving?", "No."),
}


def test_llava_as_published(tmp_path):
    rows = open_source("llava", write(tmp_path / "llava_v1_5_mix665k.json", [LLAVA]))
    bus = image("coco/train2017/000000033471.jpg")
    assert [sample.id for sample in rows] == ["000000033471#0", "000000033471#1"]
    assert rows[0].messages == (user(bus, "What are the colors of the bus?"), said("White and red."))
    assert rows[1].messages == (
        told(bus, "What are the colors of the bus?"), said("White and red."), user("Is it moving?"), said("No."),
    )  # fmt: skip
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_llava_lists_text_alone_and_a_placeholder_at_the_end(tmp_path):
    both = {"id": 1, "image": ["a.jpg", "b.jpg"], "conversations": talk("<image>\n<image>\nCompare.", "Alike.")}
    alone = {"id": "t", "model": "x", "conversations": talk("Hi", "Ho")}
    late = {"id": "l", "image": "a.jpg", "conversations": talk("What is this?\n<image>", "A cup.")}
    rows = open_source("llava", jsonl(tmp_path / "a.jsonl", both, alone, late))
    assert rows[0].messages[0] == user(image("a.jpg"), image("b.jpg"), "Compare.")
    assert (rows[0].id, rows[1].meta) == ("1", {"model": "x"})
    assert rows[1].messages == (user("Hi"), said("Ho"))
    assert rows[2].messages[0] == user("What is this?", image("a.jpg"))


def test_an_answer_is_not_lost_by_what_is_wrong_after_it(tmp_path):
    """A question at the end that nobody answered, an empty answer, an assistant who begins: each answer by itself."""
    unanswered = {"id": "u", "conversations": talk("Hi", "Ho", "And?")}
    empty = {"id": "e", "conversations": talk("Hi", "Ho", "And?", " ")}
    begun = {"id": "b", "conversations": [{"from": "gpt", "value": "I can help."}, *talk("Hi", "Ho")]}
    begun["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    rows = open_source("llava", jsonl(tmp_path / "a.jsonl", unanswered, empty, begun))
    for index, id in ((0, "u"), (1, "e#0"), (3, "b")):
        assert (rows[index].id, rows[index].messages[-2:]) == (id, (user("Hi"), said("Ho")))
    assert [len(rows[index].messages) for index in (0, 1, 3)] == [2, 2, 3]  # the last with its system message
    with pytest.raises(BadSample, match="message 3: the answer is empty"):
        rows[2]


def test_video_llava_stage_1(tmp_path):
    valley = {
        "id": "v_0",
        "video": "valley/000/0001.mp4",
        "conversations": talk("Describe it.\n<video>", "A dog runs."),
    }
    older = {"id": "v_1", "video": "valley/000/0002.mp4", "conversations": talk("<image>\nDescribe it.", "A cat.")}
    mixed = {
        "id": "v_2",
        "video": ["v.mp4"],
        "image": ["i.jpg"],
        "conversations": talk("<video><image>\nBoth?", "Yes."),
    }
    rows = open_source("llava", write(tmp_path / "valley.json", [valley, older, mixed]))
    assert rows[0].messages == (user("Describe it.", video("valley/000/0001.mp4")), said("A dog runs."))
    assert rows[1].messages[0] == user(video("valley/000/0002.mp4"), "Describe it.")
    assert rows[2].messages[0] == user(video("v.mp4"), image("i.jpg"), "Both?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conversations": talk("<image><image>\nWhat?", "A.")},
            "the texts hold 2 <image>, but the row names 1 images",
        ),
        ({"conversations": talk("What?", "A.")}, "the texts hold 0 <image>, but the row names 1 images"),
        ({"image": ["a.jpg", "b.jpg"]}, "the texts hold 1 <image>, but the row names 2 images"),
        ({"image": None}, "the texts hold 1 <image>, but the row names 0 images"),
        ({"conversations": talk("Look.", "<image> is it")}, "<image> stands in the assistant's message"),
        ({"conversations": talk("<image>\nWhat?", "A.", "<video>", "B.")}, "the texts hold 1 <video>, but .* 0 videos"),
        ({"image": 7}, "'image' must hold paths of media, found a number"),
        ({"image": {"bytes": "x", "path": "a.jpg"}}, "'image' holds the bytes of a medium"),
        ({"conversations": "x"}, "'conversations' must be a list of messages, found a string"),
        ({"conversations": talk(5, "A.")}, "message 0: must be a text, found a number"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "message 0: unknown role 'humn'; did you mean 'human'"),
        (
            {"conversations": [{"from": "human", "text": "x"}]},
            r"message 0: 'value' is missing \(the row has: from, text",
        ),
        ({"conversations": talk("<image>", " ")}, "message 1: the answer is empty"),
    ],
)
def test_llava_broken_rows(tmp_path, change, message):
    rows = open_source("llava", write(tmp_path / "rows.json", [LLAVA, LLAVA | change, LLAVA]))
    assert rows[0].answer == "White and red."
    assert rows[len(rows) - 1].answer == "No."
    with pytest.raises(BadSample, match=rf"rows\.json, row 2: .*{message}"):
        rows[2]


def test_a_wrong_column_is_answered_with_the_nearest(tmp_path):
    row = {"id": "a", "image": "a.jpg", "conversation": talk("<image>", "x")}
    assert "there is no 'conversations' (the row has: id, image, conversation; is 'conversations' called " in reason(
        "llava", tmp_path, row
    )
    row = {"imagess": ["a.jpg"], "mesages": openai("<image>", "x")}
    assert "is 'messages' called 'mesages' there?" in reason("swift", tmp_path, row)
    assert "'source' is missing or empty" in (found := reason("slam", tmp_path, {"sourse": "a.wav", "target": "x"}))
    assert "is 'source' called 'sourse' there?" in found
    assert "is 'output' called 'outputs' there?" in reason("alpaca", tmp_path, {"instruction": "x", "outputs": "y"})


# --- ShareGPT, OpenAI and alpaca, as LLaMA-Factory reads them


def test_sharegpt_as_published(tmp_path):
    row = {"conversations": talk("Hi", "Ho", "And?", "So."), "system": "Be brief.", "tools": "[]"}
    media = {
        "messages": openai("<image>Who are they?\n<video><audio>", "Kane and Goretzka."),
        "images": ["mllm_demo_data/1.jpg"],
        "videos": ["mllm_demo_data/1.mp4"],
        "audios": ["mllm_demo_data/1.mp3"],
    }
    first = {"messages": [{"role": "system", "content": "Be kind."}, *openai("Hi", "Ho")]}
    rows = open_source("sharegpt", write(tmp_path / "mllm_demo.json", [row, media, first]), audio_as="speech")
    assert rows[1].messages == (
        Message("system", (Text("Be brief."),)), told("Hi"), said("Ho"), user("And?"), said("So."),
    )  # fmt: skip
    assert rows[1].meta == {"tools": "[]"}
    assert rows[2].messages[0] == user(
        image("mllm_demo_data/1.jpg"), "Who are they?", video("mllm_demo_data/1.mp4"),
        audio("mllm_demo_data/1.mp3", "speech"),
    )  # fmt: skip
    assert rows[3].messages[0] == Message("system", (Text("Be kind."),))


def test_sharegpt_takes_the_columns_and_tags_of_dataset_info(tmp_path):
    row = {"dialog": [{"who": "Q", "says": "<image>What?"}, {"who": "A", "says": "A cup."}], "pictures": "a.jpg"}
    path = write(tmp_path / "a.json", [row])
    columns = {"messages": "dialog", "images": "pictures"}
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    rows = open_source("sharegpt", path, columns=columns, tags=tags)
    assert rows[0].messages == (user(image("a.jpg"), "What?"), said("A cup."))
    assert rows[0].meta == {}
    with pytest.raises(UserError, match="option 'columns': unknown name 'image'; did you mean 'images'"):
        open_source("sharegpt", path, columns={"image": "pictures"})
    with pytest.raises(UserError, match="option 'tags': unknown name 'role'; did you mean 'role_tag'"):
        open_source("sharegpt", path, tags={"role": "who"})
    with pytest.raises(BadSample, match="unknown role 'Q'"):
        open_source("sharegpt", path, columns=columns, tags={"role_tag": "who", "content_tag": "says"})[0]


def test_tool_calls_are_bad_rows(tmp_path):
    row = {"conversations": [*talk("Hi"), {"from": "function_call", "value": "{}"}, *talk("x", "y")]}
    assert "message 1: unknown role 'function_call'" in reason("sharegpt", tmp_path, row)


def test_alpaca_as_published(tmp_path):
    row = {
        "instruction": "<audio>What is heard?",
        "input": "Answer with one word.",
        "output": "Rain",
        "system": "Listen.",
        "history": [["Hi", "Ho"], ["And", "So"]],
        "audios": ["a.wav"],
    }
    rows = open_source("alpaca", write(tmp_path / "a.json", [row, {"instruction": "1+1?", "output": 2}]))
    assert [sample.answer for sample in rows] == ["Ho", "So", "Rain", "2"]
    assert rows[2].messages[-2:] == (user(audio("a.wav"), "What is heard?\nAnswer with one word."), said("Rain"))
    assert rows[2].messages[:2] == (Message("system", (Text("Listen."),)), told("Hi"))
    renamed = write(tmp_path / "b.json", [{"question": "1+1?", "answer": "2"}])
    columns = {"prompt": "question", "response": "answer"}
    assert open_source("alpaca", renamed, columns=columns)[0].messages == (user("1+1?"), said("2"))
    assert "'history' 0: must be a pair" in reason("alpaca", tmp_path, row | {"history": ["Hi"]})


@pytest.mark.parametrize("source", ["alpaca", "swift"])
def test_alpaca_with_one_of_instruction_and_input(tmp_path, source):
    """LLaMA-Factory joins those of the two that hold something (`convert_alpaca`)."""
    row = {"instruction": "1+1?", "input": "", "output": "2"}
    for asked in (row, row | {"instruction": "", "input": "1+1?"}, row | {"instruction": None, "input": "1+1?"}):
        assert open_source(source, write(tmp_path / "a.json", [asked]))[0].messages == (user("1+1?"), said("2"))
    assert "'instruction' is missing or empty" in reason("alpaca", tmp_path, row | {"instruction": ""})
    unnamed = {"instuction": "Translate.", "input": "Hallo", "output": "Hello"}
    assert "is 'instruction' called 'instuction' there?" in reason("alpaca", tmp_path, unnamed)


# --- ms-swift


def test_swift_as_published(tmp_path):
    rows = open_source(
        "swift",
        jsonl(
            tmp_path / "swift.jsonl",
            {"messages": openai("<image><image>What differs?", "The ears."), "images": ["/xxx/x.jpg", "/xxx/x.png"]},
            {"messages": openai("What did it say?", "Hello."), "audios": ["/xxx/x.mp3"]},
            {"query": "And now?", "response": "Blue.", "history": [["<video>What?", "Red."]], "videos": ["/xxx/x.mp4"]},
            {"system": "Be brief.", "conversation": [{"human": "Hi", "assistant": "Ho"}]},
        ),
        strip_prefix="/xxx",
    )
    assert rows[0].messages == (user(image("x.jpg"), image("x.png"), "What differs?"), said("The ears."))
    assert rows[1].messages[0] == user(audio("x.mp3"), "What did it say?")  # put in front, as ms-swift does
    assert rows[2].messages == (user(video("x.mp4"), "What?"), said("Red."))
    assert rows[3].messages == (told(video("x.mp4"), "What?"), said("Red."), user("And now?"), said("Blue."))
    assert rows[4].messages == (Message("system", (Text("Be brief."),)), user("Hi"), said("Ho"))


def test_swift_puts_missing_placeholders_in_front(tmp_path):
    row = {
        "messages": openai("What?", "A.", "And in <image>?", "B."),
        "images": ["a.jpg", "b.jpg"],
        "audios": ["a.wav"],
    }
    rows = open_source("swift", write(tmp_path / "a.json", [row]))
    assert rows[1].messages == (
        told(image("a.jpg"), audio("a.wav"), "What?"), said("A."), user("And in ", image("b.jpg"), "?"), said("B."),
    )  # fmt: skip


@pytest.mark.parametrize("switch", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}])
def test_an_answer_kept_out_of_the_loss_is_history_only(tmp_path, switch):
    talked, written = openai("1?", "wrong", "2?", "two", "3?", "three"), talk("1?", "wrong", "2?", "two")
    for message, key in ((m, "value" if "value" in m else "content") for m in talked + written):
        message |= switch if message[key] == "wrong" else {"loss": None, "weight": 1}
    for source, row, answers in (
        ("swift", {"messages": talked}, ["two", "three"]),
        ("messages", {"messages": talked}, ["two", "three"]),
        ("sharegpt", {"conversations": written}, ["two"]),
    ):
        rows = open_source(source, write(tmp_path / "a.json", [row, {"id": "x"} | row]))
        assert [sample.answer for sample in rows] == answers * 2
        assert rows[0].messages[:3] == (told("1?"), said("wrong"), user("2?"))
    talked[3] |= switch
    talked[5] |= switch
    assert "none of its messages is the assistant's and bears loss" in reason("swift", tmp_path, {"messages": talked})


def test_swift_broken_rows(tmp_path):
    row = {"messages": openai("<image><image>Which?", "The left."), "images": ["a.jpg"]}
    assert "the texts hold 2 <image>, but the row names 1 images" in reason("swift", tmp_path, row)
    boxes = {"messages": openai("Find the <ref-object>.", "<bbox>"), "objects": {"ref": ["x"], "bbox": [[1, 2]]}}
    assert "<ref-object> stands for an entry of 'objects'" in reason("swift", tmp_path, boxes)
    boxes["messages"] = openai([{"type": "text", "text": "Find it."}], "<bbox>")
    assert "<bbox> stands for an entry of 'objects'" in reason("swift", tmp_path, boxes)
    del boxes["objects"]
    assert open_source("swift", write(tmp_path / "a.json", [boxes]))[0].answer == "<bbox>"
    assert "none of its messages is the assistant's" in reason("swift", tmp_path, {"messages": openai("Hi")})
    assert "there is no 'messages', no 'response' and no 'conversation'" in reason("swift", tmp_path, {"text": "x"})
    alone = {"messages": [{"role": "assistant", "content": "I love music"}]}
    assert "expected the user as turn 0" in reason("swift", tmp_path, alone)


# --- text that looks like a placeholder


def test_typed_content_leaves_placeholders_alone(tmp_path):
    content = [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What does <image> mean in <video>?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "<audio> nothing"}]}
    sample = open_source("messages", jsonl(tmp_path / "a.jsonl", row))[0]
    assert sample.messages == (user(image("a.jpg"), "What does <image> mean in <video>?"), said("<audio> nothing"))


# --- speech and sound


def test_slam_llm(tmp_path):
    rows = [
        {"key": "1034-121119-0000", "source": "/nfs/data/LibriSpeech/dev/1034.flac", "target": "the law of friendship"},
        {"key": "k2", "source": "b.wav", "target": "ein Hund", "prompt": "Translate into German.", "lang": "de"},
    ]
    path = jsonl(tmp_path / "librispeech_train_960h.jsonl", *rows)
    found = open_source("slam", path, strip_prefix=["/nfs/other", "/nfs/data/"])
    assert found[0].id == "1034-121119-0000"
    assert found[0].messages == (
        user(audio("LibriSpeech/dev/1034.flac", "speech"), "Transcribe speech to text."),
        said("the law of friendship"),
    )
    assert found[1].messages[0] == user(audio("b.wav", "speech"), "Translate into German.")
    assert found[1].meta == {"lang": "de"}
    assert open_source("slam", path, prompt="Write.", audio_as="audio")[1].messages[0] == user(audio("b.wav"), "Write.")


AUDIOCAPS = (
    "audiocap_id,youtube_id,start_time,caption\n"
    '91139,r1nicOVtvkQ,130,"A woman talks nearby, as ""water"" pours"\n'
    "58146,_9mgOkzm-xg,30,Multiple clanging sounds\n"
)


def test_audiocaps_as_published(tmp_path):
    path = write(tmp_path / "train.csv", AUDIOCAPS)
    rows = open_source("audiocaps", path)
    assert len(rows) == 2
    assert rows[0].messages == (
        user(audio("r1nicOVtvkQ.wav"), "Describe the sound."),
        said('A woman talks nearby, as "water" pours'),
    )
    assert (rows[0].id, rows[0].meta) == ("91139", {"youtube_id": "r1nicOVtvkQ", "start_time": "130"})
    named = open_source("audiocaps", path, file="train/Y{youtube_id}_{start_time}.flac", prompt="What?")
    assert named[1].messages[0] == user(audio("train/Y_9mgOkzm-xg_30.flac"), "What?")
    assert pickle.loads(pickle.dumps(named))[1] == named[1]
    padded = open_source("audiocaps", path, file="{youtube_id}_{start_time:06d}.wav")
    assert padded[1].media == [audio("_9mgOkzm-xg_000030.wav")]
    with pytest.raises(UserError, match="file: unknown column 'youtubeid'; did you mean 'youtube_id'"):
        open_source("audiocaps", path, file="{youtubeid}.wav")
    with pytest.raises(UserError, match=r"file: '06z' in '\{start_time:06z\}' is no format of a whole number"):
        open_source("audiocaps", path, file="{start_time:06z}.wav")
    with pytest.raises(BadSample, match="'youtube_id' must be a whole number to be written as '06d', found 'r1nic"):
        open_source("audiocaps", path, file="{youtube_id:06d}.wav")[0]


def test_audiocaps_broken_files_and_rows(tmp_path):
    with pytest.raises(UserError, match=r"has no column 'caption' .* is 'caption' called 'captions' there"):
        open_source("audiocaps", write(tmp_path / "a.csv", AUDIOCAPS.replace("caption\n", "captions\n")))
    with pytest.raises(UserError, match="holds no rows below its header"):
        open_source("audiocaps", write(tmp_path / "b.csv", AUDIOCAPS.split("\n")[0]))
    with pytest.raises(UserError, match="is empty"):
        open_source("audiocaps", write(tmp_path / "c.csv", "\n"))
    rows = open_source("audiocaps", write(tmp_path / "d.csv", AUDIOCAPS + '1,2\n1,2,3,"open\n1,,3,x\n'))
    with pytest.raises(BadSample, match="row 2: line 4: expected 4 fields, found 2"):
        rows[2]
    with pytest.raises(BadSample, match="line 5: is no line of csv"):
        rows[3]
    with pytest.raises(BadSample, match="'youtube_id' is missing or empty"):
        rows[4]


@pytest.fixture
def librispeech(tmp_path):
    """Two chapters of two subsets, with true recordings."""
    for subset, name, texts in (
        ("dev-clean", "1272-128104", ["MISTER QUILTER IS THE APOSTLE", "NOR IS MISTER QUILTER'S MANNER"]),
        ("test-other", "1688-142285", ["THERE'S IRON THEY SAY"]),
    ):
        folder = tmp_path / "LibriSpeech" / subset / name.replace("-", "/")
        lines = [f"{name}-{k:04} {text}" for k, text in enumerate(texts)]
        write(folder / f"{name}.trans.txt", "\n".join(lines) + "\n")
        for k in range(len(texts)):
            soundfile.write(folder / f"{name}-{k:04}.flac", np.zeros(1600), 16_000)
    return tmp_path / "LibriSpeech"


def test_librispeech_as_unpacked(librispeech):
    rows = open_source("librispeech", librispeech, media_dir=librispeech.parent)
    assert [sample.id for sample in rows] == ["1272-128104-0000", "1272-128104-0001", "1688-142285-0000"]
    assert rows[1].messages == (
        user(audio("LibriSpeech/dev-clean/1272/128104/1272-128104-0001.flac", "speech"), "Transcribe speech to text."),
        said("NOR IS MISTER QUILTER'S MANNER"),
    )
    subset = open_source("librispeech", librispeech / "dev-clean", media_dir=librispeech, lower=True, prompt="Write.")
    assert len(subset) == 2
    assert subset[0].messages == (
        user(audio("dev-clean/1272/128104/1272-128104-0000.flac", "speech"), "Write."),
        said("mister quilter is the apostle"),
    )
    for found, base in ((rows, librispeech.parent), (subset, librispeech)):
        assert MediaLoader(base).resolve(found[0].media[0]).is_file()
    assert MediaLoader(librispeech.parent).resolve(open_source("librispeech", librispeech)[0].media[0]).is_file()
    assert pickle.loads(pickle.dumps(rows))[2] == rows[2]
    assert [file.name for file in annotation_files("librispeech", librispeech)] == [
        "1272-128104.trans.txt", "1688-142285.trans.txt",
    ]  # fmt: skip


def test_librispeech_broken(librispeech, tmp_path):
    with pytest.raises(UserError, match="do not lie in media_dir"):
        open_source("librispeech", librispeech, media_dir=librispeech / "dev-clean")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \*\.trans\.txt"):
        open_source("librispeech", tmp_path / "empty")
    with pytest.raises(UserError, match=r"LibriSpech: the annotation file .* did you mean 'LibriSpeech'"):
        open_source("librispeech", tmp_path / "LibriSpech")
    write(librispeech / "x" / "x.trans.txt", "x-0000\n../../x-0001 HELLO\n")
    rows = open_source("librispeech", librispeech / "x")
    for k in (0, 1):
        with pytest.raises(BadSample, match=rf"x\.trans\.txt, line {k + 1}: expected the recording's name"):
            rows[k]


# --- absolute paths, links, media of another kind


def test_strip_prefix_is_safe(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    (tmp_path / "secret.wav").write_bytes(b"x")
    (media / "a.wav").write_bytes(b"x")
    (media / "out.wav").symlink_to(tmp_path / "secret.wav")
    sources = ["/old/media/a.wav", "/old/media2/a.wav", "/old/media/../secret.wav", "/old/media//etc/passwd",
               "/old/media/out.wav", "/old/media"]  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", *({"source": source, "target": "x"} for source in sources))
    rows = open_source("slam", path, strip_prefix="/old/media")
    loader = MediaLoader(media)
    found = [row.media[0] for row in rows]
    assert [m.path for m in found[:2]] == ["a.wav", "/old/media2/a.wav"]  # whole folders only
    assert loader.resolve(found[0]) == media / "a.wav"
    for medium, message in zip(
        found[1:],
        [r"is an absolute path; .*strip_prefix: /old/media2", "climbs with '..'", "not found", "is a link that leads out",
         "is an absolute path"],
        strict=True,
    ):  # fmt: skip
        with pytest.raises(MediaError, match=message):
            loader.resolve(medium)
    assert [sample.media[0].path for sample in rows.head(1)] == ["a.wav"]
    path = jsonl(tmp_path / "b.jsonl", {"source": "file:///old/media/a%20b.wav", "target": "x"})
    for prefix in ("/old/media", "file:///old/media/"):
        assert open_source("slam", path, strip_prefix=prefix)[0].media[0].path == "a b.wav"


def test_every_source_takes_strip_prefix_and_tells_unknown_options(tmp_path):
    for source in SOURCES:
        if source in ("librispeech", "hf"):
            continue
        with pytest.raises(UserError, match=r"unknown option 'strip_prefx'; did you mean 'strip_prefix'"):
            open_source(source, write(tmp_path / "a.json", "[1]"), strip_prefx="x")


def test_adding_a_format_is_one_function_and_one_line(tmp_path, monkeypatch):
    def parse(raw, index):
        question, _, answer = raw.text.decode().partition("|")
        return Sample(f"q{index}", ask((), question, answer), source="pipes", row=index)

    def read(path, *, upper: bool = False):
        return Rows(path, lines([path]), parse)

    monkeypatch.setitem(SOURCES, "pipes", Source(read))
    rows = open_source("pipes", write(tmp_path / "a.txt", "1+1?|2\n\n2+2?|4\n"))
    assert [sample.answer for sample in rows] == ["2", "4"]
    with pytest.raises(UserError, match="unknown option 'uper'; did you mean 'upper'"):
        open_source("pipes", tmp_path / "a.txt", uper=True)


def test_what_is_there(tmp_path, librispeech):
    path = write(tmp_path / "a.json", "[1]")
    assert is_there("llava", path)
    assert not is_there("llava", tmp_path)
    assert is_there("librispeech", librispeech)
    assert not is_there("librispeech", tmp_path / "nothing")
    assert is_there("hf", tmp_path / "user" / "name")
    assert annotation_files("hf", tmp_path / "user" / "name") == []


def test_media_of_another_kind_than_declared(tmp_path, write_video):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    soundfile.write(tmp_path / "s.wav", np.zeros(1600), 16_000)
    write_video(tmp_path / "v.mp4", [0, 1, 2])
    row = {
        "messages": openai("<image><video><audio>?", "x"),
        "images": ["v.mp4"],
        "videos": ["s.wav"],
        "audios": ["p.png"],
    }
    picture, film, sound = open_source("swift", jsonl(tmp_path / "a.jsonl", row))[0].media
    loader = MediaLoader(tmp_path)
    with pytest.raises(MediaError, match=r"v\.mp4: cannot be read as an image .*of another kind"):
        loader.frames(picture, 2)
    with pytest.raises(MediaError, match=r"s\.wav: has no picture track \(it has: audio\)"):
        loader.frames(film, 2)
    with pytest.raises(MediaError, match=r"p\.png: cannot be read as a media file .*of another kind"):
        loader.windows(sound, 2, 1.0, whole=False)


def test_typed_parts_whose_media_stand_in_columns(tmp_path):
    """As TRL's and ms-swift's data sets for vision have it."""
    asked = [{"type": "image"}, {"type": "text", "text": "Which is larger?"}, {"type": "image"}]
    row = {"messages": [*openai(asked, "The first.")], "images": ["a.png", {"path": "b.png", "bytes": None}]}
    expected = user(image("a.png"), "Which is larger?", image("b.png"))
    for source in ("messages", "swift"):
        rows = open_source(source, write(tmp_path / "a.json", [row]))
        assert rows[0].messages[0] == expected
    turned = {
        "messages": openai([{"type": "image", "index": 1}, *asked[1:2], {"type": "image", "index": 0}], "The second.")
    }
    rows = open_source("messages", write(tmp_path / "b.json", [turned | {"images": ["a.png", "b.png"]}]))
    assert rows[0].messages[0] == user(image("b.png"), "Which is larger?", image("a.png"))
    assert "index 1 of a part of type image: the row names 1 images" in reason(
        "messages", tmp_path, turned | {"images": ["a.png"]}
    )
    assert "2 parts of type image without a path, but the row names 1 images" in reason(
        "messages", tmp_path, row | {"images": ["a.png"]}
    )
    text = {"messages": openai("What is it?", "A cat."), "video": "v123", "audio": False}  # names, no files
    assert open_source("messages", write(tmp_path / "c.json", [text]))[0].meta == {"video": "v123", "audio": False}
    silent = {"messages": openai("What is it?", "A cat."), "image": "a.png"}
    assert "0 parts of type image without a path, but the row names 1 images" in reason("messages", tmp_path, silent)


def test_typed_parts_as_openai_and_qwen_write_them(tmp_path):
    asked = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "audio", "audio_url": "a.wav"},
        {"type": "image", "image": {"path": "b.png"}},
        {"type": "text", "text": "What?"},
    ]
    rows = open_source("messages", write(tmp_path / "a.json", [{"messages": openai(asked, "A cat.")}]))
    assert rows[0].messages[0] == user(image("a.png"), audio("a.wav"), image("b.png"), "What?")


def test_a_column_by_its_other_name_is_not_dropped(tmp_path):
    swift = {"query": "What is it?", "response": "A cat.", "image": "a.png"}
    assert open_source("swift", write(tmp_path / "a.json", [swift]))[0].messages[0] == user(
        image("a.png"), "What is it?"
    )
    llava = {"conversations": talk("<image>\nWhat is it?", "A cat."), "images": ["a.png"]}
    assert open_source("llava", write(tmp_path / "b.json", [llava]))[0].messages[0] == user(
        image("a.png"), "What is it?"
    )


def test_swift_in_alpacas_form_and_structs_with_a_url(tmp_path):
    row = {"instruction": "What is it?", "input": "", "output": "A cat.", "images": [{"url": "a.png"}]}
    rows = open_source("swift", write(tmp_path / "a.json", [row]))
    assert rows[0].messages == (user(image("a.png"), "What is it?"), said("A cat."))
    assert "'images' must hold paths of media, found an object with keys name" in reason(
        "swift", tmp_path, row | {"images": [{"name": "a.png"}]}
    )


def test_a_system_message_goes_before_the_column(tmp_path):
    talked = [{"role": "system", "content": "Be kind."}, *openai("Hi", "Ho")]
    for source in ("sharegpt", "swift"):
        rows = open_source(source, write(tmp_path / "a.json", [{"messages": talked, "system": "Be brief."}]))
        assert rows[0].messages[0].text == "Be kind."


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_system_message_is_none(tmp_path, empty):
    asked = [{"role": "system", "content": empty}, *openai("Hi", "Ho")]
    told = {"conversations": [{"from": "system", "value": empty}, *talk("Hi", "Ho")]}
    for source, row in (("messages", {"messages": asked}), ("swift", {"messages": asked}), ("sharegpt", told),
                        ("llava", told)):  # fmt: skip
        rows = open_source(source, write(tmp_path / "a.json", [row]))
        assert rows[0].messages == (user("Hi"), said("Ho"))
    typed = {"messages": [{"role": "system", "content": [{"type": "text", "text": empty}]}, *openai("Hi", "Ho")]}
    column = {"conversations": talk("Hi", "Ho"), "system": empty}
    for source, row in (("messages", typed), ("swift", typed), ("sharegpt", column), ("llava", column)):
        assert open_source(source, write(tmp_path / "a.json", [row]))[0].messages == (user("Hi"), said("Ho"))
    rows = open_source("llava", write(tmp_path / "a.json", [told | {"system": "Be brief."}]))
    assert rows[0].messages[0].text == "Be brief."


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_an_answer_are_thoughts_before_it(tmp_path, key):
    row = {"messages": openai("Hi", "Ho")}
    row["messages"][0][key] = "the user has none"
    row["messages"][1][key] = "Hm.\n"
    for source in ("messages", "swift", "sharegpt"):
        rows = open_source(source, write(tmp_path / "a.json", [row]))
        assert rows[0].answer == "<think>\nHm.\n</think>\n\nHo"
        assert rows[0].messages[0] == user("Hi")
    row["messages"][1]["content"] = [{"type": "text", "text": "Ho"}]
    assert open_source("messages", write(tmp_path / "a.json", [row]))[0].answer == "<think>\nHm.\n</think>\n\nHo"
    for nothing in (None, "", " \n"):
        row["messages"][1][key] = nothing
        assert open_source("messages", write(tmp_path / "a.json", [row]))[0].answer == "Ho"
    row["messages"][1] = {"role": "assistant", key: "Hm.", "content": "<think>\nHm.\n</think>\n\nHo"}  # there twice
    assert open_source("messages", write(tmp_path / "a.json", [row]))[0].answer == "<think>\nHm.\n</think>\n\nHo"
    row["messages"][1]["content"] = " "
    with pytest.raises(BadSample, match="the answer is empty"):
        open_source("messages", write(tmp_path / "a.json", [row]))[0]
    talk = {"conversations": [{"from": "human", key: "Hi"}, {"from": "gpt", key: "Ho"}]}  # the name of the contents
    rows = open_source("sharegpt", write(tmp_path / "a.json", [talk]), tags={"content_tag": key})
    assert rows[0].answer == "Ho"
    row["messages"][1] = {"role": "assistant", key: "Hm."}
    for content in (None, 3):
        row["messages"][1]["content"] = content
        with pytest.raises(BadSample):
            open_source("messages", write(tmp_path / "a.json", [row]))[0]


def test_a_message_is_empty_where_all_of_its_texts_are(tmp_path):
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "Be brief."}]
    row = {"messages": [{"role": "system", "content": parts}, *openai("Hi", "Ho")]}
    assert open_source("messages", write(tmp_path / "a.json", [row]))[0].messages[0].text == "Be brief."
    blank = open_source("messages", write(tmp_path / "a.json", [{"messages": openai(" ", "Ho")}]))
    assert [message.role for message in blank[0].messages] == ["user", "assistant"]  # no system's, so it stays
    with pytest.raises(BadSample, match="message 0: holds neither text nor media"):
        open_source("llava", write(tmp_path / "a.json", [{"conversations": talk("", "Ho")}]))[0]


def test_only_the_last_questions_mark_stays(tmp_path):
    told, marked = {"type": "text", "text": "Look. "}, {"type": "text", "text": "What?", "question": True}
    row = {"messages": openai([told, marked], "A", [marked, told], "B")}
    first, second = open_source("messages", write(tmp_path / "a.json", [row]))
    marks = [[part.question for part in message.content] for message in second.messages]
    assert marks == [[False, False], [False], [True, False], [False]]
    assert [part.question for part in first.messages[0].content] == [False, True]


def test_names_and_metas_of_rows(tmp_path):
    """A row without an id is called by its line in a file of lines, by its place in an array."""
    rows = [
        {"messages": openai("Hi", "Ho"), "meta": None, "split": "a"},
        {"messages": openai("Hi", "Ho"), "id": 0, "meta": {"split": "b", "x": 1}, "split": "a"},
        3,
        {"messages": openai("Hi", "")},
    ]
    path = tmp_path / "a.jsonl"
    for text, names, where in (
        ("\n".join(map(json.dumps, rows)), ["1", "0"], "line 4: "),
        (json.dumps(rows), ["0", "0"], "element 4: "),
    ):
        path.write_text(text)
        found = open_source("messages", path)
        assert [(sample.id, sample.meta) for sample in (found[0], found[1])] == [
            (names[0], {"split": "a"}),
            (names[1], {"split": "b", "x": 1}),
        ]
        with pytest.raises(BadSample, match=r"expected .*found"):
            found[2]
        with pytest.raises(BadSample, match=f"row 3: {where}message 1: the answer is empty"):
            found[3]


def test_an_element_of_an_array_is_found_behind_one_of_several_answers(tmp_path):
    several = {"messages": openai("Hi", "Ho", "And?", "No")}
    found = open_source("messages", write(tmp_path / "a.json", [several, {"messages": []}, several]))
    assert [found[i].id for i in (0, 1, 3, 4)] == ["0#0", "0#1", "2#0", "2#1"]
    with pytest.raises(BadSample, match=r"a\.json, row 2: element 2: "):
        found[2]


def test_sharegpt_knows_the_names_of_tools(tmp_path):
    columns, tags = {"messages": "conversations", "tools": "tools"}, {"observation_tag": "seen", "function_tag": "call"}
    path = write(tmp_path / "a.json", [{"conversations": talk("Hi", "Ho"), "tools": "[]"}])
    assert open_source("sharegpt", path, columns=columns, tags=tags)[0].answer == "Ho"


@pytest.mark.parametrize("source", ["llava", "sharegpt", "swift"])
def test_a_recording_in_a_column_of_its_own_is_not_lost(tmp_path, source):
    """LLaMA-Omni's rows: {"speech": path, "conversations": [... "<speech>\\nPlease directly answer ..."]}."""
    texts = ("<speech>\nPlease answer the question in the user's speech.", "Yes.")
    talked = {"messages": openai(*texts)} if source == "swift" else {"conversations": talk(*texts)}
    assert "a column 'speech' names a sound" in reason(source, tmp_path, talked | {"speech": "a.wav"})
    number = open_source(source, write(tmp_path / "a.json", [talked | {"speech": 7}]))
    assert number[0].meta == {"speech": 7}
    if source == "sharegpt":
        heard = {"conversations": talk(texts[0].replace("speech>", "audio>"), "Yes."), "speech": "a.wav"}
        rows = open_source(source, write(tmp_path / "a.json", [heard]), columns={"audios": "speech"}, audio_as="speech")
        assert rows[0].media == [audio("a.wav", "speech")]


@pytest.mark.parametrize("cut", [{"video_start": 1.0, "video_end": 3.0}, {"start": 2}, {"end_time": 2}])
def test_a_stretch_of_a_video_is_not_taken_for_the_whole(tmp_path, cut):
    """qwen-vl-utils reads `video_start` and `video_end` of a part."""
    part = {"type": "video", "video": "v.mp4"}
    row = {
        "messages": [
            {"role": "user", "content": [part | cut, {"type": "text", "text": "What?"}]},
            *openai("", "A.")[1:],
        ]
    }
    assert f"'{next(iter(cut))}' means a stretch of the video" in reason("messages", tmp_path, row)
    row["messages"][0]["content"][0] = part | dict.fromkeys(cut) | {"fps": 1.0, "max_pixels": 50_000}
    assert open_source("messages", jsonl(tmp_path / "a.jsonl", row))[0].media == [video("v.mp4")]
