"""Hugging Face data sets that `datasets` itself wrote, without a network."""

from __future__ import annotations

import csv
import json
import pickle

import pytest
from PIL import Image

from data.media import MediaLoader
from data.schema import BadSample, Media, Message, Text, UserError
from data.sources import annotation_files, hf, open_source

datasets = pytest.importorskip("datasets")

ROWS = [
    {"id": f"r{k}", "prompt": f"What is {k}?", "label": str(k), "file": f"{k}.png", "task": "Answer briefly."}
    for k in range(5)
]
COLUMNS = {"question": "prompt", "answer": "label", "image": "file", "instruction": "task"}
TALK = [
    {
        "messages": [{"role": "user", "content": "<audio>Hi"}, {"role": "assistant", "content": "Ho"}],
        "audios": ["a.wav"],
    },
    {
        "messages": [
            {"role": r, "content": c}
            for r, c in (("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"))
        ],
        "audios": [],
    },
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def expected(k):
    content = (Media("image", f"{k}.png", "vision"), Text("Answer briefly.\n"), Text(f"What is {k}?", question=True))
    return Message("user", content), Message("assistant", (Text(str(k)),))


def test_a_saved_folder_and_parquet_files_with_columns_of_ones_own(saved, tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(ROWS[:2]).to_parquet(tmp_path / "folder" / "0.parquet")
    datasets.Dataset.from_list(ROWS[2:]).to_parquet(tmp_path / "folder" / "1.parquet")
    for path in (saved, tmp_path / "rows.parquet", tmp_path / "folder"):
        rows = open_source("hf", path, columns=COLUMNS)
        assert [sample.messages for sample in rows] == [expected(k) for k in range(5)]
        assert rows[3].id == "r3"
        assert [sample.id for sample in rows.head(2)] == ["r0", "r1"]
        assert pickle.loads(pickle.dumps(rows))[4] == rows[4]
    assert any(file.suffix == ".arrow" for file in annotation_files("hf", saved))


@pytest.mark.parametrize("layout", ["swift", "sharegpt"])
def test_conversations_become_a_sample_an_answer(tmp_path, layout):
    datasets.Dataset.from_list(TALK).save_to_disk(tmp_path / "talk")
    rows = open_source("hf", tmp_path / "talk", layout=layout)
    (tmp_path / "talk.json").write_text(json.dumps(TALK))
    plain = open_source(layout, tmp_path / "talk.json")
    assert [s.messages for s in rows] == [s.messages for s in plain]
    assert [s.answer for s in rows] == ["Ho", "one", "two"]
    assert pickle.loads(pickle.dumps(rows))[2].answer == "two"


def test_a_medium_without_as_beside_one_that_has_it(tmp_path):
    """Arrow gives all parts of a message all columns, empty ones too."""
    content = [
        {"type": "image", "path": "a.png"},
        {"type": "audio", "path": "q.wav", "as": "speech"},
        {"type": "text", "text": "What?"},
    ]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [content[2]]}]}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "talk")
    (tmp_path / "talk.json").write_text(json.dumps([row]))
    read, plain = (
        open_source("hf", tmp_path / "talk", layout="messages"),
        open_source("messages", tmp_path / "talk.json"),
    )
    assert read[0].messages == plain[0].messages
    assert [media.modality for media in read[0].media] == ["vision", "speech"]
    assert read[0].id == "0"
    content[1] = {"type": "audio", "path": "q.wav"}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "more")
    heard = open_source("hf", tmp_path / "more", layout="messages", audio_as="speech")
    assert heard[0].messages == plain[0].messages


def test_several_splits(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert len(open_source("hf", tmp_path / "both", split="test", columns=COLUMNS)) == 1
    with pytest.raises(UserError, match="set the option `split`; found 'tset'; did you mean 'test'"):
        open_source("hf", tmp_path / "both", split="tset", columns=COLUMNS)
    with pytest.raises(UserError, match="set the option `split`"):
        open_source("hf", tmp_path / "both", columns=COLUMNS)


def test_a_downloaded_repository_has_the_splits_of_its_files(tmp_path):
    """Rows of the test split must not train."""
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(ROWS[:3]).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[3:]).to_parquet(folder / "test-00000-of-00001.parquet")
    for split, expected_ids in (("train", ["r0", "r1", "r2"]), ("test", ["r3", "r4"])):
        rows = open_source("hf", tmp_path / "repository", split=split, columns=COLUMNS)
        assert [sample.id for sample in rows] == expected_ids
    with pytest.raises(UserError, match="set the option `split`"):
        open_source("hf", tmp_path / "repository", columns=COLUMNS)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_tables_in_files_of_text(tmp_path, suffix):
    table, file = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{suffix}"
    table.to_csv(file) if suffix == "csv" else table.to_json(file, lines=suffix == "jsonl")
    rows = open_source("hf", file, columns=COLUMNS)
    assert [sample.messages for sample in rows] == [expected(k) for k in range(5)]


def test_a_test_split_without_answers_leaves_the_others_alone(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\n?,007\n")
    (tmp_path / "test.csv").write_text("question\n?\n")
    assert [row.answer for row in open_source("hf", tmp_path, split="train")] == ["007"]


@pytest.mark.parametrize("stream", [None, 9])
@pytest.mark.parametrize("place", ["rows.csv", "folder/train.csv"])
def test_cells_of_csv_stay_the_texts_that_they_are(tmp_path, place, stream):
    answers = ["007", "1", "None", "NA", "True", "1.50", "two\nlines"]
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        csv.writer(opened).writerows([["question", "", "answer", "id"], *(["?", "x", a, "07"] for a in answers), ["?"]])
    rows = open_source("hf", file if stream or "/" not in place else file.parent, stream=stream, split="train")
    assert [rows[k].answer for k in range(7)] == answers
    assert rows[0].id == "07"
    with pytest.raises(BadSample, match="'answer' is missing or empty"):
        rows[7]


def test_a_boolean_or_a_date_is_no_answer(tmp_path):
    rows = [{"question": "?", "answer": True}, {"question": "?", "answer": False}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(BadSample, match="'answer' must be a text, found a bool: False; write it as a text"):
        open_source("hf", tmp_path / "rows.parquet")[1]


def test_a_prompt_where_rows_have_no_question(tmp_path):
    file = tmp_path / "speech.jsonl"
    file.write_text('{"audio": "a.wav", "text": "Hello."}\n')
    columns = {"speech": "audio", "answer": "text"}
    (spoken,) = open_source("hf", file, columns=columns, prompt="Transcribe.")
    content = (Media("audio", "a.wav", "speech"), Text("Transcribe.", question=True))
    assert spoken.messages == (Message("user", content), Message("assistant", (Text("Hello."),)))
    with pytest.raises(UserError, match=r"no column 'question' .*or \{prompt: TEXT\}"):
        open_source("hf", file, columns=columns)
    with pytest.raises(UserError, match=r"no column 'asked'"):
        open_source("hf", file, columns=columns | {"question": "asked"}, prompt="Transcribe.")
    for given in ({"columns": columns | {"question": ""}}, {"columns": {"answer": ""}, "prompt": "Transcribe."}):
        with pytest.raises(UserError, match=r"a row wants a question and an answer; .* or \{prompt: TEXT\}"):
            open_source("hf", file, **given)
    with pytest.raises(UserError, match="`prompt` belongs to layout: columns"):
        open_source("hf", file, layout="swift", prompt="Transcribe.")
    file.write_text("".join(json.dumps({"question": q, "answer": "a"}) + "\n" for q in ("Who?", " ", None)))
    rows = open_source("hf", file, prompt="What?")
    assert [sample.messages[0].text for sample in rows] == ["Who?", "What?", "What?"]


def test_a_folder_of_pictures_with_their_table(tmp_path):
    """What `datasets` calls an imagefolder; it names the files by absolute paths."""
    folder = tmp_path / "media" / "birds"
    folder.mkdir(parents=True)
    lines = []
    for k in range(3):
        Image.new("RGB", (8, 8), (100 * k, 0, 0)).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "question": "?", "answer": f"a{k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = open_source("hf", folder, columns={"image": "image"}, media_dir=tmp_path / "media")
    assert [(sample.answer, sample.media[0].path) for sample in rows] == [(f"a{k}", f"birds/{k}.png") for k in range(3)]
    assert MediaLoader(tmp_path / "media").frames(rows[2].media[0], 1)[0, 0, 4, 4] == 200
    outside = open_source("hf", folder, columns={"image": "image"}, media_dir=tmp_path / "elsewhere")
    with pytest.raises(BadSample, match="is an absolute path"):
        MediaLoader(tmp_path / "elsewhere").frames(outside[0].media[0], 1)


def test_a_stream_is_fetched_in_part_and_read_in_any_order(tmp_path):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    table = hf._fetched(stream, 3)
    assert [table[k]["id"] for k in (2, 0, 1)] == ["r2", "r0", "r1"]
    assert len(table) == 3
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    rows = open_source("hf", tmp_path / "rows.parquet", split="train", columns=COLUMNS, stream=2)
    assert [sample.messages for sample in rows] == [expected(0), expected(1)]


@pytest.fixture
def pictures(tmp_path):
    """A column of pictures, one of lists of them; `datasets` puts the files' bytes into its own."""
    folder = tmp_path / "given"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (8, 8), (100 * k, 0, 0)).save(folder / f"{k}.png")
    row = [{"question": "?", "answer": f"a{k}", "image": str(folder / f"{k}.png")} for k in range(3)]
    table = datasets.Dataset.from_list(row).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "pictures")
    talk = [{"messages": TALK[1]["messages"], "images": [str(folder / "0.png"), str(folder / "1.png")]}]
    lists = datasets.Dataset.from_list(talk).cast_column("images", datasets.List(datasets.Image()))
    lists.save_to_disk(tmp_path / "lists")
    return tmp_path / "pictures", tmp_path / "lists"


def test_bytes_of_media_are_refused_or_written_to_files(pictures, tmp_path):
    single, lists = pictures
    with pytest.raises(BadSample, match=r"row 0: 'image' holds the bytes .*extract: FOLDER"):
        open_source("hf", single, columns={"image": "image"})[0]
    options = {"extract": "extracted", "media_dir": tmp_path}
    rows = open_source("hf", single, columns={"image": "image"}, **options)
    assert not (tmp_path / "extracted").exists()  # as rows are read
    loader = MediaLoader(tmp_path)
    for k in (2, 0, 2):
        path = rows[k].media[0]
        assert path.path.startswith("extracted/")
        assert path.path.endswith(".png")
        assert loader.frames(path, 1)[0, 0, 4, 4] == 100 * k
    assert len(list((tmp_path / "extracted").iterdir())) == 2
    talk = open_source("hf", lists, layout="swift", **options)
    assert len(talk[0].media) == 2
    assert talk[1].answer == "two"
    assert len(list((tmp_path / "extracted").iterdir())) == 3
    for folder in ("../x", "/x"):
        with pytest.raises(UserError, match="extract must be a folder below media_dir"):
            open_source("hf", single, columns={"image": "image"}, extract=folder)


def test_a_column_of_paths_is_left_alone(tmp_path):
    rows = [{"question": "?", "answer": "a", "audio": {"path": "a.wav", "bytes": None}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "sound")
    found = open_source("hf", tmp_path / "sound", columns={"speech": "audio"})
    assert found[0].media == [Media("audio", "a.wav", "speech")]


def test_media_in_columns_of_their_own_names(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "?", "answer": "a", "image": "a.png", "audio": "a.wav"}\n')
    picture = Media("image", "a.png", "vision")
    for columns, media in (
        (None, [picture, Media("audio", "a.wav", "audio")]),
        ({"speech": "audio"}, [picture, Media("audio", "a.wav", "speech")]),
        ({"audio": "", "image": ""}, []),
    ):
        (sample,) = open_source("hf", file, columns=columns)
        assert sample.media == media


def test_wrong_names(saved, tmp_path):
    with pytest.raises(UserError, match=r"has no column 'promt' .*is 'promt' called 'prompt' there"):
        open_source("hf", saved, columns=COLUMNS | {"question": "promt"})
    with pytest.raises(UserError, match=r"no column 'question' .*columns: \{question: \.\.\.\}"):
        open_source("hf", saved)
    with pytest.raises(UserError, match="option 'columns': unknown name 'picture'"):
        open_source("hf", saved, columns={"picture": "file"})
    with pytest.raises(UserError, match="unknown layout 'lava'; did you mean 'llava'"):
        open_source("hf", saved, layout="lava")
    with pytest.raises(UserError, match="`columns` belongs to layout: columns"):
        open_source("hf", saved, layout="llava", columns=COLUMNS)
    with pytest.raises(BadSample, match="row 0: there is no 'conversations'"):
        open_source("hf", saved, layout="llava")[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot open it .*expected a folder of save_to_disk, \.parquet, "):
        open_source("hf", tmp_path / "empty", columns=COLUMNS)
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"rows\.xlsx: is no file that .*known: \.parquet, \.arrow, \.jsonl"):
        open_source("hf", tmp_path / "rows.xlsx", columns=COLUMNS)
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: `datasets` cannot open it"):
        open_source("hf", tmp_path / "x.parquet", columns=COLUMNS)


def test_a_name_on_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing: `datasets` cannot open it .*on the hub \(which needs the"):
        open_source("hf", "nobody/nothing", columns=COLUMNS)


def test_a_stream_of_pictures_leaves_their_bytes_as_they_are(pictures, tmp_path):
    single, _ = pictures
    datasets.load_from_disk(single).to_parquet(tmp_path / "pictures.parquet")
    options = {"columns": {"image": "image"}, "media_dir": tmp_path, "split": "train"}
    whole = open_source("hf", tmp_path / "pictures.parquet", extract="whole", **options)
    some = open_source("hf", tmp_path / "pictures.parquet", extract="some", stream=2, **options)
    assert len(some) == 2
    for k in range(2):
        one, other = (tmp_path / rows[k].media[0].path for rows in (whole, some))
        assert one.read_bytes() == other.read_bytes()
        assert one.name == other.name


def test_pictures_inside_the_parts_of_messages(tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "red.png")
    parts = [
        {"type": "image", "image": str(tmp_path / "red.png"), "text": None},
        {"type": "text", "image": None, "text": "?"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]}
    table = datasets.Dataset.from_list([row])
    part = {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
    messages = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    table.cast(datasets.Features({"messages": messages})).save_to_disk(tmp_path / "nested")
    rows = open_source("hf", tmp_path / "nested", layout="messages", extract="out", media_dir=tmp_path)
    assert rows[0].media[0].path.startswith("out/")
    assert MediaLoader(tmp_path).frames(rows[0].media[0], 1)[0, 0, 4, 4] == 200


def test_a_class_is_answered_by_its_name(tmp_path):
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = [{"question": "?", "answer": k} for k in (1, 0, -1)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "classes")
    found = open_source("hf", tmp_path / "classes")
    assert [found[k].answer for k in range(2)] == ["dog", "cat"]
    with pytest.raises(BadSample, match="'answer' is missing or empty"):
        found[2]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_contents_that_are_texts_here_and_parts_there(tmp_path, suffix):
    """`datasets` keeps such a column as JSON, which is no medium."""
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    talks = [[("user", "Hi"), ("assistant", "Ho")], [("user", parts), ("assistant", "A cat.")]]
    rows = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in talks]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if suffix == "parquet":
        file = tmp_path / "rows.parquet"
        datasets.load_dataset("json", data_files=[str(tmp_path / "rows.jsonl")], split="train").to_parquet(file)
    read = open_source("hf", file, layout="messages")
    assert [sample.answer for sample in read] == ["Ho", "A cat."]
    assert read[0].messages[0].text == "Hi"
    assert read[1].media == [Media("image", "a.png", "vision")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_table_among_more_pictures_is_the_table(pictures, tmp_path, suffix):
    folder = tmp_path / "mixed"
    folder.mkdir()
    if suffix == "parquet":  # the second start finds what the first one has extracted
        datasets.load_from_disk(pictures[0]).to_parquet(folder / "rows.parquet")
    else:
        (folder / "train.jsonl").write_text(json.dumps({"question": "?", "answer": "a0", "image": "0.png"}))
        (folder / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "a1", "image": "1.png"}))
        for k in range(3):
            Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    for _ in range(2):
        rows = open_source("hf", folder, columns={"image": "image"}, media_dir=folder, extract="media", split="train")
        assert [sample.answer for sample in rows] == ["a0", "a1", "a2"][: 3 if suffix == "parquet" else 1]
        assert (folder / rows[0].media[0].path).is_file()


def test_a_subset_of_a_file_and_a_struct_that_is_no_medium(tmp_path):
    rows = [{"question": "?", "answer": "a", "about": {"bytes": 12, "path": "x"}}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert open_source("hf", tmp_path / "rows.parquet", extract="media")[0].meta == {
        "about": {"bytes": 12, "path": "x"}
    }
    with pytest.raises(UserError, match="is one file, which has no subset 'en'"):
        open_source("hf", tmp_path / "rows.parquet", subset="en")
