"""The output of a command on a terminal and in a pipe: one final line that stays, --quiet, --json and --dry-run."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from cascadekit import convert
from cascadekit.cli import main
from cascadekit.cli.lazy import LazyGroup
from cascadekit.cli.remaining import Remaining
from cascadekit.converters.checkpoints.example_model import EXAMPLE_LORA, EXAMPLE_MODEL
from cascadekit.schemas.passes import StagePass
from cascadekit.schemas.stages import Stage

QUICK = ["--size", "64x64", "--prior-steps", "2", "--decoder-steps", "1"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def on_a_terminal(*arguments: object) -> str:
    """Everything that a command writes to a terminal of 80 columns, both streams in their order."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cascadekit", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        found = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            found += part
        assert process.wait() == 0
    os.close(ours)
    return found.decode()


def lines_left(written: str) -> list[str]:
    """The lines that stay on the screen: carriage returns, erased lines and steps up are obeyed."""
    rows, row = [""], 0
    for token in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token == "\x1b[1A":
            row -= 1
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token == "\r" or token.startswith("\x1b"):
            continue
        else:
            rows[row] += token
    return [line for line in rows if line.strip()]


def test_the_lines_of_a_run_stay_on_the_terminal(tiny: Path, tmp_path: Path) -> None:
    """Bars used to overwrite them, and a random seed was lost with its line."""
    shown = lines_left(on_a_terminal("generate", tiny / "bundle", "x", "--images", 2, *QUICK, "-o", tmp_path))
    seen = re.sub("/ +", "/", " ".join(shown))  # a long path goes on in the next line
    assert len(re.findall(r"wrote +\S+ +\(64x64, seed \d+, \d+\.\d s\)", seen)) == 2, shown
    assert seen.count("loading prior (2.2 MB)") == 1
    assert not re.search("[━╸╺]", seen), shown


def test_a_pipe_gets_plain_lines(tiny: Path, tmp_path: Path) -> None:
    result = call("generate", tiny / "bundle", "x", *QUICK, "-o", tmp_path)
    assert re.fullmatch(r"wrote \S+ \(64x64, seed \d+, \d+\.\d s\)\n", result.stdout)
    assert "loading prior (2.2 MB)\nprior: 2 steps\nloading decoder" in result.stderr
    assert "\x1b" not in result.output


def test_quiet_json_and_both(tiny: Path, tmp_path: Path) -> None:
    assert call("generate", tiny / "bundle", "x", *QUICK, "-o", tmp_path, "--quiet").output == ""
    result = call("generate", tiny / "bundle", "x", *QUICK, "-o", tmp_path, "--quiet", "--json", "--seed", 7)
    (image,) = json.loads(result.output)
    assert (image["seed"], image["width"], image["prompt"]) == (7, 64, "x")
    assert Path(image["path"]).is_file()
    both = call("generate", tiny / "bundle", "x", "--quiet", "--verbose")
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)


def makers(group: LazyGroup = main, *names: str) -> list[tuple[str, ...]]:
    """The words of every command that makes something."""
    made = ("convert", "export", "build", "generate", "verify", "validate", "demo", "doctor", "completion")
    return [(name,) for name in made] + [("lora", name) for name in ("convert", "merge", "apply")]


@pytest.mark.parametrize("words", makers(), ids=" ".join)
def test_every_command_that_makes_something_can_be_quiet_or_speak_json(words: tuple[str, ...]) -> None:
    shown = call(*words, "--help").output
    assert all(option in shown for option in ("--quiet", "--verbose", "--json"))
    assert ("--dry-run" in shown) == (words in [("convert",), ("export",), ("build",), ("lora", "merge")])


def test_details_are_for_verbose_alone(tiny: Path, tmp_path: Path) -> None:
    """Those of an export: the graphs of each stage; of doctor, there are none."""
    for words in ((), ("--verbose",)):
        command = ("export", tiny / "model", "--stage", "vqgan", "-o", tmp_path / "-".join(("bundle", *words)))
        assert ("vqgan: fp32, graphs model, encoder, " in call(*command, *words).stderr) == bool(words)
    assert call("doctor", "--quiet").output == ""


def details(*arguments: object) -> list[str]:
    """The lines on standard error that --verbose adds to a command."""
    call(*arguments, "--force")  # so that all later runs replace an output
    usual, verbose = call(*arguments, "--force"), call(*arguments, "--force", "--verbose")
    assert (usual.exit_code, verbose.exit_code) == (0, 0), verbose.output
    assert usual.stdout.splitlines()[:-1] == verbose.stdout.splitlines()[:-1]  # the last one has the time
    known = usual.stderr.splitlines()
    return [line for line in verbose.stderr.splitlines() if line not in known]


def test_verbose_convert_says_what_became_of_each_file(tiny: Path, tmp_path: Path) -> None:
    source = tiny / "original" / "stage_a.safetensors"
    count = len([name for name in load_file(source) if "num_batches_tracked" not in name])
    (line,) = details("convert", source, "-o", tmp_path / "model", "--to", "diffusers", "--dtype", "bf16")
    counts = re.fullmatch(
        r"vqgan/diffusion_pytorch_model\.safetensors: (\d+) tensors: (.*), from stage_a\.safetensors", line
    )
    assert counts is not None
    assert f"{count} F32 to BF16" in counts[2]
    assert int(counts[1]) == sum(map(int, re.findall(r"(\d+) (?:copied|F32)", counts[2])))


def test_verbose_verify_says_what_each_stage_may_differ_by(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ("verify", tiny / "bundle", "--against", tiny / "model", "--stage", "vqgan", "--report", report)
    (line,) = details(*command, "--no-verdict")
    compared = json.loads(report.read_text())["comparisons"]
    worst = max(entry["relative_l2"] for entry in compared)
    assert line.startswith(f"vqgan: fp32, {len(compared)} outputs compared, relative L2 {worst:.1e} at most, ")
    usual = call("verify", tiny / "original", "--against", tiny / "model", "--stage", "vqgan")
    verbose = call("verify", tiny / "original", "--against", tiny / "model", "--stage", "vqgan", "--verbose")
    tensors = [line for line in verbose.stderr.splitlines() if line not in usual.stderr.splitlines()]
    assert len(tensors) == len(load_file(tiny / "model" / "vqgan" / "diffusion_pytorch_model.safetensors"))
    assert all(re.match(r"vqgan: \S+: equal \(", line) for line in tensors)


def test_timings_by_phase(tiny: Path, tmp_path: Path) -> None:
    command = ("generate", tiny / "bundle", "x", *QUICK, "-o", tmp_path, "--seed", 7)
    assert re.search(r"^first image after \S+ s: open .* first step of the prior .* other steps", details(*command)[-1])
    (image,) = json.loads(call(*command, "--json").stdout)
    assert set(image["timings"]["first_step"]) == {"prior", "decoder"}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x\n")
    batch = call("generate", tiny / "bundle", "--prompts", prompts, *QUICK, "-o", tmp_path / "many", "--json")
    assert set(json.loads(batch.stdout)["timings"]["load"]) == {"text_encoder", "prior", "decoder", "vqgan"}


def test_quiet_completion_is_json_alone() -> None:
    assert json.loads(call("completion", "bash", "--quiet", "--json").output)["shell"] == "bash"


def test_dry_runs_write_nothing_and_know_the_sizes(tiny: Path, tmp_path: Path) -> None:
    """Names and sizes are compared with those of the weights that the real run writes, less their headers."""
    convert(tiny / "original" / "stage_c.safetensors", tmp_path / "blocks.gguf", "gguf", quantize="q8_0")
    for command in (
        ("export", tmp_path / "blocks.gguf", "-o", tmp_path / "wide"),
        ("convert", tiny / "original", "-o", tmp_path / "model", "--to", "diffusers", "--dtype", "bf16"),
        ("export", tiny / "model", "-o", tmp_path / "bundle", "--precision", "fp16"),
        ("export", tiny / "model", "-o", tmp_path / "ort", "--target", "ort", "--weights", "copy"),
    ):
        plan = json.loads(call(*command, "--dry-run", "--json").stdout)
        assert not list(tmp_path.glob(f"{Path(plan['output']).name}*"))
        assert sum(file["bytes"] for file in plan["reads"]) > (1e6 if "blocks" in str(command) else 5e6)
        assert call(*command).exit_code == 0
        for file in plan["writes"]:
            written = (Path(plan["output"]) / file["path"]).stat().st_size
            assert 0 < written - file["bytes"] < 50_000, file
        weights = {path.relative_to(plan["output"]).as_posix() for path in Path(plan["output"]).rglob("*.safetensors")}
        assert weights == {file["path"] for file in plan["writes"] if file["path"].endswith(".safetensors")}
        refused = call(*command, "--dry-run")  # as the real run would be
        assert (refused.exit_code, "exists already" in refused.stderr) == (2, True)


def test_the_time_left_is_that_of_the_whole_run() -> None:
    """Two images, one after the other; a decoder's step has twice the work of the prior's, the vqgan three times."""
    passes = {Stage.PRIOR: StagePass(4, 1.0), Stage.DECODER: StagePass(2, 2.0), Stage.VQGAN: StagePass(1, 3.0)}
    remaining = Remaining([passes, passes])
    start = remaining._last
    assert remaining.seconds(start) is None
    remaining.step(Stage.PRIOR, 1, start + 5)  # 4 seconds of loading
    remaining.step(Stage.PRIOR, 2, start + 6)
    one_image = 4 * 1 + 2 * 2 + 3
    assert remaining.seconds(start + 6) == pytest.approx(2 * one_image - 2 + 4)  # and 4 to load again
    assert remaining.seconds(start + 6.5) == pytest.approx(2 * one_image - 2 + 4 - 0.5)
    now = start + 6
    for stage, done in ((Stage.PRIOR, 3), (Stage.PRIOR, 4), (Stage.DECODER, 1), (Stage.DECODER, 2)):
        now += passes[stage].work
        remaining.step(stage, done, now)
    remaining.decoded(now + 3)
    remaining.decoded(now + 3)
    assert remaining.seconds(now + 3) == pytest.approx(one_image + 4)


def test_verbose_lora_commands_name_each_module(tmp_path: Path) -> None:
    """Six attentions with four weights each; every weight has two factors and an alpha in kohya's spelling."""
    stage_c = EXAMPLE_MODEL / "stage_c.safetensors"
    merged = details("lora", "merge", stage_c, EXAMPLE_LORA, "-o", tmp_path / "merged.safetensors")
    assert len(merged) == 6 * 4
    assert all(re.search(r"attention\.to_\S+: F16, changed by 0\.\d+ at most$", line) for line in merged)
    converted = details("lora", "convert", EXAMPLE_LORA, "--to", "comfyui", "-o", tmp_path / "comfyui.safetensors")
    assert len(converted) == 6 * 4 * 3
    assert sum(line.endswith(": F32 one value, calculated") for line in converted) == 6 * 4
