"""The files of each program that makes LoRAs: one table, with the result of the program's own formula for every row.

Keys, shapes and formulas are those of the sources named in each row, written out in float64; nothing of cascadekit is
used. Weights go by diffusers names. A row is a function from a base model to a file and what must come of it.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "lora.safetensors"

Array = NDArray[Any]
Arrays = dict[str, Array]

Q = "down_blocks.0.2.attention.to_q"  # [64, 64]
OUT = "up_blocks.1.2.attention.to_out.0"  # [64, 64]
WIDE = "up_blocks.1.0.channelwise.0"  # [256, 128]
CONV = "embedding.1"  # [64, 16, 1, 1]
DEPTHWISE = "down_blocks.0.0.depthwise"  # [64, 1, 3, 3]
MODULES = (Q, OUT, WIDE, CONV)
TWO = np.float32(2)
FC1 = "text_model.encoder.layers.0.mlp.fc1"
NORM = "text_model.encoder.layers.1.layer_norm2"
TOKENS = "text_model.embeddings.token_embedding"


class Base:
    """The weights a LoRA is for, and random numbers."""

    def __init__(self, weights: Mapping[str, Array], seed: int) -> None:
        self.weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
        self._random = np.random.default_rng(seed)

    def random(self, *shape: int) -> Array:
        return self._random.normal(0, 0.3, shape).astype(np.float32)

    def weight(self, module: str) -> Array:
        return self.weights[f"{module}.weight"]

    def shape(self, module: str) -> tuple[int, ...]:
        return self.weight(module).shape


@dataclass
class Written:
    """The file's tensors and what lies beside them; then the tensors it changes, or a pattern of the refusal."""

    tensors: Arrays
    expected: Arrays = field(default_factory=dict)
    refusal: str = ""
    note: str = ""  # a pattern of a note that must be given
    settings: Mapping[str, Any] | None = None  # adapter_config.json
    metadata: dict[str, str] | None = None
    name: str = NAME
    text_encoder: bool = False  # what it changes; else the prior

    def write(self, folder: Path) -> Path:
        """Write everything below `folder`; returns what a user gives as the LoRA."""
        import torch
        from safetensors.torch import save_file

        path = folder / ("adapter_model.safetensors" if self.settings and self.name == NAME else self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in self.tensors.items()}
        if path.suffix == ".safetensors":
            save_file(tensors, path, self.metadata)
        else:
            torch.save(tensors, path)
        if self.settings is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.settings))
            return folder
        return folder if "/" in self.name else path


Row = Callable[[Base], Written]


def product(up: Array, down: Array, shape: tuple[int, ...]) -> Array:
    left, right = up.astype(np.float64), down.astype(np.float64)
    return (left.reshape(left.shape[0], -1) @ right.reshape(right.shape[0], -1)).reshape(shape)


def split(module: str) -> str:
    """A module's name in kohya's, ComfyUI's and OneTrainer's networks: Stability's, with q, k and v apart."""
    return module.replace(".attention.to_out.0", ".attention.attn.out_proj").replace(
        ".attention.to_", ".attention.attn.to_"
    )


def flat(prefix: str, module: str) -> str:
    return prefix + split(module).replace(".", "_")


def pair(base: Base, module: str, rank: int) -> tuple[Array, Array]:
    """lora_down and lora_up as torch's Linear and Conv2d have them."""
    out, *inputs = base.shape(module)
    ones = [1] * (len(inputs) - 1)
    return base.random(rank, *inputs), base.random(out, rank, *ones)


def output_norms(weight: Array) -> Array:
    return np.linalg.norm(weight.reshape(len(weight), -1), axis=1).reshape(-1, *[1] * (weight.ndim - 1))


def input_norms(weight: Array) -> Array:
    axes = tuple(axis for axis in range(weight.ndim) if axis != 1)
    return np.sqrt(np.square(weight).sum(axis=axes, keepdims=True))


# PEFT: src/peft/tuners/lora/layer.py, get_delta_weight: B @ A * scaling; names of get_peft_model_state_dict.


def peft_config(kind: str = "LoraConfig", **values: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT itself writes it."""
    import peft

    made = getattr(peft, kind)(target_modules=["to_q"], **values).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in made.items()}


def peft(scale: float, modules: tuple[str, ...] = MODULES, prefix: str = "base_model.model.", **values: Any) -> Row:
    def make(base: Base) -> Written:
        written = Written({}, settings=peft_config(r=3, **values))
        for module in modules:
            down, up = pair(base, module, 3)
            written.tensors |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
            changed = base.weight(module) + scale * product(up, down, base.shape(module))
            written.expected[f"{module}.weight"] = changed
        return written

    return make


def peft_refused(pattern: str, **values: Any) -> Row:
    def make(base: Base) -> Written:
        written = peft(1)(base)
        written.settings = {**(written.settings or {}), **values}
        written.refusal = pattern
        return written

    return make


def peft_patterns(base: Base) -> Written:
    """get_pattern_key in src/peft/utils/other.py: the first key that matches the end of the name."""
    written = peft(1)(base)
    written.settings = peft_config(
        r=3,
        lora_alpha=2,
        alpha_pattern={r".*blocks\.\d\.2\..*to_(q|k)": 6, r"(channelwise|embedding)\.[01]": 9, "q": 99},
    )
    for module, alpha in {Q: 6, OUT: 2, WIDE: 9, CONV: 9}.items():
        whole, old = written.expected[f"{module}.weight"], base.weight(module)
        written.expected[f"{module}.weight"] = old + alpha / 3 * (whole - old)
    return written


def peft_dora(base: Base) -> Written:
    """src/peft/tuners/lora/dora.py: magnitude / ‖W + ΔW‖ for each output, times W + ΔW."""
    written = peft(5 / 3, (Q, CONV), lora_alpha=5, use_dora=True)(base)
    for module in (Q, CONV):
        moved = written.expected[f"{module}.weight"]
        size = 1 + np.abs(base.random(len(moved)))
        spread = size.reshape(1, -1, 1, 1) if moved.ndim == 4 else size
        written.tensors[f"base_model.model.{module}.lora_magnitude_vector"] = spread
        column = size.reshape(-1, *[1] * (moved.ndim - 1))
        written.expected[f"{module}.weight"] = column * moved / output_norms(moved)
    return written


def peft_bias(base: Base) -> Written:
    """LoraLayer.merge: the base layer's bias += lora_B.bias * scaling."""
    written = peft(5 / 3, lora_alpha=5, lora_bias=True)(base)
    for module in (WIDE, CONV):
        bias = base.random(base.shape(module)[0])
        written.tensors[f"base_model.model.{module}.lora_B.bias"] = bias
        written.expected[f"{module}.bias"] = base.weights[f"{module}.bias"] + 5 / 3 * bias
    return written


def peft_loha(base: Base) -> Written:
    """src/peft/tuners/loha/layer.py: (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r."""
    written = Written({}, settings=peft_config("LoHaConfig", r=3, alpha=4))
    for module in (WIDE, CONV, DEPTHWISE):
        out, *inputs = base.shape(module)
        parts = {n: base.random(*((3, math.prod(inputs)) if n.endswith("b") else (out, 3))) for n in HADA}
        written.tensors |= {f"base_model.model.{module}.{name}": value for name, value in parts.items()}
        written.expected[f"{module}.weight"] = base.weight(module) + 4 / 3 * hadamard(parts, base.shape(module))
    return written


def peft_lokr(base: Base) -> Written:
    """src/peft/tuners/lokr/layer.py: kron(w1, w2) * alpha / r, scaled even where both are whole."""
    written = Written({}, settings=peft_config("LoKrConfig", r=2, alpha=5, rank_pattern={"channelwise.0": 80}))
    w1, a, b = base.random(8, 8), base.random(8, 2), base.random(2, 8)
    whole1, whole2 = base.random(16, 8), base.random(16, 16)
    written.tensors = {
        f"base_model.model.{Q}.lokr_w1": w1,
        f"base_model.model.{Q}.lokr_w2_a": a,
        f"base_model.model.{Q}.lokr_w2_b": b,
        f"base_model.model.{WIDE}.lokr_w1": whole1,
        f"base_model.model.{WIDE}.lokr_w2": whole2,
    }
    written.expected = {
        f"{Q}.weight": base.weight(Q) + 5 / 2 * np.kron(w1.astype(float), a.astype(float) @ b),
        f"{WIDE}.weight": base.weight(WIDE) + 5 / 80 * np.kron(whole1.astype(float), whole2),
    }
    return written


def peft_pickled(base: Base) -> Written:
    written = peft(5 / 3, lora_alpha=5)(base)
    written.name = "adapter_model.bin"
    return written


def diffusers_metadata(prefix: str) -> Row:
    """diffusers (loaders/lora_base.py): each network's settings in the file's metadata, behind the network's name."""

    def make(base: Base) -> Written:
        written = peft(5 / 3, prefix=prefix)(base)
        own = {f"{prefix}{key}": value for key, value in peft_config(r=3, lora_alpha=5).items()}
        text = json.dumps(own | {"text_encoder.r": 4, "text_encoder.lora_alpha": 77})
        return Written(written.tensors, written.expected, metadata={"lora_adapter_metadata": text})

    return make


# ComfyUI: comfy_extras/nodes_lora_extract.py and nodes_train.py write, comfy/lora.py and comfy/weight_adapter read:
# up @ down, reshaped, times alpha / rank, without alpha times 1; diff and diff_b are added.


def comfyui_extracted(base: Base) -> Written:
    written = Written({})
    for module in (*MODULES, DEPTHWISE):
        down, up = (half.astype(np.float16) for half in pair(base, module, 1 if module == DEPTHWISE else 3))
        key = f"diffusion_model.{split(module)}"
        bias = base.random(base.shape(module)[0]).astype(np.float16)
        written.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.diff_b": bias}
        written.expected[f"{module}.weight"] = base.weight(module) + product(up, down, base.shape(module))
        written.expected[f"{module}.bias"] = base.weights[f"{module}.bias"] + bias.astype(float)
    return written


def full(prefix: Callable[[str], str], dtype: type[np.floating] = np.float16) -> Row:
    """ComfyUI's lora_type full_diff; LyCORIS' "full" (lycoris/modules/full.py): W + diff, b + diff_b."""

    def make(base: Base) -> Written:
        written = Written({})
        for module in (*MODULES, DEPTHWISE):
            for ending, name in (("diff", f"{module}.weight"), ("diff_b", f"{module}.bias")):
                change = base.random(*base.weights[name].shape).astype(dtype)
                written.tensors[f"{prefix(module)}.{ending}"] = change
                written.expected[name] = base.weights[name] + change.astype(float)
        return written

    return make


def comfyui_text_encoder(base: Base) -> Written:
    """CLIPSubtract's difference: every weight of two axes as a pair, tables of embeddings too; norms as diff."""
    written = Written({}, text_encoder=True)
    for module in (FC1, "text_projection", TOKENS):
        down, up = pair(base, module, 3)
        key = f"text_encoders.clip_g.transformer.{module}"
        written.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        written.expected[f"{module}.weight"] = base.weight(module) + product(up, down, base.shape(module))
    norm = {"diff": base.random(8), "diff_b": base.random(8)}
    written.tensors |= {f"text_encoders.clip_g.transformer.{NORM}.{name}": value for name, value in norm.items()}
    written.expected[f"{NORM}.weight"] = base.weight(NORM) + norm["diff"]
    written.expected[f"{NORM}.bias"] = base.weights[f"{NORM}.bias"] + norm["diff_b"]
    return written


def comfyui_trained(base: Base) -> Written:
    """LoraDiff: lora_down always a matrix [rank, everything else]; alpha a parameter among the others."""
    written = Written({})
    for module in (*MODULES, DEPTHWISE):
        out, *inputs = base.shape(module)
        down, up, bias = base.random(3, math.prod(inputs)), base.random(out, 3), base.random(out)
        key = f"diffusion_model.{split(module)}"
        written.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.diff_b": bias}
        written.tensors[f"{key}.alpha"] = np.float32(1)
        written.expected[f"{module}.weight"] = base.weight(module) + product(up, down, base.shape(module)) / 3
        written.expected[f"{module}.bias"] = base.weights[f"{module}.bias"] + bias
    return written


def comfyui_reshape(shape: tuple[int, ...], refusal: str) -> Row:
    def make(base: Base) -> Written:
        written = kohya()(base)
        written.tensors[f"{flat('lora_unet_', Q)}.reshape_weight"] = np.array(shape)
        written.refusal = refusal
        return written

    return make


def odd_key(ending: str, refusal: str, *shape: int, prefix: str = "lora_unet_") -> Row:
    """One tensor under a key of another algorithm, beside an alpha as most have it."""

    def make(base: Base) -> Written:
        key = flat(prefix, Q)
        return Written({f"{key}.{ending}": base.random(*shape), f"{key}.alpha": np.float32(1)}, refusal=refusal)

    return make


# kohya: networks/lora.py: up @ down * alpha / rank; alpha has the dtype of --save_precision, without it torch's own.


def kohya(
    alpha: Any = TWO,
    rank: int = 3,
    prefix: str = "lora_unet_",
    name: str = "lora.safetensors",
    modules: tuple[str, ...] = MODULES,
) -> Row:
    def make(base: Base) -> Written:
        written = Written({}, name=name)
        for module in modules:
            down, up = pair(base, module, rank)
            key = flat(prefix, module)
            written.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": alpha}
            scale = float(np.asarray(alpha).reshape(())) / rank
            written.expected[f"{module}.weight"] = base.weight(module) + scale * product(up, down, base.shape(module))
        return written

    return make


def kohya_text_encoder(base: Base) -> Written:
    written = kohya(prefix="lora_te_", modules=(FC1,))(base)
    written.text_encoder = True
    return written


# OneTrainer: modules/module/LoRAModule.py, make_weight: up.view(rows, -1) @ down.view(rank, -1), seen in the weight's
# shape. create_layer gives a grouped convolution lora_down over all channels and lora_up of channels / groups rows.


def onetrainer_pair(base: Base, module: str, rank: int) -> tuple[Array, Array]:
    if module == DEPTHWISE:
        channels, _, *kernel = base.shape(module)
        return base.random(rank, channels, *kernel), base.random(1, rank, 1, 1)
    return pair(base, module, rank)


def onetrainer(prefix: str = "lora_prior_unet_", name: str = "lora.safetensors", flatten: bool = True) -> Row:
    def make(base: Base) -> Written:
        written = Written({}, name=name, note="forward pass")
        for module in (*MODULES, DEPTHWISE):
            down, up = onetrainer_pair(base, module, 3)
            key = flat(prefix, module) if flatten else prefix + module
            written.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            written.tensors[f"{key}.alpha"] = np.float32(2)
            written.expected[f"{module}.weight"] = base.weight(module) + 2 / 3 * product(up, down, base.shape(module))
        return written

    return make


def onetrainer_dora(norms: Callable[[Array], Array]) -> Row:
    """DoRAModule: dora_scale * WP / ‖WP‖ along inputs (the default) or outputs, WP = W + make_weight * alpha / rank."""

    def make(base: Base) -> Written:
        written = onetrainer()(base)
        written.note = ""
        for module in (*MODULES, DEPTHWISE):
            moved = written.expected[f"{module}.weight"]
            scale = (1 + np.abs(base.random(*norms(moved).shape))).astype(np.float32)
            written.tensors[f"{flat('lora_prior_unet_', module)}.dora_scale"] = scale
            written.expected[f"{module}.weight"] = scale * moved / norms(moved)
        return written

    return make


HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def hadamard(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    one, two = (product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], shape) for n in (1, 2))
    return one * two


def loha(prefix: str, modules: tuple[str, ...]) -> Row:
    """OneTrainer's LoHaModule and LyCORIS' (lycoris/modules/loha.py): (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank."""

    def make(base: Base) -> Written:
        written = Written({})
        for module in modules:
            halves = [onetrainer_pair(base, module, 3) for _ in range(2)]
            parts = {f"hada_w{n}_{x}": halves[n - 1]["ba".index(x)] for n in (1, 2) for x in "ab"}
            key = flat(prefix, module)
            written.tensors |= {f"{key}.{name}": value for name, value in parts.items()}
            written.tensors[f"{key}.alpha"] = np.float32(2)
            written.expected[f"{module}.weight"] = base.weight(module) + 2 / 3 * hadamard(parts, base.shape(module))
        return written

    return make


# LyCORIS: lycoris/modules/*.py; `lora_unet_` from kohya's trainer, `lycoris_` and diffusers names from its own wrapper.


def lokr(prefix: str, spell: Callable[[str], str], whole: bool) -> Row:
    """lokr.py: kron(w1, w2) * alpha / rank; of two whole matrices alpha is the rank, so that the scale is 1."""

    def make(base: Base) -> Written:
        key = prefix + spell(WIDE).replace(".", "_")
        w1, w2, a, b = base.random(4, 2), base.random(64, 64), base.random(64, 3), base.random(3, 64)
        tensors = {"lokr_w1": w1, "alpha": np.float32(10_000 if whole else 2)}
        tensors |= {"lokr_w2": w2} if whole else {"lokr_w2_a": a, "lokr_w2_b": b}
        second = w2.astype(float) if whole else a.astype(float) @ b * 2 / 3
        changed = base.weight(WIDE) + np.kron(w1.astype(float), second)
        return Written({f"{key}.{name}": value for name, value in tensors.items()}, {f"{WIDE}.weight": changed})

    return make


def lycoris_dora(norms: Callable[[Array], Array]) -> Row:
    """locon.py, apply_weight_decompose: (W + ΔW) * dora_scale / ‖W + ΔW‖, wd_on_out or not."""

    def make(base: Base) -> Written:
        written = kohya()(base)
        for module in MODULES:
            moved = written.expected[f"{module}.weight"]
            scale = (1 + np.abs(base.random(*norms(moved).shape))).astype(np.float32)
            written.tensors[f"{flat('lora_unet_', module)}.dora_scale"] = scale
            written.expected[f"{module}.weight"] = scale * moved / norms(moved)
        return written

    return make


def lycoris_norm(base: Base) -> Written:
    """norms.py: weight + w_norm, bias + b_norm."""
    key, weight, bias = f"lora_te_{NORM.replace('.', '_')}", base.random(8), base.random(8)
    expected = {f"{NORM}.weight": base.weight(NORM) + weight, f"{NORM}.bias": base.weights[f"{NORM}.bias"] + bias}
    return Written({f"{key}.w_norm": weight, f"{key}.b_norm": bias}, expected, text_encoder=True)


def lycoris_tucker(base: Base) -> Written:
    """functional/general.py, rebuild_tucker of a 1x1 core: up^T, core and down multiplied."""
    down, up, mid = base.random(3, 16, 1, 1), base.random(64, 3, 1, 1), base.random(3, 3, 1, 1)
    key = flat("lora_unet_", CONV)
    tensors = {f"{key}.lora_{n}.weight": t for n, t in (("down", down), ("up", up), ("mid", mid))}
    change = np.einsum("ijkl,jr,pi->prkl", mid.astype(float), down[:, :, 0, 0], up[:, :, 0, 0])
    return Written(tensors | {f"{key}.alpha": np.float32(2)}, {f"{CONV}.weight": base.weight(CONV) + 2 / 3 * change})


def stability(base: Base) -> Written:
    """modules/lora.py of Stability-AI/StableCascade: W + up @ down / rank for every attention, out_proj and in_proj."""
    written = Written({})
    blocks = [f"{side}_blocks.{level}.2.attention" for side in ("down", "up") for level in (0, 1)]
    for index, block in enumerate(blocks):
        for which, rows in enumerate((64, 192)):
            down, up = base.random(4, 64), base.random(rows, 4)
            key = f"weights.{2 * index + which}"
            written.tensors |= {f"{key}.lora_down": down, f"{key}.lora_up": up}
            parts = ("to_out.0",) if which == 0 else ("to_q", "to_k", "to_v")
            for name, change in zip(parts, np.split(product(up, down, (rows, 64)) / 4, len(parts)), strict=True):
                written.expected[f"{block}.{name}.weight"] = base.weight(f"{block}.{name}") + change
    return written


def peft_depthwise(base: Base) -> Written:
    """_ConvNd.merge: "Merging is not supported for _ConvNd layers with groups > 1"."""
    key = f"base_model.model.{DEPTHWISE}"
    tensors = {f"{key}.lora_A.weight": base.random(64, 64, 3, 3), f"{key}.lora_B.weight": base.random(64, 1, 1, 1)}
    return Written(tensors, refusal="depthwise", settings=peft_config(r=64))


SUBCONFIG = {"cov": "x"}

ROWS: dict[str, Row] = {
    "PEFT": peft(5 / 3, lora_alpha=5),
    "PEFT, rank-stabilised": peft(5 / math.sqrt(3), lora_alpha=5, use_rslora=True),
    "PEFT, patterns": peft_patterns,
    "PEFT, DoRA": peft_dora,
    "PEFT, lora_bias": peft_bias,
    "PEFT, adapter_model.bin": peft_pickled,
    "PEFT, gaussian start": peft(8 / 3, init_lora_weights="gaussian"),
    "PEFT, random start": peft(8 / 3, init_lora_weights=False),
    "PEFT, EVA": peft(8 / 3, init_lora_weights="eva"),
    "PEFT, orthogonal start": peft(8 / 3, init_lora_weights="orthogonal"),
    "PEFT, MiCA": peft(8 / 3, init_lora_weights="mica"),
    "PEFT, LoHa": peft_loha,
    "PEFT, LoKr": peft_lokr,
    "PEFT, PiSSA": peft_refused("init_lora_weights.*pissa", init_lora_weights="pissa"),
    "PEFT, fast PiSSA": peft_refused("init_lora_weights.*pissa_niter_4", init_lora_weights="pissa_niter_4"),
    "PEFT, OLoRA": peft_refused("init_lora_weights.*olora", init_lora_weights="olora"),
    "PEFT, CorDA": peft_refused("init_lora_weights.*corda", init_lora_weights="corda", corda_config=SUBCONFIG),
    "PEFT, LoftQ": peft_refused("init_lora_weights.*loftq", init_lora_weights="loftq", loftq_config={"bits": 4}),
    "PEFT, LoRA-GA": peft_refused("init_lora_weights.*lora_ga", init_lora_weights="lora_ga"),
    "PEFT, KaSA": peft_refused("kasa_config", kasa_config={"beta": 1e-4}),
    "PEFT, QALoRA": peft_refused("use_qalora", use_qalora=True),
    "PEFT, BD-LoRA": peft_refused("use_bdlora", use_bdlora={"nblocks": 2}),
    "PEFT, Arrow": peft_refused("arrow_config", arrow_config={"top_k": 3}),
    "PEFT, MonteCLoRA": peft_refused("monteclora_config", monteclora_config={"n": 4}),
    "PEFT, aLoRA": peft_refused("alora_invocation_tokens", alora_invocation_tokens=[1, 2]),
    "PEFT, biases": peft_refused("bias: expected .none., found .all.", bias="all"),
    "PEFT, modules_to_save": peft_refused("modules_to_save.*clf", modules_to_save=["clf.1"]),
    "PEFT, tokens": peft_refused("trainable_token_indices", trainable_token_indices=[1]),
    "PEFT, parameters": peft_refused("target_parameters", target_parameters=["gamma"]),
    "PEFT, replicated layers": peft_refused("layer_replication", layer_replication=[[0, 1]]),
    "PEFT, OFT": peft_refused("peft_type.*OFT", peft_type="OFT"),
    "PEFT, a setting of tomorrow": peft_refused("tomorrow", tomorrow="yes"),
    "PEFT, a depthwise convolution": peft_depthwise,
    "PEFT, embeddings": odd_key("lora_embedding_A", "embeddings", 3, 64),
    "PEFT, VeRA": odd_key("vera_lambda_b", "VeRA", 3),
    "diffusers, metadata": diffusers_metadata("prior."),
    "SimpleTuner, PEFT": diffusers_metadata("unet."),
    "SimpleTuner, LyCORIS lokr with full_matrix": lokr("lycoris_", str, True),
    "ComfyUI, Extract and Save Lora": comfyui_extracted,
    "ComfyUI, Extract and Save Lora, full_diff": full(lambda module: f"diffusion_model.{split(module)}"),
    "ComfyUI, Extract and Save Lora, text encoder": comfyui_text_encoder,
    "ComfyUI, TrainLoraNode": comfyui_trained,
    "ComfyUI, reshape_weight of the same shape": comfyui_reshape((64, 64), ""),
    "ComfyUI, reshape_weight": comfyui_reshape((64, 128), "reshape_weight"),
    "ComfyUI, set_weight": odd_key("set_weight", "set_weight", 64, 64),
    "kohya": kohya(),
    "kohya, text encoder": kohya_text_encoder,
    "kohya, alpha fp16": kohya(np.float16(0.5)),
    "kohya, alpha int64": kohya(np.int64(4)),
    "kohya, alpha uint8 [1]": kohya(np.array([7], np.uint8)),
    "kohya, alpha double": kohya(np.float64(1.25)),
    "kohya, pickled": kohya(np.int64(3), name="lora.pt"),
    "kohya, DyLoRA": kohya(np.float32(1), rank=8),
    "kohya, OFT": odd_key("oft_blocks", "OFT", 4, 16, 16),
    "OneTrainer": onetrainer(),
    "OneTrainer, backup": onetrainer("lora_prior_unet.", "lora/lora.safetensors", flatten=False),
    "OneTrainer, DoRA": onetrainer_dora(input_norms),
    "OneTrainer, DoRA along outputs": onetrainer_dora(output_norms),
    "OneTrainer, LoHa": loha("lora_prior_unet_", (*MODULES, DEPTHWISE)),
    "OneTrainer, LoKr": lokr("lora_prior_unet_", split, False),
    "OneTrainer, OFT": odd_key("oft_R.weight", "OFT", 4, 6, prefix="lora_prior_unet_"),
    "LyCORIS, locon": kohya(np.float32(2 * math.sqrt(3))),  # rs_lora writes alpha * √rank
    "LyCORIS, locon with a core": lycoris_tucker,
    "LyCORIS, loha": loha("lora_unet_", MODULES),
    "LyCORIS, lokr": lokr("lora_unet_", split, False),
    "LyCORIS, full": full(lambda module: flat("lora_unet_", module), np.float32),
    "LyCORIS, norm": lycoris_norm,
    "LyCORIS, DoRA": lycoris_dora(output_norms),
    "LyCORIS, DoRA along inputs": lycoris_dora(input_norms),
    "LyCORIS, dylora": kohya(np.float32(4), rank=4, prefix="lycoris_", modules=(WIDE, CONV)),
    "LyCORIS, diag-oft": odd_key("oft_blocks", "OFT", 4, 16, 16),
    "LyCORIS, boft": odd_key("oft_blocks", "BOFT", 2, 4, 16, 16),
    "LyCORIS, glora": odd_key("a1.weight", "GLoRA", 3, 64),
    "LyCORIS, ia3": odd_key("on_input", "IA3", 1),
    "Stability": stability,
}
