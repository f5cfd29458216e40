"""`generate --prompts` as people meet it: fifty prompts and ten faults, and what is generated, refused and told.

The outputs are read with Pillow and json alone.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from cascadekit import export
from cascadekit.cli import main, progress
from cascadekit.cli.generate_prompt_file import _Shown
from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.runtime.batch.generate_batch import BatchSettings
from cascadekit.runtime.batch.image_jobs import BatchPlan, ImageJob
from cascadekit.schemas.stages import ImageEncoderConfig, Stage
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.storage.bucket import BucketPath

QUICK = "--size 64x64 --prior-steps 1 --decoder-steps 1 --engine onnxruntime --threads 1 --memory resident".split()
PROMPTS = 50
SEED = 1000
TOGETHER = 4
BIGGEST_FILE = 9000  # bytes; an image takes more

# Counts how far images came, and does `then` when `when` comes true: events come before what they tell of, so one that
# is "begun" is not there yet, one that is "written" not in its place, and one that is "placed" not in the log.
CHILD = """
import errno, os, resource, signal, sys
from collections import Counter
from cascadekit.cli import main

seen = Counter()
os.fsync = lambda descriptor: None
sys.dont_write_bytecode = True  # its files would be counted

kinds = {{"open": "begun", "os.chmod": "written", "os.remove": "placed"}}

def count(event, arguments):
    if event in kinds and ".png." in str(arguments[0]):
        seen[kinds[event]] += 1
        if {when}:
            {then}

sys.stdout = open({stdout!r}, "w")
sys.stderr = open({stdout!r} + ".err", "w")
sys.addaudithook(count)
main({arguments!r})
"""


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade with an image encoder."""
    model, bundle = (tmp_path_factory.mktemp("batch") / name for name in ("model", "bundle"))
    shutil.copytree(tiny / "model", model)
    config = ImageEncoderConfig(16, 32, 2, 2, 768, image_size=20, patch_size=6)
    write_folder_files(model, {Stage.IMAGE_ENCODER: config}, index=False)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) * np.float32(0.3) for n, s in expected_tensors(config).items()}
    save_file(tensors, model / "image_encoder" / "model.safetensors")
    export(model, bundle)
    return bundle


def command(bundle: Path, prompts: Path, *more: object) -> list[str]:
    return ["generate", str(bundle), "--prompts", str(prompts), *QUICK, *map(str, more)]


def call(bundle: Path, prompts: Path, *more: object) -> Result:
    return CliRunner().invoke(main, command(bundle, prompts, *more))


def drawn(bundle: Path, prompts: Path, *more: object) -> Result:
    result = call(bundle, prompts, *more)
    assert result.exit_code == 0, result.output
    return result


def events(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that are JSON."""
    found = []
    for line in log.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            assert line.startswith('{"time": "')  # cut short
    return found


def metadata(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        picture.load()
        return json.loads(picture.info["cascadekit"])


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """The identities of files, which tell an image from one that was generated again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


class Work:
    """Fifty prompts, five of which have something wrong; each time a run ends what is there is looked through."""

    def __init__(self, root: Path, bundle: Path, server: ForkServerContext) -> None:
        self.root, self.bundle, self.server = root, bundle, server
        self.file, self.output = root / "prompts.jsonl", root / "out"
        self.log = self.output / "log.jsonl"
        self.dice = random.Random(5)
        bad = self.dice.sample(range(PROMPTS), 5)
        self.wrong = dict(
            zip(bad[:3], ['{"prompt": "cut', '{"promt": "x"}', '{"prompt": "x", "width": 65}'], strict=True)
        )
        self.unreadable = dict(zip(bad[3:], ["text.png", "cut.png"], strict=True))
        self.before: dict[str, tuple[int, int]] = {}
        self.write(self.wrong)
        (root / "text.png").write_text("no picture")
        picture = Image.effect_noise((64, 64), 90).convert("RGB")
        picture.save(root / "good.png")
        (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:3000])

    def line(self, number: int) -> dict[str, Any]:
        picture = self.unreadable.get(number, "good.png" if number % 20 == 7 else None)
        more = {"image_prompts": [picture]} if picture else {}
        return {"prompt": f"picture {number}", "prior_guidance": 3 if number % 30 < 10 else 1, **more}

    def write(self, wrong: dict[int, str]) -> None:
        lines = [wrong.get(number) or json.dumps(self.line(number)) for number in range(PROMPTS)]
        self.file.write_text("\n".join(lines) + "\n")

    def arguments(self) -> list[str]:
        return command(self.bundle, self.file, "-o", self.output, "--keep-going", "--batch", TOGETHER)

    def start(self, when: str = "False", then: str = "pass") -> ForkServerProcess:
        stdout = str(self.root / "stdout")
        code = CHILD.format(arguments=self.arguments(), when=when, then=then, stdout=stdout)
        process = self.server.Process(target=exec, args=(code, {"__name__": "child"}))
        process.start()
        return process

    def ends(self, code: int, when: str = "False", then: str = "pass") -> str:
        """Run, with something done to it, until it ends; what it said on standard error."""
        process = self.start(when, then)
        process.join()
        said = (self.root / "stdout.err").read_text()
        assert process.exitcode == code, said
        self.check()
        return said

    def check(self) -> None:
        """Every image is whole and the right one, and those that were there are the same files."""
        now = identities(self.output)
        assert self.before.items() <= now.items()
        self.before = now
        for name in now:
            number = int(name.removesuffix(".png"))
            said = metadata(self.output / name)
            assert (said["prompt"], said["prior_guidance"]) == (
                f"picture {number}",
                self.line(number)["prior_guidance"],
            )
            assert (said["width"], said["height"], said["prior_steps"]) == (64, 64, 1)


def test_fifty_prompts_with_ten_faults(bundle: Path, tmp_path: Path, server: ForkServerContext) -> None:
    """Faults 1 to 5 are in the file. Nothing is lost by the others, and nothing drawn twice."""
    work = Work(tmp_path, bundle, server)

    # 6: interrupted; what was drawn together is saved to the end.
    at = work.dice.randrange(5, 10)
    said = work.ends(130, f"seen['placed'] == {at}", "os.kill(os.getpid(), signal.SIGINT)")
    assert "interrupted" in said
    assert at <= len(work.before) < at + TOGETHER
    # 7: terminated.
    work.ends(143, "seen['placed'] == 5", "os.kill(os.getpid(), signal.SIGTERM)")
    # 8: killed while it writes an image; what it had begun is left, and cleared away by the next run.
    at = work.dice.randrange(3, 8)
    work.ends(-signal.SIGKILL, f"seen['written'] == {at}", "os.kill(os.getpid(), signal.SIGKILL)")
    assert len([path for path in work.output.iterdir() if path.name.startswith(".")]) == 1
    # 9: killed between an image and what the log says of it, whose last line is cut besides.
    work.ends(-signal.SIGKILL, "seen['placed'] == 4", "os.kill(os.getpid(), signal.SIGKILL)")
    with work.log.open("a") as log:
        log.write('{"time": "2026-01-01T0')
    # 10: no room for images that are larger than what is left.
    limit = (
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({BIGGEST_FILE}, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))"
    )
    said = work.ends(1, "seen['begun'] == 3", limit)
    assert said.count("stopped: ") == 1
    assert "the image cannot be written: File too large" in said
    # And one image is damaged.
    damaged = work.output / sorted(work.before)[10]
    damaged.write_bytes(damaged.read_bytes()[:-500])
    del work.before[damaged.name]

    said = work.ends(1)  # the faults of the file are left
    assert len(work.before) == PROMPTS - 5
    assert {number for number in range(PROMPTS) if f"{number:04d}.png" not in work.before} == {
        *work.wrong,
        *work.unreadable,
    }
    for number, text in zip(work.wrong, ("not JSON", "promt: unknown", "width 65"), strict=True):
        assert f"left out: {work.file}:{number + 1}: " in said
        assert text in said
    failed = {event["number"]: event["error"] for event in last_run(work.log) if "number" in event and "error" in event}
    assert failed.keys() == work.unreadable.keys()
    assert all(str(tmp_path / name) in failed[number] for number, name in work.unreadable.items())

    times = Counter(event["number"] for event in events(work.log) if event["event"] == "done")
    assert times.pop(int(damaged.stem)) == 2
    assert set(times.values()) == {1}
    assert len(times) == PROMPTS - 5 - 2  # the damaged one, and that of the kill before the log
    assert {path.suffix for path in work.output.iterdir()} == {".png", ".jsonl"}

    work.write({})  # all mended: what is drawn has the place and seed it would have had
    shutil.copy(tmp_path / "good.png", tmp_path / "text.png")
    shutil.copy(tmp_path / "good.png", tmp_path / "cut.png")
    work.ends(0)
    assert sorted(work.before) == [f"{number:04d}.png" for number in range(PROMPTS)]
    first = metadata(work.output / "0000.png")["seed"]
    assert [metadata(work.output / name)["seed"] for name in sorted(work.before)] == list(range(first, first + PROMPTS))
    same_as_without_faults(work, first)


def last_run(log: Path) -> list[dict[str, Any]]:
    found = events(log)
    return found[max(place for place, event in enumerate(found) if event["event"] == "started") :]


def same_as_without_faults(work: Work, seed: int) -> None:
    """The images are those of a run that nothing happens to, but for who was drawn together with whom."""
    drawn(work.bundle, work.file, "-o", work.root / "again", "--seed", seed, "--batch", TOGETHER)
    for path in sorted(work.output.glob("*.png")):
        one, other = (
            np.asarray(Image.open(folder / path.name), np.int16) for folder in (work.output, work.root / "again")
        )
        assert abs(one - other).max() <= 1, path.name
        assert metadata(path)["key"] == metadata(work.root / "again" / path.name)["key"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_from_outside(
    tiny: Path, tmp_path: Path, server: ForkServerContext, number: signal.Signals, code: int
) -> None:
    """As a service manager or Ctrl-C ends it, somewhere in the middle."""
    (tmp_path / "p.txt").write_text("\n".join(f"picture {place}" for place in range(200)))
    arguments = command(tiny / "bundle", tmp_path / "p.txt", "--batch", 4, "-o", tmp_path / "out")
    program = f"from cascadekit.cli import main; main({arguments!r})"
    process = server.Process(target=exec, args=(program, {"__name__": "child"}))
    process.start()
    while not (tmp_path / "out" / "0003.png").exists() and process.is_alive():
        time.sleep(0.002)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    images = sorted((tmp_path / "out").glob("*"))
    assert [path.name for path in images] == [*(f"{place:04d}.png" for place in range(len(images) - 1)), "log.jsonl"]
    assert [metadata(path)["prompt"] for path in images[:-1]] == [f"picture {n}" for n in range(len(images) - 1)]
    assert events(tmp_path / "out/log.jsonl")[-1]["event"] == "stopped"


def mounted(folder: Path, size: str) -> bool:
    folder.mkdir()
    found = shutil.which("mount")
    tell = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    return found is not None and subprocess.run(tell, capture_output=True).returncode == 0


def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    """One clear line, exit code 1, nothing half-written; with more room the same command goes on."""
    (tmp_path / "p.txt").write_text("\n".join(f"picture {place}" for place in range(12)))
    output = tmp_path / "disk"
    if not mounted(output, "64k"):
        pytest.skip("no right to mount a small disk; the fifty prompts meet a limit of file sizes")
    try:
        result = call(tiny / "bundle", tmp_path / "p.txt", "-o", output, "--seed", 1)
        assert result.exit_code == 1
        assert result.stderr.count("No space left on device") == 1
        assert "run the same command again to continue" in result.stderr
        first = identities(output)
        assert 0 < len(first) < 12
        assert {path.name for path in output.iterdir()} == {*first, "log.jsonl"}
        subprocess.run(["mount", "-o", "remount,size=4m", str(output)], check=True)
        drawn(tiny / "bundle", tmp_path / "p.txt", "-o", output, "--seed", 1)
        assert first.items() <= identities(output).items()
        assert [metadata(output / f"{n:04d}.png")["prompt"] for n in range(12)] == [f"picture {n}" for n in range(12)]
    finally:
        subprocess.run(["umount", str(output)], check=True)


def test_bad_lines_are_refused_together_before_anything_is_drawn(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,width,images\na,64,0\n"b\nb",72,1\nc,65,\nd,64,1,2\n')
    result = call(tiny / "bundle", tmp_path / "p.csv", "-o", tmp_path / "out")
    assert result.exit_code == 2
    for text in ("p.csv:2: images: '0'", "p.csv:5: width 65: expected a multiple", "p.csv:6: 4 cells, where"):
        assert text in result.stderr
    assert "p.csv:3" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    result = call(tiny / "bundle", tmp_path / "p.csv", "-o", tmp_path / "out", "--keep-going")
    assert result.exit_code == 1
    assert Image.open(tmp_path / "out" / "0001.png").size == (72, 64)
    assert metadata(tmp_path / "out" / "0001.png")["prompt"] == "b\nb"
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_options_are_what_lines_leave_unsaid(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"negative": "", "seed": 7}\n{"prompt": "b", "width": 72, "images": 2, "name": "../B"}\n"c"\n'
    )
    more = ("-o", tmp_path / "out", "--negative", "n", "--seed", 40, "a", "--name", "{width}/{name}")
    drawn(tiny / "bundle", tmp_path / "p.jsonl", *more)
    found = {
        str(path.relative_to(tmp_path / "out")): [
            metadata(path)[name] for name in ("prompt", "negative", "seed", "index")
        ]
        for path in (tmp_path / "out").rglob("*.png")
    }
    assert found == {
        "64/0000.png": ["a", "", 7, 0],
        "72/B-0.png": ["b", "n", 41, 0],
        "72/B-1.png": ["b", "n", 41, 1],
        "64/0003.png": ["c", "n", 42, 0],
    }


def test_the_same_line_twice_is_drawn_once(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 1}\n' * 3)
    result = drawn(tiny / "bundle", tmp_path / "p.jsonl", "-o", tmp_path / "out")
    assert "1 generated, 2 copied" in result.stdout
    images = [(tmp_path / "out" / f"000{n}.png") for n in range(3)]
    assert images[0].read_bytes() == images[1].read_bytes() == images[2].read_bytes()
    images[0].unlink()
    images[2].unlink()
    assert "2 copied, 1 skipped" in drawn(tiny / "bundle", tmp_path / "p.jsonl", "-o", tmp_path / "out").stdout
    assert Image.open(images[0]).tobytes() == Image.open(images[1]).tobytes()
    assert [event.get("of") for event in events(tmp_path / "out/log.jsonl") if event["event"] == "copied"] == [
        0,
        0,
        1,
        1,
    ]


def test_what_is_in_the_way_is_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    drawn(tiny / "bundle", tmp_path / "p.txt", "-o", tmp_path / "out", "--seed", 1)
    (tmp_path / "out" / "0001.png").write_text("my notes")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for more in ((), ("--prior-guidance", 2)):  # another file, then two
        result = call(tiny / "bundle", tmp_path / "p.txt", "-o", tmp_path / "out", "--seed", 1, *more)
        assert result.exit_code == 2
        assert "in the way" in result.stderr
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    drawn(tiny / "bundle", tmp_path / "p.txt", "-o", tmp_path / "out", "--seed", 1, "--force")
    assert metadata(tmp_path / "out" / "0001.png")["prompt"] == "b"


def test_an_image_of_a_batch_is_drawn_again_by_itself(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    drawn(tiny / "bundle", tmp_path / "p.txt", "-o", tmp_path / "out", "--images", 2)
    image = tmp_path / "out" / "0001.png"
    arguments = ["generate", tiny / "bundle", "--like", image, *QUICK[-6:], "-o", tmp_path / "x.png"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    one, other = (np.asarray(Image.open(path), np.int16) for path in (image, tmp_path / "x.png"))
    assert abs(one - other).max() <= 1


def test_prompts_from_standard_input(tiny: Path, tmp_path: Path) -> None:
    arguments = command(tiny / "bundle", Path("-"), "-o", tmp_path / "out")
    result = CliRunner().invoke(main, arguments, input="# animals\nein Bär\n\n猫\n".encode())
    assert result.exit_code == 0, result.output
    assert [metadata(tmp_path / "out" / f"000{n}.png")["prompt"] for n in range(2)] == ["ein Bär", "猫"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "p.txt", "-o", "x.png"], "expected a folder"),
        (["--prompts", "none.txt"], "No such file"),
        (["--prompts", "p.md"], "expected a name ending in .txt, .jsonl, .csv"),
        (["--prompts", "p.txt", "--name", "{prompt.__class__}"], "expected one of {number}"),
        (["--prompts", "p.txt", "--name", "../{number}"], "expected a file name, perhaps with folders"),
        (["--prompts", "p.txt", "--name", "x"], "p.txt:2: x.png: also the name for line 1"),
        (["--prompts", "p.txt", "--log", "p.txt/log"], "the log cannot be written"),
        (["--prompts", "p.txt", "a", "b"], "one PROMPT"),
        (["--prompts", "p.txt", "--preview-every", "1"], "no previewer"),
        (["a", "--preview-every", "1"], "no previewer"),
        (["a", "--keep-going"], "are for --prompts"),
    ],
)
def test_calls_that_cannot_be(
    tiny: Path, tmp_path: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "p.md").write_text("a\n")
    result = CliRunner().invoke(main, ["generate", str(tiny / "bundle"), *QUICK, *more])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.rglob("*.png"))


def test_two_batches_into_one_folder(tiny: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "p.txt").write_text("a\n")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    result = call(tiny / "bundle", tmp_path / "p.txt", "-o", tmp_path)
    os.close(descriptor)
    assert result.exit_code == 2
    assert "another batch writes into it" in result.stderr


def test_a_batch_into_a_bucket_whose_lines_are_all_wrong_needs_no_memory() -> None:
    """The memory of no image was asked for, which ended in a ValueError."""
    noted: list[Sequence[ImageJob]] = []
    with ExitStack() as stack:
        shown = _Shown(BatchSettings(Path("prompts.txt"), BucketPath("s3:/bucket/x")), stack, as_json=True)
        shown.notes = noted.append
        shown.planned(BatchPlan((), ("line 1: prior_steps -1",)))
    assert noted == []


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One over all images, beside the step of the stage at work."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "err", SimpleNamespace(is_terminal=True, console=console))
    with progress.batch_progress(30) as bars:
        for images in range(3):
            for step in range(5):
                bars.step(Stage.PRIOR, SimpleNamespace(index=step, steps=5))
            bars.image(images + 1)
    lines = shown.getvalue().splitlines()
    assert any("images" in line and "3/30" in line and "0:00:00" in line for line in lines)
    assert any("prior 5/5" in line for line in lines)
