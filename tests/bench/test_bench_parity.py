"""The worst ratio of all measured networks counts, and the command shows it."""

import json

import pytest
from click.testing import CliRunner

from cascadekit.bench import parity
from cascadekit.bench.parity import Ratio
from cascadekit.cli import main
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage


def test_the_worst_network_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_network(folder: object, seed: int) -> list[Ratio]:
        return [
            Ratio("onnxruntime", Precision.FP32, Stage.PRIOR, 1e-7, (1.5, 1.9, 1.1)[seed] * 1e-7),
            Ratio("onnxruntime", Precision.FP16, Stage.PRIOR, 1e-3, 1e-3),
        ]

    monkeypatch.setattr(parity, "_of_network", of_network)
    result = CliRunner().invoke(main, ["bench", "parity", "--networks", "3", "--json"])
    assert result.exit_code == 0, result.output
    fine, coarse = json.loads(result.stdout)
    assert (fine["stage"], fine["kind"], coarse["kind"]) == ("prior", "fp32", "fp16")
    assert fine["ratio"] == pytest.approx(1.9)
    shown = CliRunner().invoke(main, ["bench", "parity", "--networks", "3"])
    assert "1.90" in shown.stdout
