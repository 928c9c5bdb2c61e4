"""Which option does a text choose? Letters as the strict rule reads them, and as the published MokA scripts do.

strict, of the text, or what of it stands in <answer> tags or a \\boxed{}, the first that holds (options, where their number
is not known, are A to E):
    0. the whole text is one option's text, letter for letter or else but for case, and no letter of an option
    1. a letter alone at the beginning: "B", "(B)", "B.", "B) a cat", "B a cat", "b: a cat", or on a line of its own; but
       not the article of "a cat", and not where a second letter follows ("A or B")
    2. "answer is B", "**Answer:** (B)", "option B", "choice B" (both exceptions as above), where all such places name one
       letter
    A letter before a word may belong to the sentence, too: "A dog", "I hear a dog", and "C major it is" where an option is
    called so. Where that text names one option alone, it is that one.
    3. one letter in brackets, "... is (B)", where no other one stands in brackets, or follows ("(A) or B")
    4. the text of one option and of no other, where the options are known ("(A) a cat", "(B) a dog": without the letters)
else it is unparsed.

official: the text stripped and lower-cased, the letters tried in the order a to e: the first whose `x ` (letter and
space) stands anywhere in it is the choice. So "b a cat" chooses a, "the dog is a b " chooses a, and "B" alone is no
answer.

Cost: linear in the letters of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.benchmarks.base import normalise
from eval.benchmarks.tags import marked

LETTERS = "ABCDEFGHIJ"
OFFICIAL_LETTERS = "abcde"
_LEADING = re.compile(r"[(\[*\"']{0,4}([A-Ja-j])(?![^\W_]|[#\u266f\u266d])(?!['\u2019]\w)")
_SECOND = re.compile(r"[)\]*\"'.:,]{0,4}\s{0,4}(?:(?:or|and|/|&|,)\s{0,4}){1,3}[(\[*\"']{0,4}[A-J](?![^\W_])")
_SAID = re.compile(
    r"\b(?:answer|option|choice)(?:\s{1,4}is)?\*{0,3}\s{0,4}:?\*{0,3}\s{0,4}[(\[*\"']{0,4}([A-J])(?![^\W_]|[#\u266f\u266d])",
    re.IGNORECASE,
)
WORDS = "AI"  # letters that are words of English, too
_BRACKETS = re.compile(r"\(([A-J])\)")
_WORD = r"[^\S\n]+\w"  # a word on the same line
_OPTION_LINE = re.compile(r"\s{0,8}\(?([A-J])[.):]\s{0,8}(\S.*)")
UNKNOWN = 5  # letters that may be chosen where the options are not known
LONGEST_OPTION = 2000  # letters of a text that may still be an option's own


def choose(text: str, options: Sequence[str] = ()) -> str | None:
    """The chosen letter (upper case) or None. options: their texts in order; () where they are not known."""
    text = marked(text.replace("</s>", " ")).strip()
    known = LETTERS[: len(options) or UNKNOWN]
    if not _is_letter(text, known) and (equal := _whole(text, options)):
        return equal
    named = by_text(text, options)
    for found in (_leading(text), _only(_SAID, text), _only(_BRACKETS, text)):
        if found is not None and found in known:
            return named if named and _in_sentence(found, text, options[LETTERS.index(named)]) else found
    return named


def _is_letter(text: str, known: str) -> bool:
    return len(text) == 1 and text.upper() in known


def _bare(options: Sequence[str]) -> list[tuple[str, str]]:
    """The letters and texts of options, without the letters of their own where each begins with its one."""
    pairs = list(zip(LETTERS, options, strict=False))
    own = [(match[1], match[2]) for _, option in pairs if (match := _OPTION_LINE.fullmatch(option.strip()))]
    return own if [letter for letter, _ in own] == [letter for letter, _ in pairs] else pairs


def _texts(options: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the options that have a text."""
    return [(letter, option.strip()) for letter, option in _bare(options) if option.strip()]


def _whole(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose text this is: letter for letter, else but for case, else normalised."""
    exact = [letter for letter, option in _texts(options) if option == text]
    alike = [letter for letter, option in _texts(options) if option.casefold() == text.casefold()]
    return next((same[0] for same in (exact, alike) if len(same) == 1), None) or by_text(text, options, whole=True)


def _in_sentence(letter: str, text: str, option: str) -> bool:
    """Whether a letter that was found may be a word of the sentence: A and I, or one that the named option holds."""
    if letter in WORDS:
        return re.search(rf"(?:^|[\s:]){letter}{_WORD}", text) is not None
    bare = re.search(rf"(?:^|[\s:]){letter}{_WORD}", text, re.IGNORECASE)
    return bare is not None and letter.casefold() in normalise(option).split()


def _leading(text: str) -> str | None:
    match = _LEADING.match(text)
    if match is None:
        return None
    letter, rest = match[1], text[match.end() :][:60]
    if _article(match, text) or _SECOND.match(rest):
        return None
    return letter.upper()


def _article(match: re.Match[str], text: str) -> bool:
    """Whether the letter that was matched is the `a` of "a cat"."""
    return match[1] == "a" and re.match(_WORD, text[match.end() : match.end() + 60]) is not None


def _only(pattern: re.Pattern[str], text: str) -> str | None:
    matches = [match for match in pattern.finditer(text) if not _article(match, text)]
    found = {match[1].upper() for match in matches}
    if any(_SECOND.match(text[match.end() :][:60]) for match in matches):
        return None
    return found.pop() if len(found) == 1 else None


def by_text(text: str, options: Sequence[str], whole: bool = False) -> str | None:
    """The letter of the option whose text this is, or (unless `whole`) that alone is named in it."""
    if len(text) > LONGEST_OPTION:
        return None
    said = f" {normalise(text)} "
    texts = [(letter, f" {normalise(option)} ") for letter, option in _texts(options)]
    equal = [letter for letter, option in texts if option.strip() and said == option]
    named = [letter for letter, option in texts if option.strip() and option in said and not whole]
    return next((found[0] for found in (equal, named) if len(found) == 1), None)


def official_choice(text: str) -> str | None:
    """The letter (upper case) that the published MokA scripts read."""
    lowered = text.strip().lower()
    return next((letter.upper() for letter in OFFICIAL_LETTERS if f"{letter} " in lowered), None)


def true_letter(answer: str, options: Sequence[str] = (), text_first: bool = False) -> str | None:
    """The letter of a true answer: a letter, a letter with its text, or an option's text (of like ones, the first).

    text_first: answers are texts, so that a letter is an option's text (a note's name) where one is called so.
    """
    answer = answer.replace("</s>", "").strip()
    if not text_first and _is_letter(answer, LETTERS[: len(options) or None]):
        return answer.upper()
    same = [letter for letter, option in _texts(options) if option == answer]
    return same[0] if same else _whole(answer, options) or _leading(answer)


def options_in(question: str) -> list[str]:
    """The options that a question lists line by line (`A. a cat`), from A on; empty where it lists none."""
    found: list[str] = []
    for line in question.split("\n"):  # no other end: an option may hold U+2028
        match = _OPTION_LINE.fullmatch(line)
        if match and len(found) < len(LETTERS) and match[1] == LETTERS[len(found)]:
            found.append(match[2].strip())
    return found


def listed(options: Sequence[str]) -> str:
    """The options as a question shows them."""
    return "\n".join(f"{letter}. {option}" for letter, option in _bare(options))
