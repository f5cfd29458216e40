"""Lines and tables on a terminal: broken between words, paths after a slash, and columns left out that do not fit."""

import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from cascadekit.cli import console
from cascadekit.cli.wrap import TableLayout, folded, layout, wrapped
from tools.terminal import terminal


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("as wide as this line", ["as wide as this line"]),
        ("one word more than fits", ["one word more than", "  fits"]),
        ("  4 MB  of a list that is long", ["  4 MB  of a list", "    that is long"]),
        ("wrote /a/path/of/20/cells (64)", ["wrote", "  /a/path/of/20/", "  cells (64)"]),
        ("wrote /a/path/of/18/ce (64)", ["wrote", "  /a/path/of/18/ce", "  (64)"]),
        ("x" * 23, ["x" * 18, "  " + "x" * 5]),
        ("犬犬犬犬犬 犬犬犬犬犬", ["犬犬犬犬犬", "  犬犬犬犬犬"]),
        ("two\n\nlines", ["two", "", "lines"]),
        ("  cascadekit demo -o here", ["  cascadekit demo \\", "    -o here"]),
        ("cascadekit 0.1.0, numpy 2.4.6", ["cascadekit 0.1.0,", "  numpy 2.4.6"]),
    ],
)
def test_lines(text: str, lines: list[str]) -> None:
    assert list(wrapped(text, 20)) == lines
    assert all(cell_len(line) <= 20 for line in lines)


def test_no_text_is_lost() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for width in (10, 33, 80, 200):
        assert re.sub(r"\s|\\", "", "".join(wrapped(text, width))) == re.sub(r"\s|\\", "", text)


def test_a_table_keeps_words_whole_and_leaves_columns_out() -> None:
    columns, rows = ("stage", "note", "file"), [("decoder", "a few words more", "a/bundle/graph.onnx")]
    assert layout(columns, rows, 52, []) == TableLayout((0, 1, 2), (7, 16, 19))  # as wide as its cells, and a frame
    narrow = layout(columns, rows, 35, [])
    assert (narrow.shown, sum(narrow.widths)) == ((0, 1, 2), 25)
    assert folded("a/bundle/graph.onnx", 10) == "a/bundle/\ngraph.onnx"
    assert layout(columns, rows, 35, ["note"]) == TableLayout((0, 2), (7, 19))
    assert layout(columns, rows, 20, []) == TableLayout((), ())


@pytest.mark.parametrize("columns", [80, 200])
def test_a_table_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 200 columns it has all columns; at 80 it has no line that is too long, and no word is broken."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    heads = ("compared", "max abs", "verdict")
    name = "prior: noise_pred in two parts (t 0.95, batch 1, height 6, width 6, tokens 77, images 1, guided)"
    console._console.cache_clear()
    with terminal(columns) as screen:
        left_out = console.show_table("", heads, [(name, "2.41e-02", "ok")] * 2, optional=["max abs"])
        console.say("a sentence with some words, " * 8)
        console.say_json({"long": "value " * 40})
    console._console.cache_clear()
    assert left_out == set() if columns == 200 else {"max abs"}
    table = [line for line in screen.lines() if line.startswith("│")]
    assert len(table) == (2 if columns == 200 else 4)
    assert all(word in " ".join(table) for word in name.split())
    sentence = [line for line in screen.lines() if "sentence" in line]
    assert all(len(line) <= columns and line.endswith(("words,", "sentence", "with", "a", "some")) for line in sentence)
    assert any(number in screen.broken for number, line in enumerate(screen.lines()) if "long" in line)  # JSON is whole


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_prose_on_a_terminal_is_broken_once(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of 100 columns were broken again where the terminal ended: a word or two stood alone between long lines."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    text = ", ".join(f"effnet_encoder_{number}" for number in range(16))
    console._console.cache_clear()
    with terminal(columns) as screen:
        console.say_wrapped(text)
    console._console.cache_clear()
    lines = [line.rstrip() for line in screen.lines() if line.strip()]
    widest = min(columns, 100)
    assert " ".join(line.strip() for line in lines) == text
    assert all(widest - 20 < len(line) <= widest for line in lines[:-1])


def test_prose_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_wrapped("word " * 60)
    assert capsys.readouterr().out == "word " * 60 + "\n"
