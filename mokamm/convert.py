"""Weights from and to other formats:  mokamm convert SOURCE OUT [--to FORMAT] [--mask FILE] [--base PATH] [--dry-run]

    source                                              default result
    a LORI_S run or folder                              lora     plain PEFT LoRA: any PEFT user loads it, identical logits
    a LoRA folder whose B is mostly zero (published     lori_s   the entries that are not zero (or those of --mask), A stored
      LoRI-S), with or without --mask
    another LoRA folder (LoRI-D)                        lora     cleaned: the lora_ tensors alone
    a published mask (masks/0.9_mask.pt)                mask     a mask file for adapter.mask
    a published MokA checkpoint, or its stage 1 (*.bin) moka     adapter/ and projectors.safetensors, for training.init_from
    the published BEATs (a .pt with cfg and model)      beats    a safetensors file for the encoder's path
    a run, with --to llm (not MokA's)                   llm      a run with the adapter merged; OUT/final/llm is a plain LLM

An importer of another kind of source is one function `plan_...(source, options) -> Plan | None` named in `plan`: None where
the source is not its own. `--dry-run` says what would be written, and OUT may be left out then. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data.schema import UserError
from mokamm.mistakes import tell
from mokamm.quiet import stdout_kept_clean
from mokamm.training.disk import writing

FORMATS = ("lora", "lori_s", "mask", "moka", "beats", "llm")


@dataclass(frozen=True)
class Options:
    """What the command line says beside SOURCE and OUT."""

    to: str | None = None
    mask: Path | None = None
    base: str | None = None
    logits_by_keys: bool = False

    def refuse_other(self, result: str, source: Path, what: str) -> None:
        """Raises UserError where --to asks for another result than the only one that a source can have."""
        if self.to not in (None, result):
            raise UserError(f"{source} is {what}; it cannot become {self.to}")


@dataclass(frozen=True)
class Plan:
    """found: what the source is; result: a name of FORMATS; write(OUT) makes it; warnings: what is left out, and why.

    check(OUT) raises UserError for a name that the result cannot have, in a dry run too."""

    found: str
    result: str
    write: Callable[[Path], None]
    warnings: list[str] = field(default_factory=list)
    check: Callable[[Path], None] = lambda out: None


def plan(source: Path, options: Options) -> Plan:
    """Raises UserError or AdapterError where no importer knows the source, or it cannot become what is asked for."""
    from mokamm.beats_convert import plan_beats
    from mokamm.lori_convert import plan_adapter, plan_mask
    from mokamm.merge import plan_merged
    from mokamm.published_moka import plan_published

    importers: tuple[Callable[[Path, Options], Plan | None], ...] = (
        plan_merged, plan_published, plan_beats, plan_mask, plan_adapter,
    )  # fmt: skip
    if not source.exists():
        raise UserError(f"no such file or folder: {source} (working directory {Path.cwd()})")
    for importer in importers:
        if (found := importer(source, options)) is None:
            continue
        if options.mask is not None and importer is not plan_adapter:
            raise UserError(f"--mask goes with an adapter; {source} is: {found.found}")
        if options.base is not None and importer is not plan_merged:
            raise UserError(f"--base goes with a run and --to llm; {source} is: {found.found}")
        if options.logits_by_keys and importer is not plan_published:
            raise UserError(f"--logits-by-keys goes with a published MokA checkpoint; {source} is: {found.found}")
        return found
    raise UserError(
        f"{source} is none of: a run or a folder with adapter_config.json; a published MokA checkpoint (a folder, or one "
        "*.bin, with an adapter's or projectors' keys); a mask (*.pt, *.safetensors); BEATs (*.pt)"
    )


@contextmanager
def _whole(out: Path) -> Iterator[None]:
    """A failure leaves nothing of OUT, which was not there before: the next try may have its name."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # it was a folder, or could not be made at all
            out.unlink()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mokamm convert", description="Adapters, masks and encoders from and to other formats."
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a run, an adapter's folder, MokA's checkpoint, a mask, BEATs.pt"
    )
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="the folder (of a mask or BEATs: the file) to write"
    )
    parser.add_argument("--to", choices=FORMATS, help="default: by what the source is")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="for a LoRI-S published as LoRA: which entries trained"
    )
    parser.add_argument("--base", metavar="PATH", help="with --to llm: the LLM, instead of the one in the run's config")
    parser.add_argument(
        "--logits-by-keys", action="store_true", help="for a MokA checkpoint trained by its code of before 2025-12-28"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("OUT is missing; only with --dry-run it may be")
    try:
        planned = plan(args.source, Options(args.to, args.mask, args.base, args.logits_by_keys))
        if args.out is not None:
            if args.out.exists():
                raise UserError(f"{args.out} is there already; nothing is overwritten. Choose another name")
            planned.check(args.out)
        if not args.dry_run:
            failing = writing(args.out, "choose another place for OUT")
            with stdout_kept_clean(args.json), failing, _whole(args.out):
                planned.write(args.out)
    except Exception as error:
        return tell(error)
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        out = None if args.out is None else str(args.out)
        told = {"source": str(args.source), "found": planned.found, "to": planned.result, "out": out}
        print(json.dumps({**told, "written": not args.dry_run, "warnings": planned.warnings}))
    else:
        verb = "would be written" if args.dry_run else "written"
        print(f"{args.source}: {planned.found}\n{args.out or 'OUT'}: {verb} as {planned.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
