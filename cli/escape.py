"""Text of files made safe to show: what a terminal would obey becomes visible instead."""

import re

# Control characters but for tabs and line ends, both kinds of line separator, what turns the direction of text, and
# lone surrogates. Not format characters in general: emoji and several scripts need joiners.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Closing brackets are the last lines of JSON, which programs read.
_LATER_LINE = re.compile(r"\n(?=[^\s\]}])")


def visible(text: str) -> str:
    r"""`text` with the characters that terminals obey as escapes, such as \u001b, which JSON has too.

    Lines after the first are indented, so that none in a name or a message of a library passes for one of its own."""
    return _LATER_LINE.sub("\n  ", escaped(text))


def visible_line(text: str) -> str:
    """`visible` for what must stay on one line: a cell, a name beside a bar."""
    return escaped(text).replace("\n", r"\u000a")


def escaped(text: str) -> str:
    r"""`text` with the characters that terminals obey as escapes, lines as they are."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
