"""Find what a message means: cards.json, and what the backends know of TensorRT's and TensorRT-LLM's words. Offline."""

from __future__ import annotations

import codecs
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.backends.tensorrt.api import KNOWN as TENSORRT
from helpers.backends.tensorrt_llm.errors import KNOWN as TENSORRT_LLM
from helpers.errors import InputError, printable, shown, why_refused
from helpers.messages import LONGEST_LINE, Match, matches, plain, read_cards

LONGEST = 2**26  # bytes of a log that are read: its end, where errors stand
SHOWN = 5  # troubles of one log that are told

_course = read_cards(Path(__file__).with_name("cards.json"))
# A line can match several cards. Those that say more come first, and the course's own errors, by their names, last.
CARDS = [
    *(card for card in _course if card.error == "CourseError"),
    *TENSORRT_LLM,
    *TENSORRT,
    *(card for card in _course if card.error != "CourseError"),
]
OWN = {card.error: card for card in _course if any(words.startswith("^") for words in card.words)}
OWN_LINE = re.compile(rf"(?:helpers\.errors\.)?({'|'.join(OWN)}): ")


@dataclass(frozen=True)
class Explanation:
    """The troubles that a text tells of, in its order; none, and so false, where the course knows none of them."""

    troubles: list[Match]

    def __bool__(self) -> bool:
        return bool(self.troubles)

    def __str__(self) -> str:
        if not self:
            return (
                "The course does not know this message.\n"
                "  Next: helpers doctor looks at this machine. Else search the issues of NVIDIA/TensorRT-LLM for the\n"
                "  first line that says error, without your own paths and numbers."
            )
        told = [_told(match) for match in self.troubles[:SHOWN]]
        more = len(self.troubles) - SHOWN
        return printable("\n\n".join([*told, f"And {more} more, later in the log."] if more > 0 else told))

    __repr__ = __str__


def explain(message: str | Path) -> Explanation:
    """What a message means and what ends it. Give the text of an error or of a whole log, or the Path of a log."""
    if isinstance(message, Path):
        message = read_log(message)
    if not isinstance(message, str):
        raise InputError(f"A message is a text, not {shown(message)}.", fix="Give a text, or the Path of a log.")
    of_line: dict[int, Match] = {}
    for match in matches(message, CARDS):
        of_line.setdefault(match.number, match)
    lines = plain(message).split("\n")
    told = {match.line for match in of_line.values()}
    for number, line in enumerate(lines, start=1):  # a card has its first line alone, and each error has its own fix
        if (own := OWN_LINE.match(line)) and (shown_line := line.strip()[:LONGEST_LINE]) not in told:
            told.add(shown_line)
            of_line.setdefault(number, Match(OWN[own[1]], number, shown_line))
    return Explanation([_by_itself(match, lines) for _, match in sorted(of_line.items())])


def _by_itself(match: Match, lines: list[str]) -> Match:
    """An error of the course has its own cause and fix in the lines after it: they say more than its kind does."""
    begins = OWN_LINE.match(match.line)
    if not begins or begins[1] != match.card.error:
        return match
    own = {}
    for line in lines[match.number :]:
        if not line or OWN_LINE.match(line):
            break
        if found := re.match(r"(Likely cause|Fix): (.*)", line):
            own[found[1]] = found[2]
    cause, fix = own.get("Likely cause", ""), own.get("Fix", "")
    return match._replace(card=replace(match.card, cause=cause, fix=fix)) if own else match


def read_log(path: Path) -> str:
    """A log's text, of a very long one the end."""
    try:
        if not path.is_file():  # a pipe could keep us waiting
            raise InputError(f"There is no file {path.name!r}.", fix="Give the path of a log.")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LONGEST))
            return decode(file.read(LONGEST), path.name)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        words = f"The log cannot be read: {error}."
        raise InputError(words, cause=why_refused(error), fix="Mend that, or give another file.") from error


def decode(content: bytes, name: str = "The input") -> str:
    """The text in the bytes of a log, whatever bytes are in it."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what ">" writes in Windows' PowerShell
    text = content.decode("utf-16" if wide else "utf-8", "replace").replace("\0", "")  # zeros: a log cut while written
    sample = text[:100_000]
    if len(re.findall(r"[\x01-\x07\x0e-\x1a\x1c-\x1f]", sample)) > len(sample) / 50:
        raise InputError(f"{name} is no text.", fix="Give a log, or the message itself.")
    return text


def _told(match: Match) -> str:
    card = match.card
    rows = {
        "It says": match.line,
        "It means": card.cause,
        "What ends it": card.fix,
        "Source": card.source,
        "In the course": card.shown,
    }
    return "\n".join(
        textwrap.fill(f"{name + ':':<15}{text}", 100, subsequent_indent=" " * 15, break_on_hyphens=False)
        for name, text in rows.items()
        if text
    )
