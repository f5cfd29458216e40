"""Calibration takes little memory beside the weights, which stay in their file.

The bound is a proportion, so that it also holds for real sizes: of the weights, only those whose product is due are in
memory in fp32. The values of one pass come on top; here they are small."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascadekit.converters.export import calibrate_fp16
from cascadekit.schemas.stages import PRESETS, Stage, UNetConfig, Variant
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import random_tensors
from helpers.peak_memory import status

WIDTH, LAYERS = 512, (4, 4)  # 56 million weights
TINY = PRESETS[Stage.PRIOR, Variant.TINY]
assert isinstance(TINY, UNetConfig)
CONFIG = replace(
    TINY,
    block_out_channels=(WIDTH, WIDTH),
    num_attention_heads=(8, 8),
    down_num_layers_per_block=LAYERS,
    up_num_layers_per_block=LAYERS,
)


class Peak:
    """The largest anonymous memory of this process while the block runs, beyond what it had; files are not in it."""

    def __enter__(self) -> "Peak":
        self.start, self.most, self._over = status("RssAnon"), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, status("RssAnon") - self.start)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def test_weights_are_in_memory_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_fp16, "STEPS", 1)
    monkeypatch.setattr(calibrate_fp16, "SIDES", {Stage.PRIOR: 2})
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_tensors(CONFIG, 0).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    del tensors
    weights = read_header(tmp_path / "weights.safetensors").tensors
    stored = sum(weight.nbytes for weight in weights.values())
    with Peak() as peak:
        ranges = calibrate_fp16.measure_ranges(CONFIG, weights)
    assert len(ranges) > 50
    assert peak.most < stored / 2, peak.most / stored  # all weights in fp32 would be twice as much as stored
