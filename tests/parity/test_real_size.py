"""verify and bisection on a lite prior of real size: what they take beside the forward passes. Minutes, 10 GB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cascadekit
from cascadekit import convert, export
from cascadekit.schemas.stages import Stage
from helpers.standins import write_stand_in

# What a process of its own does; it prints its peak memory in bytes, and the seconds of loading, passes and all.
WORK = """
import json, os, resource, sys, time
from pathlib import Path
import torch
torch.set_num_threads(os.cpu_count() or 1)
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.storage.bundle import open_bundle
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.parity.inside.bisect import bisect_stage
from cascadekit.parity.sample_inputs import SampleSize, make_inputs
from cascadekit.parity.image_sizes import SizeChoice
from cascadekit.parity.compare_engine import compare_engine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.stages import Stage
what, folder = sys.argv[1], Path(sys.argv[2])
bundle, tokenizer, size = open_bundle(folder / "bundle"), ClipTokenizer.open(None), SampleSize((1024, 1024))
reference = reference_engine(open_model([folder / "model"]), [Stage.PRIOR])
engine = OnnxRuntimeEngine(bundle)
begin = time.perf_counter()
passes = 0.0
passed = True
if what in ("reference", "engine"):
    runner = {"reference": reference, "engine": engine}[what].load(Stage.PRIOR)
    samples = make_inputs(Stage.PRIOR, bundle.entry(Stage.PRIOR), tokenizer, sizes=[size])
    start = time.perf_counter()
    for each in samples:
        runner(each.inputs)
    passes = time.perf_counter() - start
elif what == "verify":
    report = compare_engine(engine, reference, bundle, [Stage.PRIOR], sizes=SizeChoice({Stage.PRIOR: [size]}))
    passed = bool(report)
else:
    found = bisect_stage(bundle, Stage.PRIOR, reference, slice_bytes=1 << 28)
    passed = bool(found)
    print("; ".join(found.described()), file=sys.stderr)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "passes": passes, "seconds": time.perf_counter() - begin, "passed": passed}))
"""


@pytest.mark.slow
def test_a_lite_prior(catalog_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "original_stage_c_lite_bf16.safetensors"
    write_stand_in(catalog_folder / "original_stage_c_lite.json", source, "BF16")
    convert([source], tmp_path / "model", "diffusers")
    export(tmp_path / "model", tmp_path / "bundle", stages=[Stage.PRIOR])
    root = Path(cascadekit.__file__).parents[1]
    measured = {}
    for what in ("reference", "engine", "verify", "bisect"):
        command = [sys.executable, "-c", WORK, what, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
        measured[what] = json.loads(done.stdout)
        print(what, measured[what], *done.stderr.splitlines()[-1:])
    reference, engine, verified, bisected = measured.values()
    assert verified["passed"]
    assert bisected["passed"]
    assert verified["seconds"] < 1.5 * (reference["passes"] + engine["passes"])
    assert verified["peak"] < 1.1 * (reference["peak"] + engine["peak"])
    assert bisected["peak"] < 1.1 * (reference["peak"] + engine["peak"]) + (1 << 28)
