"""The command `completion`: prints or installs the script that completes commands and options in a shell."""

import os
from pathlib import Path

import click

from ..schemas.errors import UsageError
from .console import finish, note, say_json
from .help import HelpfulCommand
from .options import AS_JSON, volume_options

PROGRAM, VARIABLE = "cascadekit", "_CASCADEKIT_COMPLETE"
# The file in which each shell looks for the script by itself, below the home folder or the variable's folder.
PLACES = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/cascadekit"),
    "zsh": ("ZDOTDIR", "", ".zfunc/_cascadekit"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/cascadekit.fish"),
}


@click.command(cls=HelpfulCommand)
@click.argument("shell", type=click.Choice([*PLACES]))
@click.option("--install", is_flag=True, help="Write the script to where the shell finds it.")
@AS_JSON
@volume_options
def completion(shell: str, install: bool, as_json: bool) -> None:
    """Complete commands and options with Tab.

    Without --install the script is printed. A new shell knows the completion.

    Example: cascadekit completion bash --install
    For this shell alone: eval "$(cascadekit completion bash)"
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    script = kind(root, {}, PROGRAM, VARIABLE).source()
    if not install:
        if as_json:
            say_json({"shell": shell, "script": script})
        else:
            click.echo(script)
        return
    path = _place(shell)
    _write(path, script)
    finish(f"wrote {path}; a new {shell} completes {PROGRAM}", {"shell": shell, "output": str(path)}, as_json=as_json)
    if shell == "zsh":
        note(f"zsh reads it if ~/.zshrc has, before compinit: fpath+={path.parent}")


def _place(shell: str) -> Path:
    variable, default, name = PLACES[shell]
    given = os.environ.get(variable)
    return (Path(given) if given else Path.home() / default) / name


def _write(path: Path, script: str) -> None:
    """Write the script. Raises UsageError when a file of another origin has its name."""
    from ..storage.atomic_file import whole_file

    if path.exists() and VARIABLE not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{path}: exists and is no script of cascadekit; move it away, or print the script instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(script.encode())
