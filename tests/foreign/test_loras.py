"""Every row of the table of foreign LoRAs: merged as its program merges it, converted without a change, or refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.formulas import applied
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import CascadeError, ConversionError
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.schemas.tensors import expected_tensors
from foreign.loras import ROWS, Arrays, Base, Written

TOLERANCE = 2e-5
READERS = ("comfyui", "peft", "onetrainer")


def weights(stage: Stage) -> Arrays:
    random = np.random.default_rng(7)
    shapes = expected_tensors(PRESETS[stage, Variant.TINY])
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


BASES = {stage: weights(stage) for stage in (Stage.PRIOR, Stage.TEXT_ENCODER)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of each of BASES; read only."""
    folder = tmp_path_factory.mktemp("bases")
    for stage, tensors in BASES.items():
        save_file(tensors, folder / f"{stage}.safetensors")
    return folder


def written(name: str) -> tuple[Written, Arrays]:
    """A row's file and the weights it is for."""
    text = any(word in name for word in ("text encoder", "norm"))
    weights = BASES[Stage.TEXT_ENCODER if text else Stage.PRIOR]
    made = ROWS[name](Base(weights, seed=len(name)))
    assert made.text_encoder == text
    return made, weights


def stage_of(row: Written) -> Stage:
    return Stage.TEXT_ENCODER if row.text_encoder else Stage.PRIOR


@pytest.mark.parametrize("name", ROWS)
def test_merged_and_converted_or_refused(name: str, bases: Path, tmp_path: Path) -> None:
    row, weights = written(name)
    base = bases / f"{stage_of(row)}.safetensors"
    lora = row.write(tmp_path / "lora")
    if row.refusal:
        with pytest.raises(CascadeError, match=f"(?s){row.refusal}") as caught:
            merge_loras(base, [lora], tmp_path / "merged.safetensors")
        assert "damaged" not in str(caught.value)
        return
    done = merge_loras(base, [lora], tmp_path / "merged.safetensors")
    assert not done.unapplied
    assert row.note in " ".join(done.notes)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == weights.keys()
    for tensor, value in weights.items():
        np.testing.assert_allclose(
            merged[tensor], row.expected.get(tensor, value), rtol=0, atol=TOLERANCE, err_msg=tensor
        )
    for tensor, value in row.expected.items():
        assert np.abs(value - weights[tensor]).max() > 100 * TOLERANCE, f"{tensor}: the row changes nothing"
    for to in READERS:
        output = tmp_path / f"{to}.safetensors"
        if holds_something(lora, output, to, base):
            require_same_changes(output, row, weights)


def holds_something(lora: Path, output: Path, to: str, base: Path) -> bool:
    """Convert; False where the format says that it holds nothing of the LoRA."""
    try:
        convert_lora(lora, output, to, against=base, drop=True)
    except ConversionError as error:
        if "cannot hold" in str(error):
            return False
        raise
    return True


def require_same_changes(output: Path, row: Written, weights: Arrays) -> None:
    """A converted file changes the weights as the program's own file does."""
    for target, adapter in open_lora(output).adapters.items():
        rows = weights[target.tensor].reshape(len(weights[target.tensor]), -1)
        found = applied(lambda start, stop, rows=rows: rows[start:stop], adapter, 1.0, np.float32)(0, len(rows))  # type: ignore[misc]
        wanted = row.expected[target.tensor].reshape(rows.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=target.tensor)
