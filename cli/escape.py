"""Makes the text of files safe to show: control characters become visible escapes."""

import re

# Control characters except tabs and line ends, line separators, characters that turn the direction of text, and lone
# surrogates. Other format characters stay: emoji and several scripts need joiners.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# A closing bracket at the start of a line belongs to JSON, which programs read, and stays there.
_LATER_LINE = re.compile(r"\n(?=[^\s\]}])")


def visible(text: str) -> str:
    r"""`text` with the characters that terminals obey as escapes such as \u001b, as in JSON.

    Lines after the first are indented, so that a line inside a name or a library's message is not taken for output."""
    return _LATER_LINE.sub("\n  ", escaped(text))


def visible_line(text: str) -> str:
    """`visible` for text that must stay on one line, such as a table's cell or a name beside a bar."""
    return escaped(text).replace("\n", r"\u000a")


def escaped(text: str) -> str:
    r"""`text` with the characters that terminals obey as escapes; lines stay as they are."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
