"""Talk to a trained model.

    python mokamm/infer.py RUN --video clip.mp4 --audio clip.wav --speech question.wav --image picture.png "question"

Any subset of media, each option as often as needed; the answer is streamed. `--json` prints one JSON object instead.
A bare RUN on a terminal opens a chat. Arguments, the run folder and the media files are checked before anything heavy
is imported. Exit code 2 and one message for a user's mistake; 130 for a Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data.schema import MEDIA, UserError, near
from mokamm.arguments import at_least_one
from mokamm.mistakes import is_users, tell
from mokamm.quiet import quiet

if TYPE_CHECKING:
    from data.schema import Message
    from mokamm.config import RunConfig
    from mokamm.model import MultimodalLM

HELP = """\
/video FILE   /image FILE   /audio FILE   /speech FILE     attach to the next question
/clear        begin a new conversation
/quit         leave (or Ctrl-D)"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="infer.py", description="Ask a trained model about video, sound, speech and images."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run (holds config.yaml and final/)")
    parser.add_argument("question", nargs="?", default="", help="may be left out where --speech asks it")
    for option in MEDIA:
        parser.add_argument(
            f"--{option}", action="append", default=[], metavar="FILE", help="may be given several times"
        )
    parser.add_argument(
        "--base", metavar="PATH", help="the LLM's hub id or folder, instead of the one in the run's config"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=at_least_one,
        metavar="N",
        help="default: evaluation.max_new_tokens of the run, as it was scored",
    )
    parser.add_argument(
        "--beams", type=at_least_one, default=1, metavar="N", help="beam search with N beams (not streamed)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: question, answer, media, seconds, tokens"
    )
    return parser.parse_intermixed_args(argv)  # the question may stand after the options


def given_media(args: argparse.Namespace) -> dict[str, list[str]]:
    return {option: getattr(args, option) for option in MEDIA if getattr(args, option)}


def check(args: argparse.Namespace, interactive: bool) -> RunConfig:
    """Everything that can be known without loading the model. Raises UserError."""
    from mokamm.config import load_run_config

    config = load_run_config(args.run)
    for option, paths in given_media(args).items():
        for path in paths:
            check_media(option, path, config)
    if not interactive and not args.question.strip() and not args.speech:
        raise UserError(
            'nothing was asked: add a question ("..."), or a spoken one (--speech FILE); '
            "a bare RUN on a terminal opens a chat"
        )
    return config


def check_media(option: str, path: str, config: RunConfig) -> None:
    _, modality = MEDIA[option]
    if modality not in config.model.modalities:
        known = ", ".join(config.model.modalities) or "text only"
        raise UserError(f"--{option}: this run has no modality '{modality}'; it was trained with: {known}")
    if not Path(path).is_file():
        raise UserError(f"--{option}: no such file: {path} (working directory {Path.cwd()}){near(Path(path))}")


class Asker:
    """A model and the conversation so far."""

    def __init__(self, model: MultimodalLM, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.history: list[Message] = []
        self.tokens = 0

    def ask(self, question: str, media: dict[str, list[str]], out: TextIO | None) -> str:
        """The answer, written to `out` token by token where one is given; both turns join the history."""
        from data.schema import Message, Text
        from mokamm.model import user_message

        streamer = Streamer(self.model.decode, out if self.args.beams == 1 else None)
        answer = self.model.chat(
            question,
            **media,
            history=self.history,
            max_new_tokens=self.args.max_new_tokens,
            num_beams=self.args.beams,
            streamer=streamer if self.args.beams == 1 else None,
        )
        self.tokens = streamer.tokens or len(self.model.tokenizer(answer, add_special_tokens=False)["input_ids"])
        if out is not None and self.args.beams > 1:
            print(answer, file=out)
        self.history += [user_message(question, **media), Message("assistant", (Text(answer),))]
        return answer


class Streamer:
    """What `generate` hands new tokens to: writes text as soon as it can no longer change, and counts."""

    def __init__(self, decode: Callable[[Sequence[int]], str], out: TextIO | None) -> None:
        self.decode, self.out = decode, out
        self.ids: list[int] = []
        self.tokens, self.written = 0, ""

    def put(self, value: Any) -> None:
        ids = value.flatten().tolist()
        self.ids += ids
        self.tokens += len(ids)
        text = self._text()
        if not text.endswith("\ufffd"):  # the first bytes of a character that is not whole yet
            self._write(text)

    def end(self) -> None:
        self._write(self._text())
        if self.out is not None:
            print(file=self.out, flush=True)

    def _text(self) -> str:
        return self.decode(self.ids).lstrip()

    def _write(self, text: str) -> None:
        if self.out is not None and text.startswith(self.written):
            print(text[len(self.written) :], end="", file=self.out, flush=True)
            self.written = text


def repl(asker: Asker, config: RunConfig, lines: Iterable[str], out: TextIO) -> None:
    """A chat: each line is a question or a command. Ctrl-C stops an answer; at the prompt it ends the chat."""
    media = given_media(asker.args)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/help":
                print(HELP, file=out)
            elif command == "/clear":
                asker.history.clear()
                media = {}
            elif command.removeprefix("/") in MEDIA and command.startswith("/"):
                option, path = command[1:], rest.strip().strip("'\"")
                check_media(option, path, config)
                media.setdefault(option, []).append(path)
                print(f"[{option}: {path}] goes with the next question", file=out)
            elif command.startswith("/"):
                raise UserError(f"unknown command '{command}'; /help lists them")
            elif line.strip() or media.get("speech"):
                asker.ask(line.strip(), media, out)
                media = {}
        except KeyboardInterrupt:
            print("\n[stopped; neither the question nor its answer is remembered]", file=out)
        except Exception as error:
            if not is_users(error):
                raise
            print(f"error: {error}", file=out)


def _typed_lines() -> Iterable[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # None: started with it closed


def run(args: argparse.Namespace) -> None:
    interactive = not args.question and not given_media(args) and not args.json and _at_a_terminal()
    config = check(args, interactive)
    quiet(errors_alone=True)
    from mokamm.model import MultimodalLM

    asker = Asker(MultimodalLM.from_run(args.run, args.base, args.device), args)
    if interactive:
        print(f"{args.run}: {', '.join(config.model.modality_names)}\n{HELP}")
        repl(asker, config, _typed_lines(), sys.stdout)
        return
    media = given_media(args)
    start = time.monotonic()
    answer = asker.ask(args.question, media, None if args.json else sys.stdout)
    if args.json:
        seconds = round(time.monotonic() - start, 3)
        result = {
            "question": args.question,
            "answer": answer,
            "media": media,
            "seconds": seconds,
            "tokens": asker.tokens,
        }
        print(json.dumps(result, ensure_ascii=False))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the answer so far may have no end of line
        sys.exit(130)
    except Exception as error:
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
