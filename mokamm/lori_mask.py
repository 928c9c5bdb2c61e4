"""Cut a LoRI mask:  mokamm lori-mask RUN_OR_ADAPTER --sparsity 0.9 --out FILE

    |B| of a trained LoRI-D (or of LoRI-D on MokA), all layers together --the largest tenth--> which entries LoRI-S trains

A mask file is safetensors: per layer (by its name in the LLM) the packed bits and the shape of B, and the hash of the A
that B was trained with, so that a mask is not used under another. `adapter.mask=FILE` in a config of method lori_s or
lori_moka_s uses it; without one, such a run cuts its own (mokamm/training/two_phase.py). Cost: three reads of B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.schema import UserError
from mokamm.mistakes import tell
from mokamm.training.disk import replacing, writing

if TYPE_CHECKING:
    from mokamm.adapters.masks import Mask

FORMAT = "mokamm lori mask 1"


def cut(adapter: str | Path, sparsity: float) -> Mask:
    """The mask of an adapter with a dense B. Raises UserError or AdapterError for what is none."""
    from mokamm.adapter_folder import AdapterFolder
    from mokamm.adapters.masks import keep_top

    folder = AdapterFolder.open(adapter)
    if folder.kind == "LORI_S" or folder.config.get("sparse_b"):
        raise UserError(
            f"{folder.folder} is sparse already ({folder.kind}): a mask is cut from the dense B of a lori_d or "
            "lori_moka_d run"
        )
    return keep_top({name: B for name, (_, B) in folder.layers.items()}, folder.b, sparsity, folder.a_hash)


def write_mask(mask: Mask, path: str | Path, made_from: str = "") -> None:
    """made_from: kept beside the mask, for whoever asks what it was cut from."""
    import torch
    from safetensors.torch import save_file

    from mokamm.weights import share

    tensors = {f"{name}.mask": bits.contiguous() for name, bits in mask.bits.items()}
    tensors |= {f"{name}.shape": torch.tensor(shape, dtype=torch.int32) for name, shape in mask.shapes.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"format": FORMAT, "a_hash": mask.a_hash or "", "made_from": made_from})
        share(beside)


def read_mask(path: str | Path) -> Mask:
    """Raises UserError for a file that is none, AdapterError for one that is damaged."""
    from safetensors import SafetensorError, safe_open

    from mokamm.adapters.masks import Mask, tidy

    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a mask: {error}. Expected a file of `mokamm lori-mask`; `mokamm convert` reads the "
            "published masks (*.pt)"
        ) from error
    about = file.metadata() or {}
    if about.get("format") != FORMAT:
        raise UserError(
            f"{path} is no mask that this mokamm knows: its format is {about.get('format')!r}, expected {FORMAT!r}. One of "
            "a newer mokamm needs an update (git pull, then uv sync)"
        )
    names = [key.removesuffix(".mask") for key in list(file.keys()) if key.endswith(".mask")]
    shapes = {name: tuple(file.get_tensor(f"{name}.shape").tolist()) for name in names}
    bits = {name: tidy(name, file.get_tensor(f"{name}.mask"), shapes[name]) for name in names}
    return Mask(bits, shapes, about.get("a_hash") or None)


def made_from(path: Path) -> str | None:
    """What a mask file says that it was cut from; None where there is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        return (safe_open(path, "pt").metadata() or {}).get("made_from")
    except (OSError, SafetensorError):
        return None


def table(mask: Mask) -> list[str]:
    """Kept entries by the layers' last names: the whole is exact, its parts differ."""
    from mokamm.adapters.masks import count

    sums: dict[str, list[int]] = {}
    for name, bits in mask.bits.items():
        found = sums.setdefault(name.rpartition(".")[2], [0, 0])
        found[0] += count(bits)
        found[1] += mask.shapes[name][0] * mask.shapes[name][1]
    lines = [f"  {name:12} {kept:>12,} of {total:>12,}   {kept / total:6.2%}" for name, (kept, total) in sums.items()]
    return [*lines, f"  {'all':12} {mask.kept:>12,} of {mask.total:>12,}   {mask.kept / mask.total:6.2%}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mokamm lori-mask", description="Cut a LoRI mask from a trained LoRI-D.")
    parser.add_argument("adapter", type=Path, metavar="RUN_OR_ADAPTER", help="a lori_d or lori_moka_d run")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of B's entries that stay zero (default 0.9)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the mask file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    try:
        mask = cut(args.adapter, args.sparsity)
        with writing(args.out, "choose another file (--out)"):
            write_mask(mask, args.out, str(args.adapter))
    except Exception as error:
        return tell(error)
    if args.json:
        print(json.dumps({"mask": str(args.out), "kept": mask.kept, "entries": mask.total, "a_hash": mask.a_hash}))
    else:
        print(f"{args.out}: kept entries of B", *table(mask), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
