"""What happens in a ten-second clip: shapes that come and go, instruments that sound, and which belong together.

Each shape plays one instrument (a circle the flute, a square the drum, ...). A shape may be silent and an instrument may
sound from off the screen, so what is seen does not tell what is heard. Visible and sounding intervals are whole seconds.
No two sounds start at the same second, so "first" and "last" are well defined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SECONDS = 10
PLAYS = {
    "circle": "flute",
    "square": "drum",
    "triangle": "bell",
    "star": "violin",
    "cross": "organ",
    "ring": "guitar",
    "diamond": "horn",
}
PLAYED_BY = {instrument: shape for shape, instrument in PLAYS.items()}
COLOURS = {
    "red": (230, 50, 45),
    "green": (50, 190, 70),
    "blue": (60, 90, 235),
    "yellow": (240, 220, 60),
    "white": (240, 240, 240),
    "purple": (165, 60, 200),
    "orange": (245, 140, 30),
    "cyan": (60, 215, 225),
}
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "bottom")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The shapes (with their instruments) and colours that a world draws from."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]


WORLD = Vocabulary(tuple(PLAYS), tuple(COLOURS))
# what the miniature base has met: no diamond, horn, orange, cyan
BASE = Vocabulary(WORLD.shapes[:-1], WORLD.colours[:-2])


@dataclass(frozen=True, slots=True)
class Sound:
    """An instrument heard during [start, end) seconds; pitch and level in [0, 1] vary its tone."""

    instrument: str
    start: int
    end: int
    pitch: float
    level: float

    @property
    def duration(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in one of six cells, visible during [enter, leave) seconds."""

    shape: str
    colour: str
    column: str
    row: str
    size: float
    phase: float
    enter: int
    leave: int


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    sounds: tuple[Sound, ...]
    texture: int  # seed of the background and of the noise

    def thing(self, shape: str) -> Thing | None:
        return next((thing for thing in self.things if thing.shape == shape), None)

    def sound_of(self, shape: str) -> Sound | None:
        return next((sound for sound in self.sounds if sound.instrument == PLAYS[shape]), None)

    @property
    def sounding(self) -> list[Thing]:
        """Things whose instrument is heard."""
        return [thing for thing in self.things if self.sound_of(thing.shape)]

    @property
    def by_start(self) -> list[Sound]:
        return sorted(self.sounds, key=lambda sound: sound.start)

    def event(self) -> tuple[str, int, int] | None:
        """(instrument, start, end) of the one thing that is seen and heard together, None unless there is exactly one."""
        events = []
        for thing in self.sounding:
            sound = self.sound_of(thing.shape)
            assert sound is not None
            start, end = max(thing.enter, sound.start), min(thing.leave, sound.end)
            if end > start:
                events.append((sound.instrument, start, end))
        return events[0] if len(events) == 1 else None


def _pick(rng: np.random.Generator, items: tuple[str, ...] | list[str], n: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:n]]


def _things(rng: np.random.Generator, vocabulary: Vocabulary, n: int, still: bool) -> tuple[Thing, ...]:
    cells = rng.permutation(len(COLUMNS) * len(ROWS))[:n]
    things = []
    for shape, cell in zip(_pick(rng, vocabulary.shapes, n), cells, strict=True):
        enter, leave = 0, SECONDS
        coming_or_going = rng.random()
        if not still and coming_or_going < 0.2:
            enter = int(rng.integers(1, 6))
        elif not still and coming_or_going < 0.4:
            leave = int(rng.integers(5, SECONDS))
        colour = vocabulary.colours[rng.integers(len(vocabulary.colours))]
        size, phase = float(rng.uniform(6.5, 9.0)), float(rng.uniform(0, 2 * np.pi))
        things.append(Thing(shape, colour, COLUMNS[cell % 3], ROWS[cell // 3], size, phase, enter, leave))
    return tuple(things)


def _sounds(rng: np.random.Generator, vocabulary: Vocabulary, things: tuple[Thing, ...], n: int) -> tuple[Sound, ...]:
    seen = {thing.shape: thing for thing in things}
    hidden = [shape for shape in vocabulary.shapes if shape not in seen]
    on_screen = min(n, len(seen), int(rng.binomial(n, 0.62)))
    players = _pick(rng, list(seen), on_screen)
    players += _pick(rng, hidden, min(n - on_screen, len(hidden)))
    starts = rng.permutation(SECONDS - 2)[: len(players)]
    sounds = []
    for shape, start in zip(players, starts, strict=True):
        thing = seen.get(shape)
        first = int(start)
        if thing is not None and thing.leave - 2 < first:  # a thing that leaves is heard before it is gone
            first = int(start) % (thing.leave - 1)
        shortest = 2 if thing is None else max(2, thing.enter - first + 2)
        end = int(rng.integers(first + shortest, SECONDS + 1)) if first + shortest <= SECONDS else SECONDS
        sounds.append(Sound(PLAYS[shape], first, end, float(rng.random()), float(rng.uniform(0.6, 1.0))))
    return tuple(sounds)


def sample_scene(rng: np.random.Generator, vocabulary: Vocabulary = WORLD, *, still: bool = False) -> Scene:
    """Draw a scene of one to four things and one to four sounds; `still` scenes (images) have no sound."""
    while True:
        things = _things(rng, vocabulary, int(rng.integers(1, 5)), still)
        sounds = () if still else _sounds(rng, vocabulary, things, int(rng.integers(1, 5)))
        if len({sound.start for sound in sounds}) == len(sounds):
            return Scene(things, sounds, int(rng.integers(2**31)))
