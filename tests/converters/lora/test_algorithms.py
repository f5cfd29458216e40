"""LoHa, LoKr, Tucker cores and DoRA against LyCORIS' definitions, written out in float64."""

from typing import Any

import pytest
import torch

from cascadekit.converters.lora import formulas
from cascadekit.schemas.errors import CascadeError

MODULE = "up_blocks.1.0.channelwise.0"  # [256, 128]
CONV = "embedding.1"  # [64, 16, 1, 1]
DEPTHWISE = "down_blocks.0.0.depthwise"  # [64, 1, 3, 3]


def key(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def write(bench: Any, module: str, factors: dict[str, torch.Tensor]) -> Any:
    return bench.lora({f"{key(module)}.{name}": tensor for name, tensor in factors.items()})


@pytest.fixture(autouse=True, params=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(formulas, "BLOCK_VALUES", 7 * 128)


@pytest.mark.parametrize("rank", [1, 3])
def test_loha(bench: Any, numbers: Any, rank: int) -> None:
    a1, b1, a2, b2 = (numbers(1, 256, rank), numbers(2, rank, 128), numbers(3, 256, rank), numbers(4, rank, 128))
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(2.0)}
    change = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) * (2 / rank)
    expected = bench.weights[f"{MODULE}.weight"] + 0.75 * change
    bench.check(write(bench, MODULE, factors), {MODULE: expected}, 1e-5, strengths=[0.75])


def test_loha_with_cores(bench: Any, numbers: Any) -> None:
    t1, t2 = numbers(1, 2, 2, 3, 3), numbers(2, 2, 2, 3, 3)
    a1, b1, a2, b2 = numbers(3, 2, 64), numbers(4, 2, 1), numbers(5, 2, 64), numbers(6, 2, 1)
    factors = {"hada_t1": t1, "hada_w1_a": a1, "hada_w1_b": b1, "hada_t2": t2, "hada_w2_a": a2, "hada_w2_b": b2}
    one, two = (torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2)))
    bench.check(write(bench, DEPTHWISE, factors), {DEPTHWISE: bench.weights[f"{DEPTHWISE}.weight"] + one * two}, 1e-5)


def test_lora_with_core(bench: Any, numbers: Any) -> None:
    mid, up, down = numbers(1, 2, 2, 3, 3), numbers(2, 64, 2, 1, 1), numbers(3, 2, 1, 1, 1)
    factors = {"lora_mid.weight": mid, "lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    change = torch.einsum("ijkl,ip,jr->prkl", mid, up[:, :, 0, 0].T, down[:, :, 0, 0]) / 2
    bench.check(write(bench, DEPTHWISE, factors), {DEPTHWISE: bench.weights[f"{DEPTHWISE}.weight"] + change}, 1e-5)


def test_plain_lora_over_a_kernel(bench: Any, numbers: Any) -> None:
    up, down = numbers(2, 64, 2, 1, 1), numbers(3, 2, 1, 3, 3)
    change = (up.reshape(64, 2) @ down.reshape(2, 9)).reshape(64, 1, 3, 3)
    path = write(bench, DEPTHWISE, {"lora_up.weight": up, "lora_down.weight": down})
    bench.check(path, {DEPTHWISE: bench.weights[f"{DEPTHWISE}.weight"] + change})


@pytest.mark.parametrize("whole_1", [True, False])
@pytest.mark.parametrize("whole_2", [True, False])
def test_lokr(bench: Any, numbers: Any, whole_1: bool, whole_2: bool) -> None:
    factors, rank = {"alpha": torch.tensor(2.0)}, 4
    w1, w2 = numbers(1, 16, 4), numbers(2, 16, 32)
    if not whole_1:
        factors |= {"lokr_w1_a": numbers(3, 16, rank), "lokr_w1_b": numbers(4, rank, 4)}
        w1 = factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    else:
        factors["lokr_w1"] = w1
    if not whole_2:
        factors |= {"lokr_w2_a": numbers(5, 16, rank), "lokr_w2_b": numbers(6, rank, 32)}
        w2 = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    else:
        factors["lokr_w2"] = w2
    scale = 1 if whole_1 and whole_2 else 2 / rank
    expected = bench.weights[f"{MODULE}.weight"].double() + scale * torch.kron(w1.double(), w2.double())
    bench.check(write(bench, MODULE, factors), {MODULE: expected}, 1e-5)


def test_lokr_over_a_kernel(bench: Any, numbers: Any) -> None:
    w1, t2, a, b = numbers(1, 8, 1), numbers(2, 2, 2, 3, 3), numbers(3, 2, 8), numbers(4, 2, 1)
    w2 = torch.einsum("ijkl,ip,jr->prkl", t2, a, b)
    expected = bench.weights[f"{DEPTHWISE}.weight"] + torch.kron(w1[:, :, None, None], w2)
    factors = {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a, "lokr_w2_b": b}
    bench.check(write(bench, DEPTHWISE, factors), {DEPTHWISE: expected}, 1e-5)


def test_lokr_convolution_without_core(bench: Any, numbers: Any) -> None:
    w1, a, b = numbers(1, 8, 4), numbers(3, 8, 2), numbers(4, 2, 4, 1, 1)
    w2 = (a @ b.reshape(2, -1)).reshape(8, 4, 1, 1)
    expected = bench.weights[f"{CONV}.weight"] + torch.kron(w1[:, :, None, None], w2)
    bench.check(write(bench, CONV, {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}), {CONV: expected}, 1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("module", [MODULE, CONV, DEPTHWISE])
def test_dora(bench: Any, numbers: Any, module: str, axis: str, strength: float) -> None:
    weight = bench.weights[f"{module}.weight"].double()
    out, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    down, up = numbers(1, 3, inputs, *kernel), numbers(2, out, 3, *ones)
    spread = (1, inputs, *ones) if axis == "input" else (out, 1, *ones)
    scale = (numbers(3, *spread) + 2).float()
    moved = weight + (up.reshape(out, 3) @ down.reshape(3, -1)).reshape(weight.shape) * (5 / 3)
    dims = tuple(n for n in range(weight.dim()) if n != (1 if axis == "input" else 0))
    full = scale.double() * moved / torch.linalg.vector_norm(moved, dim=dims, keepdim=True)
    factors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale, "alpha": torch.tensor(5.0)}
    expected = weight + strength * (full - weight)
    bench.check(write(bench, module, factors), {module: expected}, 2e-6, strengths=[strength])


def test_dora_of_a_single_input_with_square_weight(bench: Any, numbers: Any) -> None:
    """[1, c] and [c, 1] are told apart by shape, though both have c values."""
    module = "down_blocks.0.2.attention.to_q"
    weight = bench.weights[f"{module}.weight"].double()
    down, up = numbers(1, 2, 64), numbers(2, 64, 2)
    for scale, dim in ((numbers(3, 1, 64) + 2, 0), (numbers(3, 64, 1) + 2, 1)):
        name = "lora_prior_unet_down_blocks_0_2_attention_attn_to_q"
        path = bench.lora({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": scale})
        moved = weight + up.double() @ down.double()
        bench.check(path, {module: scale * moved / moved.norm(dim=dim, keepdim=True)}, 2e-6)


@pytest.mark.parametrize("suffix", ["oft_blocks", "oft_diag", "a1.weight", "on_input", "set_weight"])
def test_other_algorithms_are_refused_by_name(bench: Any, numbers: Any, suffix: str) -> None:
    path = bench.lora({f"{key(MODULE)}.{suffix}": numbers(1, 4, 4)})
    with pytest.raises(CascadeError, match="not supported"):
        bench.merge(bench.checkpoint(), [path])


JOINED = "lora_unet_down_blocks_0_2_attention_attn_in_proj"


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_joined_attention_in_a_format_with_names(bench: Any, numbers: Any, algorithm: str) -> None:
    down, up, b, a = numbers(1, 2, 64), numbers(2, 192, 2), numbers(3, 2, 64), numbers(4, 192, 2)
    factors = {"lora_down.weight": down, "lora_up.weight": up}
    change = up @ down
    if algorithm == "loha":
        factors = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": a, "hada_w2_b": b}
        change = change * (a @ b)
    path = bench.lora({f"{JOINED}.{name}": tensor for name, tensor in factors.items()})
    modules = [f"down_blocks.0.2.attention.{part}" for part in ("to_q", "to_k", "to_v")]
    parts = zip(modules, change.chunk(3), strict=True)
    bench.check(path, {module: bench.weights[f"{module}.weight"] + part for module, part in parts}, 1e-5)


def test_joined_attention_that_cannot_be_cut(bench: Any, numbers: Any) -> None:
    path = bench.lora({f"{JOINED}.lokr_w1": numbers(1, 3, 1), f"{JOINED}.lokr_w2": numbers(2, 64, 64)})
    with pytest.raises(CascadeError, match="blocks of rows"):
        bench.merge(bench.checkpoint(), [path])
