"""When `ui` opens the browser: on a terminal, beside a screen, and not with --no-open."""

from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.cli.desktop import has_screen


@pytest.mark.parametrize(
    ("environment", "platform", "seen"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ""}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "darwin", True),
        ({"SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, "darwin", False),
        ({"DISPLAY": "localhost:10.0", "SSH_TTY": "/dev/pts/1"}, "linux", False),
    ],
)
def test_where_a_window_would_be_seen(environment: dict[str, str], platform: str, seen: bool) -> None:
    assert has_screen(environment, platform) is seen


@pytest.mark.parametrize(
    ("options", "terminal", "screen", "opens"),
    [
        ([], True, True, True),
        (["--no-open"], True, True, False),
        ([], False, True, False),
        ([], True, False, False),
        (["--host", "0.0.0.0"], True, True, False),
    ],
)
def test_the_browser_is_opened(
    tiny: Path, tmp_path: Path, options: list[str], terminal: bool, screen: bool, opens: bool
) -> None:
    shown: list[str] = []

    arguments = ["ui", str(tiny / "bundle"), "--port", "0", "-o", str(tmp_path), "--engine", "onnxruntime", *options]
    with (
        patch("cascadekit.runtime.ui.http_server.PageServer.serve_forever"),
        patch("cascadekit.cli.ui.show_page", shown.append),
        patch("cascadekit.cli.ui.has_screen", lambda: screen),
        patch("cascadekit.cli.ui.is_terminal", lambda: terminal),
    ):
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [url.startswith("http://127.0.0.1:") for url in shown] == [True] * opens
