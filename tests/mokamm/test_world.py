"""Which folders count as the world that a configuration asks for (making one is tested in tests/data)."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from data.miniworld.write import VERSION, Request, lacking
from data.schema import UserError
from mokamm.config_sections import WorldConfig
from mokamm.training import world


@pytest.fixture
def made(tmp_path):
    """A world of which only the notes on what it was made from are there."""
    for split in world.SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "DONE.json").write_text(json.dumps(asdict(Request(split, 3, seed=5))))
        for name in lacking(tmp_path / split):
            (tmp_path / split / name).touch()
    return tmp_path


def asked(folder, **changes):
    return WorldConfig(**{"dir": str(folder), "seed": 5, "train": 3, "validation": 3, "test": 3} | changes)


def test_a_world_that_is_there_is_not_made_again(made, monkeypatch):
    monkeypatch.setattr(world, "run_program", None)
    world.make_world(asked(made))


@pytest.mark.parametrize("changes", [{"validation": 4}, {"seed": 6}])
def test_another_world_is_refused_with_what_to_delete(made, changes):
    with pytest.raises(UserError, match=r"holds another miniature world.*Delete that folder \(rm -r .*\)"):
        world.make_world(asked(made, **changes))


def test_a_world_of_another_version_or_without_notes_is_refused(made):
    done = made / "test" / "DONE.json"
    done.write_text(json.dumps(asdict(Request("test", 3, 5)) | {"version": VERSION - 1}))
    with pytest.raises(UserError, match=rf"'version': {VERSION - 1}.* there, .*'version': {VERSION}.* wanted"):
        world.make_world(asked(made))
    done.unlink()
    with pytest.raises(UserError, match=r"no DONE\.json there"):
        world.make_world(asked(made))


def test_an_older_world_gets_the_rows_that_it_lacks(made):
    (made / "validation" / "told.jsonl").unlink()
    world.make_world(asked(made))
    assert len((made / "validation" / "told.jsonl").read_text().splitlines()) == 6
    assert not (made / "validation" / "videos").exists(), "nothing else is made anew"
