"""Plans are made once: found again by what they were made of, and made anew when they are not what they were."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.lora.merge_bundle import apply_loras, undo_loras
from cascadekit.converters.tensorrt import BuildOptions, Built, build, builder
from cascadekit.converters.tensorrt.builder import require_machine
from cascadekit.converters.tensorrt.plans_to_build import plans_to_build
from cascadekit.converters.tensorrt.worker_process import BuildOutcome
from cascadekit.converters.tensorrt.worker_request import WorkerRequest
from cascadekit.schemas.plan_entries import PlanEntry
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

SMALL = Bounds(*[parse_image_size("256x256")] * 3)
VQGAN = BuildOptions(targets=("sm89",), stages=(Stage.VQGAN,), profiles=(SMALL,))
TEXT = BuildOptions(targets=("sm89",), stages=(Stage.TEXT_ENCODER,), profiles=(SMALL,))


def changed(wishes: BuildOptions, **fields: Any) -> BuildOptions:
    return BuildOptions(**vars(wishes) | fields)


def one(bundle: Path, wishes: BuildOptions, **callbacks: Any) -> Built:
    (built,) = build(bundle, wishes, **callbacks)
    assert open_bundle(bundle).entry(built.stage).plans[-1] == built.plan
    content = (bundle / built.plan.path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == built.plan.sha256
    return built


@pytest.fixture(scope="module")
def built_once(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a plan of the VQGAN; read only."""
    bundle = shutil.copytree(exported("bf16"), tmp_path_factory.mktemp("built") / "bundle")
    assert one(bundle, VQGAN).how == "built"
    return bundle


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """A copy of that bundle that a test may change."""
    return shutil.copytree(built_once, tmp_path / "built")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and no process may be started any more."""

    def started(*arguments: Any) -> None:
        pytest.fail("a build was started")

    return lambda: monkeypatch.setattr(builder, "run_build", started)


@pytest.fixture
def built_from_memory(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build writes the plan of `built` again, without TensorRT."""
    (plan,) = open_bundle(built).entry(Stage.VQGAN).plans
    content = (built / plan.path).read_bytes()

    def write(request: WorkerRequest, *arguments: Any) -> BuildOutcome:
        Path(request.output).write_bytes(content)
        return BuildOutcome(
            bytes=plan.bytes,
            sha256=plan.sha256,
            version=plan.backend_version,
            seconds=1,
            cpu_seconds=1,
            peak_rss=plan.peak_rss,
            peak_own=0,
            layers=1,
        )

    monkeypatch.setattr(builder, "run_build", write)


def test_a_second_build_is_none(built: Path, no_build: Callable[[], None]) -> None:
    (plan,) = open_bundle(built).entry(Stage.VQGAN).plans
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    no_build()
    second = one(built, VQGAN)
    assert second.how == "kept"
    assert second.plan == plan
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}.items() <= before.items()


FURTHER = [pytest.param(stage, marks=pytest.mark.slow) for stage in (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER)]


@pytest.mark.parametrize("stage", [Stage.VQGAN, *FURTHER], ids=str)
def test_a_forced_build_makes_the_plan_again(bundle: Path, stage: Stage) -> None:
    wishes = changed(VQGAN, stages=(stage,))
    first = build(bundle, wishes)
    inodes = [(bundle / built.plan.path).stat().st_ino for built in first]
    again = build(bundle, changed(wishes, force=True))
    assert [built.how for built in again] == ["built"] * len(first)
    assert all((bundle / built.plan.path).stat().st_ino != inode for built, inode in zip(first, inodes, strict=True))
    assert [built.plan.path for built in again] == [built.plan.path for built in first]
    for built in again:
        assert hashlib.sha256((bundle / built.plan.path).read_bytes()).hexdigest() == built.plan.sha256


@pytest.mark.usefixtures("built_from_memory")
@pytest.mark.parametrize("fault", ["one bit", "cut short", "another plan", "no note", "a note that is none"])
def test_damaged_plans_are_built_again(built: Path, fault: str) -> None:
    bundle = built
    (plan,) = open_bundle(bundle).entry(Stage.VQGAN).plans
    path = bundle / plan.path
    content = path.read_bytes()
    foreign = content[:32] + bytes([16]) + content[33:]  # for sm120
    path.unlink()
    faults = {"one bit": content[:-1] + b"x", "cut short": content[:-9], "another plan": foreign}
    path.write_bytes(faults.get(fault, content))
    if fault.endswith("note"):
        path.with_suffix(".json").unlink()
    elif fault.endswith("none"):
        path.with_suffix(".json").write_text('{"key": 3}')
    notes: list[str] = []
    again = one(bundle, VQGAN, say=notes.append)
    assert again.how == "built"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == again.plan.sha256
    assert again.plan.path == plan.path
    reasons = {
        "one bit": f"{path}: expected SHA-256 {plan.sha256[:12]}..., found ",
        "cut short": f"{path}: expected {plan.bytes} bytes, it has {plan.bytes - 9}; it is built again",
        "another plan": f"{path}: its header says targets sm120, expected sm89; it is built again",
        "a note that is none": f"{path.with_suffix('.json')}: KeyError; it is built again",
    }
    assert [note.startswith(reasons[fault]) for note in notes] == [True] * (fault in reasons)


def test_what_decides_a_plan(built: Path, exported: Callable[[str], Path]) -> None:
    """Every one of these has a plan of its own, and none takes another's."""

    def planned(bundle: Path, wishes: BuildOptions) -> str:
        backend, device = require_machine(wishes)
        (plan,) = plans_to_build(open_bundle(bundle), wishes, backend.version, device)
        return plan.path.relative_to(bundle).as_posix()

    first = [plan.path for plan in open_bundle(built).entry(Stage.VQGAN).plans]
    both = changed(VQGAN, targets=("sm86", "sm89"))
    wishes = (
        VQGAN,
        both,
        changed(VQGAN, targets=("sm86",)),
        changed(VQGAN, graphs=("encoder",)),
        changed(VQGAN, profiles=(Bounds(*[parse_image_size("256x320")] * 3),)),
    )
    paths = [planned(built, each) for each in wishes]
    assert paths[:1] == first
    assert len({*paths, planned(exported("fp16"), VQGAN)}) == 6
    assert one(built, both).how == "built"
    assert [plan.path for plan in open_bundle(built).entry(Stage.VQGAN).plans] == paths[:2]


def test_a_shared_cache(original: Path, bundle: Path, tmp_path: Path, no_build: Callable[[], None]) -> None:
    """For a bundle exported anew, with linked weights of another file name: the bytes are the same."""
    cache = tmp_path / "cache"
    first = one(bundle, changed(VQGAN, cache=cache))
    export(
        original,
        tmp_path / "again",
        stages=[Stage.VQGAN],
        weights="copy",
        precision=Precision.BF16,
        target=Target.TENSORRT,
    )
    no_build()
    second = one(tmp_path / "again", changed(VQGAN, cache=cache))
    assert second.how == "cached"
    assert (tmp_path / "again" / second.plan.path).samefile(cache / Path(first.plan.path).name)
    assert open_bundle(tmp_path / "again").entry(Stage.VQGAN).is_current(second.plan)


def write_lora(path: Path, module: str, shape: tuple[int, int]) -> Path:
    """A kohya LoRA of rank 2 for one Linear of the text encoder."""
    random = np.random.default_rng(0)
    up, down = (random.normal(0, 0.1, size).astype(np.float32) for size in ((shape[0], 2), (2, shape[1])))
    name = "lora_te_" + module.replace(".", "_")
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.float32([2])}, path)
    return path


def test_a_lora_and_back(bundle: Path, tmp_path: Path, no_build: Callable[[], None]) -> None:
    """Weights A, B, A, B: two builds. A plan of other weights stays, and is not taken for one of these."""
    lora = write_lora(tmp_path / "lora.safetensors", "text_model.encoder.layers.0.mlp.fc1", (32, 8))
    config = open_bundle(bundle).entry(Stage.TEXT_ENCODER).config
    assert (config["intermediate_size"], config["hidden_size"]) == (32, 8)
    plain = one(bundle, TEXT).plan
    apply_loras(bundle, [lora])
    entry = open_bundle(bundle).entry(Stage.TEXT_ENCODER)
    assert not entry.is_current(plain)
    assert "of other weights than the stage has now" in CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    merged = one(bundle, TEXT).plan
    assert merged.sha256 != plain.sha256
    no_build()
    undo_loras(bundle)
    assert one(bundle, TEXT).plan == plain
    assert current(bundle) == [plain]
    apply_loras(bundle, [lora])
    assert one(bundle, TEXT).plan == merged
    assert current(bundle) == [merged]

    arguments = f"build {bundle} --arch sm89 --static 256x256 --stage text_encoder --prune"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    assert "removed plans of other weights: " in result.stderr
    assert open_bundle(bundle).entry(Stage.TEXT_ENCODER).plans == (merged,)
    assert [path.name for path in (bundle / "text_encoder/plans").glob("*.plan")] == [Path(merged.path).name]


def current(bundle: Path) -> list[PlanEntry]:
    entry = open_bundle(bundle).entry(Stage.TEXT_ENCODER)
    return [plan for plan in entry.plans if entry.is_current(plan)]
