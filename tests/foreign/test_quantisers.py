"""torchao and bitsandbytes quantise the example model: we read what they saved, and generate their pictures."""

from pathlib import Path

import numpy as np
import pytest

from cascadekit import convert
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.parity.image_metrics import psnr
from helpers.format_pictures import LEAST_PSNR, of_checkpoints, right
from helpers.matrix import Matrix
from helpers.oracles import QUANTISERS, quantiser, run_alone

pytestmark = pytest.mark.slow
PROGRAMS = {"torchao_int8": "torchao", "bitsandbytes_nf4": "bitsandbytes"}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_we_generate_the_pictures_of_what_they_quantised(kind: str, tmp_path: Path, matrix: Matrix) -> None:
    program = PROGRAMS[kind]
    version = quantiser(program)
    if not version:
        pytest.skip(f"{QUANTISERS}: no {program}; `make matrix` installs it")
    model = tmp_path / "model"
    convert(EXAMPLE_MODEL, model, "diffusers", dtype="fp32")
    run_alone("foreign.quantised_alone", kind, model, tmp_path / "theirs", path=QUANTISERS)
    theirs = np.load(tmp_path / "theirs" / "pictures.npy")
    sources = [
        *(tmp_path / "theirs" / stage for stage in ("prior", "decoder")),
        model / "vqgan",
        model / "text_encoder",
    ]
    found, unquantised = of_checkpoints(sources, tmp_path / "ours"), of_checkpoints([model], tmp_path / "plain")
    agreement = psnr(found, theirs)
    assert agreement >= LEAST_PSNR
    values = {"picture": agreement, "cost": psnr(unquantised, theirs), "judged": right(theirs)}
    for column, value in values.items():
        matrix.record(f"diffusers {kind}", column, value, by=program, version=version)
