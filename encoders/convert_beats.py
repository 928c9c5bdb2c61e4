"""Convert a published BEATs checkpoint to safetensors, once:

    python -m encoders.convert_beats FILE.pt OUT.safetensors

The `.pt` is read with `weights_only=True`, so that no code in it runs, and every key of it must fit the model that its
own cfg describes. The result holds the same weights, the cfg as JSON in its metadata, and no pickle; it appears whole
or not at all. Cost: the checkpoint is held in memory once (360 MB for the published ones).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from encoders.errors import EncoderError


def convert_beats(source: str | Path, target: str | Path) -> None:
    """Read the checkpoint `source` and write it to `target`, a new file ending in .safetensors.

    Raises EncoderError for a source that is missing, broken, refused or of another architecture, and for a target that
    exists, has another ending, or cannot be written.
    """
    from safetensors import SafetensorError

    from encoders.beats import load_beats, save_beats

    target = Path(target)
    if target.suffix != ".safetensors":
        raise EncoderError(f"the converted file must end in .safetensors, found '{target}'")
    if target.exists():
        raise EncoderError(f"{target} exists already; remove it, or name another file")
    model = load_beats(source)
    temporary = target.with_name(f".{target.stem}.part.safetensors")
    try:
        save_beats(temporary, model)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{target} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 with one line on standard error."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m encoders.convert_beats", description=(__doc__ or "").split(":")[0])
    parser.add_argument("source", help="the published checkpoint, FILE.pt")
    parser.add_argument("target", help="the file to write, OUT.safetensors")
    parsed = parser.parse_args(arguments)
    try:
        convert_beats(parsed.source, parsed.target)
    except EncoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{parsed.target} written: use it as the `path` of a beats encoder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
