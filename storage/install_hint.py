"""Words the command that installs an extra from the place that cascadekit itself came from: a checkout, git, a wheel,
or a package index."""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "cascadekit"
ROOT = Path(__file__).resolve().parents[1]  # the checkout, or the package's folder in site-packages
OF_EXTRA = re.compile(r"""^(?P<package>[^;]+?)\s*;\s*extra == ["'](?P<extra>[^"']+)["']$""")


def install_hint(extra: str, root: Path = ROOT) -> str:
    """The command that installs an extra of pyproject.toml, such as ``pip install -e '.[cpu]'`` in a checkout.

    `root` is the package's folder."""
    if (root / "pyproject.toml").is_file():  # a checkout, installed with -e or run by its path
        return f"pip install -e {shlex.quote(f'{_below_here(root)}[{extra}]')}"
    origin = _origin()
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return _quoted(f"{NAME}[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    if url.startswith("file:"):
        path = _path(url)
        return _quoted(f"{_below_here(path)}[{extra}]") if path.exists() else _packages(extra)
    return _quoted(f"{NAME}[{extra}] @ {url}" if url else f"{NAME}[{extra}]")


def _path(url: str) -> Path:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return Path(url2pathname(urlsplit(url).path))


def _quoted(requirement: str) -> str:
    return f"pip install {shlex.quote(requirement)}"


def _below_here(path: Path) -> str:
    """The path as pip takes it: relative for the current folder and what is in it."""
    with suppress(ValueError, OSError):
        inside = path.relative_to(Path.cwd())
        return f"./{inside}" if inside.parts else "."
    return str(path)


def _origin() -> dict[str, Any]:
    """The place that pip took cascadekit from, as pip recorded it (PEP 610); empty for a package index."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _packages(extra: str) -> str:
    """The command that installs the packages of an extra by their names: the file that cascadekit came from is gone."""
    from importlib.metadata import requires

    matches = filter(None, map(OF_EXTRA.match, requires(NAME) or ()))
    found = [shlex.quote(match["package"]) for match in matches if match["extra"] == extra]
    return f"pip install {' '.join(found)}" if found else _quoted(f"{NAME}[{extra}]")
