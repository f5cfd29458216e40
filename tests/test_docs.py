"""The pages name only what exists: their command lines, options, Python calls, files and links."""

import ast
import doctest
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import cascadekit
from cascadekit.cli import main
from cascadekit.converters.checkpoints.example_model import copy_example_model
from cascadekit.runtime.images.png import save_png
from cascadekit.schemas import errors, messages
from helpers.npm import packed

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = "schemas|storage|runtime|converters|parity|cli|bench|tests|docs|examples"


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group by its words after `cascadekit`."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


@cache
def known_commands() -> dict[tuple[str, ...], click.Command]:
    return dict(commands(main))


def options_of(command: click.Command) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}


def command_lines(text: str) -> list[str]:
    """The lines in fences and in backticks that call `cascadekit`, without prompts and comments."""
    fenced = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in joined(block)]
    inline = [" ".join(each.split()) for each in re.findall(r"`(cascadekit [^`]+)`", text)]
    return [line for line in (*fenced, *inline) if line.startswith("cascadekit ")]


def joined(block: str) -> list[str]:
    return [re.split(r"\s{2,}(?=\S)|\s+#", line)[0] for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_line_has_a_command_and_its_options(page: str) -> None:
    for line in command_lines(TEXTS[page]):
        words = shlex.split(line)[1:]
        if words[0].startswith("-"):
            assert words[0] in options_of(main), line
            words = words[1:]
        if words[0].isupper():  # `cascadekit COMMAND --help`
            continue
        known = known_commands()
        name = tuple(words[:2]) if tuple(words[:2]) in known else tuple(words[:1])
        assert name in known, line
        options = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert options <= options_of(known[name]), line


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_in_the_text_exists(page: str) -> None:
    known = set().union(*map(options_of, (main, *known_commands().values())))
    prose = re.sub(r"^```\w*\n.*?^```", "", TEXTS[page], flags=re.M | re.S)
    named = {
        option
        for code in re.findall(r"`(?!pip )([^`]+)`", prose)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert named <= known, named - known


@pytest.mark.parametrize("page", TEXTS)
def test_python_uses_public_names_and_their_parameters(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "cascadekit":
                assert {alias.name for alias in node.names} <= set(cascadekit.__all__)
            elif isinstance(node, ast.Call):
                require_parameters(node)


def require_parameters(call: ast.Call) -> None:
    """The keywords of a call of a public function, or of a method of `cascade`, are parameters of it."""
    if isinstance(call.func, ast.Name) and call.func.id in cascadekit.__all__:
        called = getattr(cascadekit, call.func.id)
    elif isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("cascade", "Cascade"):
        called = getattr(cascadekit.Cascade, call.func.attr)
    else:
        return
    parameters = inspect.signature(called).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        assert {each.arg for each in call.keywords} <= {each.name for each in parameters}, ast.unparse(call)


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_named_exists(page: str) -> None:
    paths = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", TEXTS[page]))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", TEXTS)
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", TEXTS[page], re.M)) <= targets


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_between_pages_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_reference_lists_every_public_name() -> None:
    listed = re.findall(r"^::: cascadekit\.(\w+)$", TEXTS["docs/reference/python.md"], re.M)
    named = [name for name in cascadekit.__all__ if not hasattr(errors, name)]  # that module is listed as a whole
    assert sorted(listed) == sorted(named)


SMALL = (("1024", "64"), ("steps=20", "steps=2"), ("steps=10", "steps=1"), ('sampler="gdf"', "prior_steps=2"))


def test_the_python_of_the_pages_runs(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny cascade, at small sizes; it has no previewer, so that line is left out."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text_encoder").rename(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    pages = sorted(TEXTS, key=lambda page: page != "docs/python.md")  # which makes the model and the bundle
    for page in pages:
        for block in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S):
            for large, small in (*SMALL, ("step.preview()", "")):
                block = block.replace(large, small)
            exec(compile(block, page, "exec"), {})
    assert (tmp_path / "bundle" / "cascade.json").is_file()


# Command lines that do not run in the test below, by what they contain, and where they run.
RUN_ELSEWHERE = {
    "^bench": "tests/bench, with a few values; here it would measure for minutes",
    "^demo": "tests/judge",
    "^ui": "tests/runtime/ui; it serves until it is stopped",
    "^serve": "tests/runtime/test_serve.py; it serves until it is stopped, as docs/serve.md's call of its client needs",
    "^doctor --gpu": "tests/cli",
    "--recorded|^generate rtx": "needs the GPU that the plans are for",
    "--device cuda": "needs a GPU",
    "--ray": "tests/runtime/cluster; it needs ray and a cluster",
    "--engine aotinductor": "tests/runtime; it needs a package, whose build takes minutes",
    "^completion": "tests/test_tour.py; it writes into the home folder",
}
PLANNED = ("convert", "export", "export-triton", "build", "lora merge")  # --dry-run; tests/test_tour.py writes files
QUICK = "--size 64x64 --prior-steps 1 --decoder-steps 1 --prior-timesteps 1,0 --decoder-timesteps 1,0 --force".split()


def lay_out(root: Path) -> None:
    """Put into `root` what the pages name: the example model's files under the names of the official ones."""
    original = root / "demo" / "original"
    copy_example_model(original, root / "demo" / "lora")
    cascadekit.export(original, root / "demo" / "bundle", controlnet=True)
    cascadekit.convert([original], root / "model", "diffusers")
    cascadekit.export(root / "model", root / "bundle")
    cascadekit.convert([root / "model"], root / "comfyui", "comfyui")
    for name in ("small", "rtx"):
        shutil.copytree(root / "demo" / "bundle", root / name)
    shutil.copytree(original, root, dirs_exist_ok=True)
    (root / "text_encoder").rename(root / "CLIP-ViT-bigG-14")
    shutil.copytree(original, root / "hub")
    for stage in ("b", "c"):
        shutil.copy(root / f"stage_{stage}.safetensors", root / f"stage_{stage}_bf16.safetensors")
        (root / "hub" / f"stage_{stage}.safetensors").rename(root / "hub" / f"stage_{stage}_lite_bf16.safetensors")
    subprocess.run(
        [sys.executable, ROOT / "examples" / "make_lora.py", "stage_c.safetensors", "style.safetensors"],
        cwd=root,
        check=True,
    )
    with cascadekit.Cascade.open(root / "bundle") as cascade:
        made = cascade.generate("a fox", seed=0, width=64, height=64, prior_steps=1, decoder_steps=1)
    for name in ("photo", "mask", "style", "image", "shiba", "apple", "out/0003", "demo/image"):
        save_png(root / f"{name}.png", made.images[0], made.settings[0])
    (root / "prompts.csv").write_text("prompt\na fox\n")
    packed(root / "onnxruntime-web-1.30.0.tgz")


def runnable(page: str, seen: set[str], made: list[set[str]]) -> Iterator[list[str]]:
    """The words of the page's command lines that run here and were not `seen`. Names in capitals stand for others."""
    for line in command_lines(TEXTS[page]):
        words = shlex.split(line.replace("hf://stabilityai/stable-cascade", "hub"))[1:]
        stands_for = (len(words) == 1 and words[0] != "doctor") or any(re.fullmatch(r"[A-Z]+", word) for word in words)
        if line not in seen and not stands_for and not re.search("|".join(RUN_ELSEWHERE), " ".join(words)):
            seen.add(line)
            if not is_repeated(words, made):
                yield words


def is_repeated(words: list[str], made: list[set[str]]) -> bool:
    """Whether an image was generated with the same options before, as `made` tells."""
    if words[0] != "generate":
        return False
    options = {word for word in words if word.startswith("-")}
    repeated = any(options <= each for each in made)
    made.append(options)
    return repeated


def made_quick(words: list[str]) -> list[str]:
    """The command at a small size; what would write much is planned."""
    name = " ".join(words[: 2 if words[0] == "lora" else 1])
    if name == "generate":
        return [*words, *QUICK] if "--like" not in words else [*words, "--force"]
    if name == "verify" and "comfyui" not in words:
        small = {"tensorrt-rtx": "onnxruntime", "prior": "vqgan"}
        words = [small.get(word, word) for word in words] + ([] if "prior" in words else ["--stage", "vqgan"])
    if name == "verify":
        return [*words, "--force"]
    if name in PLANNED:
        return [*words, "--dry-run", "--force"]
    return [*words, "--force"] if name == "lora convert" else words


def test_every_command_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page, in its order. docs/tour.md runs in tests/test_tour.py, at full size."""
    pytest.importorskip("onnx")
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    seen: set[str] = set()
    made: list[set[str]] = []
    for page in TEXTS:
        for words in runnable(page, seen, made) if page != "docs/tour.md" else ():
            command = made_quick(words)
            ended = CliRunner().invoke(main, command)
            assert ended.exit_code == 0, f"{page}: cascadekit {shlex.join(command)}\n{ended.output}"
    assert len(seen) > 30


def test_the_readme_fits_three_screens() -> None:
    assert TEXTS["README.md"].count("\n") <= 120


@pytest.mark.parametrize("page", TEXTS)
def test_sentences_have_at_most_25_words(page: str) -> None:
    assert [text for text in sentences(TEXTS[page]) if len(text.split()) > 25] == []


def sentences(text: str) -> Iterator[str]:
    """The sentences of paragraphs and lists; a piece of code counts as one word."""
    text = re.sub(r"^```\w*\n.*?^```|^[|#].*?$", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?:;])[*\")]*\s+", " ".join(paragraph.split()))


def test_every_page_is_in_the_navigation_and_every_picture_on_a_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.M))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    shown = {name for text in TEXTS.values() for name in re.findall(r"images/([\w.-]+)\)", text)}
    assert shown == {path.name for path in (ROOT / "docs" / "images").iterdir()}


def test_doctests_without_files_pass() -> None:
    assert doctest.testmod(messages).attempted > 0
    assert doctest.testmod(messages).failed == 0


def test_help_is_readable() -> None:
    """Types as they are written, and no addresses or long defaults."""
    for name in cascadekit.__all__:
        value = getattr(cascadekit, name)
        if inspect.isfunction(value):
            text = str(inspect.signature(value))
            assert not re.search(r"collections\.abc|<function|pathlib\.|cascadekit\.\w+\.", text), f"{name}{text}"
    assert "options: 'ExportOptions' = ExportOptions()" in str(inspect.signature(cascadekit.export))
    assert set(cascadekit.__all__) < set(dir(cascadekit))
