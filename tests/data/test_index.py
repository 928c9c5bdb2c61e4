"""Byte spans of rows against json.loads of the whole file, with windows so small that every value is cut somewhere."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.schema import BadSample, UserError
from data.sources.index import Spans, array_rows, elements, json_rows, lines
from data.sources.rows import value_of

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(VALUES, max_size=6),
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_elements_are_those_of_json(tmp_path_factory, values, window, indent, ascii_only, bom):
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content)
    whole = path.read_bytes()
    found = list(elements(path, window))
    assert [json.loads(whole[start : start + size]) for start, size, _ in found] == json.loads(text)
    assert [value for *_, value in found] == json.loads(text) or "\\ud" in ascii(text)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(VALUES, min_size=1, max_size=4), data=st.data(), window=st.integers(1, 40))
def test_a_broken_array_is_told_where_json_tells_it(tmp_path_factory, values, data, window):
    text = json.dumps(values, indent=data.draw(st.sampled_from([None, 1])))
    at = data.draw(st.integers(1, len(text) - 1))
    broken = text[:at] + data.draw(st.sampled_from(["", "]", "}", ",", "x", '"', "\x01"])) + text[at + 1 :]
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(broken)
    try:
        expected = json.loads(broken)
    except json.JSONDecodeError:
        with pytest.raises(UserError, match=r"line [0-9]+, column [0-9]+: is not JSON|expected a JSON array"):
            list(elements(path, window))
    else:
        if isinstance(expected, list):
            assert [value for *_, value in elements(path, window)] == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n {"a": 1},\n <html>\n]', r"line 3, column 2: is not JSON \(Expecting value\); found '<html>'"),
        ('[{"ä": "ö"} {"b": 2}]', r"line 1, column 13: is not JSON \(Expecting ',' delimiter\)"),
        ('[{"a": 1},]', "line 1, column 11: is not JSON"),
        ("[1, 2", "line 1, column 6: is not JSON"),
        ('[1, "abc', "line 1, column 5: is not JSON .Unterminated string"),
        ("[1] [2]", r"line 1, column 5: is not JSON \(Extra data\)"),
        ('{"a": 1}', "expected a JSON array of rows, found an object with keys a"),
        ("[ ]", "the JSON array holds no rows"),
    ],
)
def test_where_an_array_breaks(tmp_path, text, place):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=place):
        array_rows(path)


def test_broken_bytes_in_an_array_spoil_one_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff\xfe"},\n {"a": "\xc3\xa4"}]')
    rows = array_rows(path)
    with pytest.raises(BadSample, match="is not UTF-8 text"):
        value_of(rows[0])
    assert value_of(rows[1]) == {"a": "ä"}


def test_json_that_python_refuses_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + "[" * 100_000 + "\n" + "9" * 5000 + '\n{"a": 2}\n')
    rows = json_rows(path, "{}", answers=lambda value: 1)
    assert len(rows) == 4
    for k in (1, 2):
        with pytest.raises(BadSample, match=rf"line {k + 1}"):
            value_of(rows[k])
    assert value_of(rows[3]) == {"a": 2}


def test_lines_of_several_files(tmp_path):
    for name, text in (("a", "x\r\n\r\ny"), ("b", "\n"), ("c", "z\n")):
        (tmp_path / name).write_text(text)
    found = lines([tmp_path / name for name in "abc"])
    assert [(raw.text, raw.line, raw.path.name) for raw in found] == [(b"x", 1, "a"), (b"y", 3, "a"), (b"z", 1, "c")]
    assert [raw.text for raw in found.without_first()] == [b"y", b"z"]


def test_an_index_costs_28_bytes_a_row_and_is_pickled_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 5000)
    rows = json_rows(path, "{}")
    size = len(pickle.dumps(rows))
    assert 28 * 5000 < size < 28 * 5000 + 1000
    again: Spans = pickle.loads(pickle.dumps(rows))
    assert again[4999] == rows[4999]
    assert again[4999].line == 5000


def test_a_file_that_went_away_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    rows = json_rows(path, "{}")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read any more"):
        rows[0]
