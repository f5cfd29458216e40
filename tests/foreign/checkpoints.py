"""Checkpoints as other programs write them: one row for each program and way of saving.

The networks are diffusers' and transformers' own, tiny and random, and where a library has a writer it is used. The
rest is written key by key, as the program's code does. The truth of every row is what was put in, by diffusers names.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from cascadekit.schemas.stages import PRESETS, Stage, Variant

Tensors = dict[str, torch.Tensor]
DATA = Path(__file__).parent.parent / "data" / "catalog"

TEXT = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
PICTURE = {"image_size": 28, "patch_size": 14}


@dataclass
class Saved:
    """The files that a program left on disk, and their values: `truth` by stage and diffusers names.

    `said` are patterns that the notes, or the refusal of a row without truth, must have."""

    sources: list[Path]
    truth: dict[Stage, Tensors] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    text_encoder: Path | None = None
    image_encoder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    unreadable: bool = False  # without the encoder that is given


Writer = Callable[[Path], Saved]
ROWS: dict[str, Writer] = {}


def row(name: str) -> Callable[[Writer], Writer]:
    def add(writer: Writer) -> Writer:
        ROWS[name] = writer
        return writer

    return add


# Networks


@cache
def unet(stage: Stage) -> Any:
    torch.manual_seed(len(stage))
    return StableCascadeUNet(**asdict(PRESETS[stage, Variant.TINY])).eval()


@cache
def vqgan() -> Any:
    torch.manual_seed(3)
    network = PaellaVQModel(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=64).eval()
    network.down_blocks[-1][1].num_batches_tracked.fill_(1000)
    return network


@cache
def clip() -> Any:
    """A CLIP model whose text tower fits the tiny prior, and whose image tower fits every prior."""
    torch.manual_seed(4)
    text = {**TEXT, "projection_dim": 12, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text, vision_config={**VISION, **PICTURE, "projection_dim": 768})
    network = CLIPModel(config).eval()
    # CLIPModel projects both towers alike; the tiny cascade does not.
    network.text_projection = torch.nn.Linear(8, 12, bias=False)
    network.visual_projection = torch.nn.Linear(16, 768, bias=False)
    return network


@cache
def text_encoder() -> Any:
    network = CLIPTextModelWithProjection(clip().config.text_config).eval()
    network.load_state_dict(tower("text"))
    return network


def tower(kind: str) -> Tensors:
    begins = ("text_model.", "text_projection") if kind == "text" else ("vision_model.", "visual_projection")
    return {name: tensor for name, tensor in state(clip()).items() if name.startswith(begins)}


def state(network: Any) -> Tensors:
    return {n: t.detach().clone() for n, t in network.state_dict().items() if not n.endswith("position_ids")}


def random_like(catalog: str, seed: int, dtype: torch.dtype = torch.float16) -> Tensors:
    """Tensors of the names and shapes of a released file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = json.loads((DATA / f"{catalog}.json").read_text())["tensors"]
    return {
        name: torch.randn(spec["shape"], generator=generator).to(dtype)
        if spec["dtype"] != "I64"
        else torch.tensor(int(1000 + seed))
        for name, spec in tensors.items()
    }


def prior() -> Tensors:
    return state(unet(Stage.PRIOR))


# Spellings


def split(tensors: Tensors) -> Tensors:
    """ComfyUI's and kohya's names: attention's q, k and v apart."""
    rename = {".attention.to_out.0.": ".attention.attn.out_proj.", ".attention.to_": ".attention.attn.to_"}
    out = {}
    for name, tensor in tensors.items():
        for old, new in rename.items():
            name = name.replace(old, new)
        out[name.replace("vquantizer.embedding", "vquantizer.codebook")] = tensor
    if "effnet_mapper.0.weight" in out:
        out = {name.replace("clip_txt_pooled_mapper", "clip_mapper"): tensor for name, tensor in out.items()}
    return out


def joined(tensors: Tensors) -> Tensors:
    """Stability's names: q, k and v as the rows of one matrix."""
    apart, out = split(tensors), {}
    for name, tensor in apart.items():
        if match := re.fullmatch(r"(.*\.attn\.)to_([qkv])\.(weight|bias)", name):
            if match[2] == "q":
                parts = [apart[f"{match[1]}to_{letter}.{match[3]}"] for letter in "qkv"]
                out[f"{match[1]}in_proj_{match[3]}"] = torch.cat(parts)
        else:
            out[name] = tensor
    return out


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def pickled(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def pipeline_index(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableCascadePriorPipeline"}))


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


# diffusers

SAVES: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "bin": {"safe_serialization": False},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "500KB"},
    "shards of a variant": {"max_shard_size": "500KB", "variant": "bf16"},
    "bin shards": {"max_shard_size": "500KB", "safe_serialization": False},
    "bin of a variant": {"variant": "fp16", "safe_serialization": False},
}


def diffusers_row(options: dict[str, Any]) -> Writer:
    def writer(folder: Path) -> Saved:
        pipeline_index(folder)
        unet(Stage.PRIOR).save_pretrained(folder / "prior", **options)
        unet(Stage.DECODER).save_pretrained(folder / "decoder", **options)
        vqgan().save_pretrained(folder / "vqgan", **options)
        truth = {Stage.PRIOR: prior(), Stage.DECODER: state(unet(Stage.DECODER)), Stage.VQGAN: state(vqgan())}
        return Saved([folder], truth)

    return writer


for _name, _options in SAVES.items():
    row(f"diffusers: {_name}")(diffusers_row(_options))


@row("diffusers: one component's folder")
def _component(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder, max_shard_size="500KB")
    return Saved([folder], {Stage.PRIOR: prior()})


@row("diffusers: an index given by itself")
def _index(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder, max_shard_size="500KB")
    return Saved([next(folder.glob("*.index.json"))], {Stage.PRIOR: prior()})


@row("diffusers: shards without their index")
def _no_index(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior", max_shard_size="500KB")
    next((folder / "prior").glob("*.index.json")).unlink()
    return Saved([folder], {Stage.PRIOR: prior()})


@row("diffusers: a shard and the index are missing")
def _missing_shard(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior", max_shard_size="500KB")
    next((folder / "prior").glob("*.index.json")).unlink()
    next((folder / "prior").glob("*-00002-of-*")).unlink()
    return Saved([folder], said=(r"shard 2 of \d+ is missing",))


@row("diffusers: the older spelling of a variant's index")
def _older_index(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior", max_shard_size="500KB", variant="bf16")
    index = next((folder / "prior").glob("*.json*index*.json"), None) or next((folder / "prior").glob("*.index.*"))
    index.rename(folder / "prior" / "diffusion_pytorch_model.bf16.safetensors.index.json")
    return Saved([folder], {Stage.PRIOR: prior()})


@row("diffusers: one file and shards of another save")
def _both(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior", max_shard_size="500KB")
    write(folder / "prior/diffusion_pytorch_model.safetensors", below("", prior()))
    return Saved([folder], {Stage.PRIOR: prior()}, (r"left out .*-of-.*diffusion_pytorch_model.safetensors was taken",))


@row("diffusers: a variant that one component lacks")
def _mixture(folder: Path) -> Saved:
    pipeline_index(folder)
    unet(Stage.PRIOR).save_pretrained(folder / "prior")
    half = cast(prior(), torch.bfloat16)
    write(folder / "prior/diffusion_pytorch_model.bf16.safetensors", half)
    text_encoder().save_pretrained(folder / "text_encoder")
    said = (r"text_encoder: has no weights of variant bf16; model\.safetensors is taken", r"left out diffusion_py")
    return Saved([folder], {Stage.PRIOR: half, Stage.TEXT_ENCODER: tower("text")}, said, options={"variant": "bf16"})


@row("diffusers: a variant that no component has")
def _no_variant(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior")
    return Saved([folder], said=("no weights of variant bf16",), options={"variant": "bf16"})


@row("the official repository, cloned")
def _clone(folder: Path) -> Saved:
    pipeline_index(folder)
    unet(Stage.DECODER).save_pretrained(folder / "decoder")
    unet(Stage.DECODER).save_pretrained(folder / "decoder_lite")
    write(folder / "stage_a.safetensors", split(state(vqgan())))
    write(folder / "stage_b.safetensors", joined(state(unet(Stage.DECODER))))
    write(folder / "stage_c.safetensors", joined(prior()))
    write(folder / "stage_c_bf16.safetensors", joined(cast(prior(), torch.bfloat16)))
    write(folder / "comfyui_checkpoints/stable_cascade_stage_b.safetensors", {"x": torch.zeros(1)})
    truth = {Stage.DECODER: state(unet(Stage.DECODER)), Stage.VQGAN: state(vqgan()), Stage.PRIOR: prior()}
    said = (
        r"stage_b\.safetensors: its decoder .*component's folder is taken",
        r"stage_c_bf16\.safetensors: its prior .*stage_c\.safetensors is taken",
        r"decoder_lite: left out, decoder is taken \(lite=True takes the other size\)",
        r"comfyui_checkpoints: left out.*stable_cascade_stage_b",
    )
    return Saved([folder], truth, said)


# transformers


@row("transformers: a text encoder")
def _text(folder: Path) -> Saved:
    text_encoder().save_pretrained(folder / "clip")
    stage_c = write(folder / "stage_c.safetensors", joined(prior()))
    return Saved([stage_c], {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}, text_encoder=folder / "clip")


def whole_clip_row(save: Callable[[Path], Path]) -> Writer:
    def writer(folder: Path) -> Saved:
        given = save(folder / "clip")
        stage_c = write(folder / "stage_c.safetensors", joined(prior()))
        truth = {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text"), Stage.IMAGE_ENCODER: tower("image")}
        said = (r"its image_encoder \(\d+ tensors\) is left out", r"its text_encoder \(\d+ tensors\) is left out")
        return Saved([stage_c], truth, said, text_encoder=given, image_encoder=given)

    return writer


def saved_clip(folder: Path, **options: Any) -> Path:
    clip().save_pretrained(folder, **options)
    return folder


def clip_bin(folder: Path) -> Path:
    """The pickle of 2022, with the constants that were saved then, beside files for other frameworks."""
    saved_clip(folder)
    (folder / "model.safetensors").unlink()
    ids = {f"{kind}_model.embeddings.position_ids": torch.arange(n)[None] for kind, n in (("text", 77), ("vision", 5))}
    pickled(folder / "pytorch_model.bin", {**state(clip()), **ids})
    (folder / "tf_model.h5").write_bytes(b"\x89HDF")
    return folder


def older_clip(folder: Path) -> Path:
    """A config.json that states the towers a second time; what that one leaves out are the library's defaults."""
    saved_clip(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for kind in ("text", "vision"):
        config[f"{kind}_config_dict"] = config[f"{kind}_config"]
        config[f"{kind}_config"] = {"hidden_size": 99, "num_hidden_layers": 3}
    path.write_text(json.dumps(config))
    return folder


row("transformers: a whole CLIP")(whole_clip_row(saved_clip))
row("transformers: a whole CLIP in shards")(whole_clip_row(lambda folder: saved_clip(folder, max_shard_size="500KB")))
row("transformers: a whole CLIP, pickled")(whole_clip_row(clip_bin))
row("transformers: a whole CLIP with the config of 2022")(whole_clip_row(older_clip))


@row("transformers: a whole CLIP in the place of the text encoder")
def _clip_in_place(folder: Path) -> Saved:
    saved_clip(folder / "text_encoder")
    unet(Stage.PRIOR).save_pretrained(folder / "prior")
    said = (r"its image_encoder .*is left out",)
    return Saved([folder], {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}, said)


@row("transformers: a whole CLIP as one file without a config")
def _clip_file(folder: Path) -> Saved:
    saved_clip(folder / "clip")
    stage_c = write(folder / "stage_c.safetensors", joined(prior()))
    said = (r"its image_encoder .*is left out",)
    truth = {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}
    return Saved([stage_c], truth, said, text_encoder=folder / "clip" / "model.safetensors")


@row("transformers: the text tower of another CLIP")
def _misfit(folder: Path) -> Saved:
    text = {**TEXT, "hidden_size": 768, "num_attention_heads": 12, "projection_dim": 768}
    config = CLIPConfig(text_config=text, vision_config={**VISION, **PICTURE}, projection_dim=768)
    CLIPModel(config).save_pretrained(folder / "clip")
    stage_c = write(folder / "stage_c.safetensors", joined(prior()))
    said = (r"text tower of CLIP ViT-L/14, 768 wide.*expected a hidden width of 8, found 768.*CLIP-ViT-bigG-14",)
    return Saved([stage_c], said=said, text_encoder=folder / "clip")


@row("open_clip: a whole CLIP")
def _open_clip(folder: Path) -> Saved:
    names = ("transformer.resblocks.0.ln_1.weight", "visual.transformer.resblocks.0.ln_1.weight", "token_embedding")
    path = write(folder / "open_clip_model.safetensors", {name: torch.zeros(2) for name in names})
    stage_c = write(folder / "stage_c.safetensors", joined(prior()))
    return Saved([stage_c], said=(r"open_clip's spelling.*laion/CLIP-ViT-bigG-14",), text_encoder=path)


# ComfyUI: comfy_extras/nodes_model_merging.py and comfy/sd.py, prefixes of comfy/supported_models.py

METADATA = {"prompt": "{}", "workflow": "{}", "modelspec.sai_model_spec": "1.0.0", "modelspec.predict_key": "epsilon"}


def comfyui_clip() -> Tensors:
    return {"logit_scale": torch.tensor(4.6055), **below("transformer.", tower("text"))}


def stage_c_vae() -> tuple[Tensors, Tensors, Tensors]:
    """ComfyUI's coder of stage C, and the two networks in it."""
    effnet, previewer = random_like("original_effnet_encoder", 1), random_like("original_previewer", 2)
    constants = {"encoder.mean": torch.ones(3), "encoder.std": torch.ones(3)}
    return {**below("previewer.", previewer), **below("encoder.", effnet), **constants}, effnet, previewer


@row("ComfyUI: CheckpointSave of stage C")
def _checkpoint_c(folder: Path) -> Saved:
    vae, effnet, previewer = stage_c_vae()
    unets = below("model.diffusion_model.", split(prior()))
    everything = {**unets, **below("text_encoder.clip_g.", comfyui_clip()), **below("vae.", vae)}
    truth = {
        Stage.PRIOR: prior(),
        Stage.TEXT_ENCODER: tower("text"),
        Stage.EFFNET_ENCODER: effnet,
        Stage.PREVIEWER: previewer,
    }
    path = write(folder / "ComfyUI_00001_.safetensors", everything, METADATA)
    return Saved([path], truth, ("logit_scale, which no layout needs",))


@row("ComfyUI: CheckpointSave of stage B")
def _checkpoint_b(folder: Path) -> Saved:
    unets = below("model.diffusion_model.", split(state(unet(Stage.DECODER))))
    everything = {**unets, **below("text_encoder.clip_g.", comfyui_clip()), **below("vae.", split(state(vqgan())))}
    truth = {Stage.DECODER: state(unet(Stage.DECODER)), Stage.TEXT_ENCODER: tower("text"), Stage.VQGAN: state(vqgan())}
    return Saved([write(folder / "ComfyUI_00001_.safetensors", everything, METADATA)], truth)


@row("ComfyUI: CheckpointSave with the encoder of another model")
def _checkpoint_other_clip(folder: Path) -> Saved:
    other = {
        "transformer.text_model.embeddings.token_embedding.weight": torch.zeros(9, 24),
        "logit_scale": torch.ones(()),
    }
    unets = below("model.diffusion_model.", split(prior()))
    path = write(folder / "x.safetensors", {**unets, **below("text_encoder.clip_g.", other)}, METADATA)
    text_encoder().save_pretrained(folder / "clip")
    truth = {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}
    said = (r"its text_encoder .*for the one given",)
    return Saved([path], truth, said, text_encoder=folder / "clip", unreadable=True)


@row("ComfyUI: ModelSave")
def _model_save(folder: Path) -> Saved:
    return Saved(
        [write(folder / "m.safetensors", below("model.diffusion_model.", split(prior())), METADATA)],
        {Stage.PRIOR: prior()},
    )


@row("ComfyUI: CLIPSave")
def _clip_save(folder: Path) -> Saved:
    saved = {name.removeprefix("transformer."): tensor for name, tensor in comfyui_clip().items()}
    path = write(folder / "ComfyUI_clip_g_00001_.safetensors", saved, METADATA)
    stage_c = write(folder / "stage_c.safetensors", joined(prior()))
    return Saved([stage_c], {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}, ("logit_scale",), path)


@row("ComfyUI: CLIPSave of 2024, its projection transposed")
def _older_clip_save(folder: Path) -> Saved:
    saved = tower("text")
    saved["text_projection"] = saved.pop("text_projection.weight").T.contiguous()
    path = write(folder / "clip_g.safetensors", {**saved, "logit_scale": torch.tensor(4.6)}, METADATA)
    return Saved([path], {Stage.TEXT_ENCODER: tower("text")})


@row("ComfyUI: VAESave of stage A")
def _vae_a(folder: Path) -> Saved:
    return Saved([write(folder / "vae.safetensors", split(state(vqgan())), METADATA)], {Stage.VQGAN: state(vqgan())})


@row("ComfyUI: VAESave of stage C")
def _vae_c(folder: Path) -> Saved:
    vae, effnet, previewer = stage_c_vae()
    path = write(folder / "vae.safetensors", vae, METADATA)
    truth = {Stage.EFFNET_ENCODER: effnet, Stage.PREVIEWER: previewer}
    return Saved([path], truth, (r"encoder\.mean.*which no layout needs",))


# Trainers


@row("Stability's trainer: a folder of a run")
def _stability(folder: Path) -> Saved:
    averaged = {name: tensor + 1 for name, tensor in prior().items()}
    write(folder / "generator.safetensors", joined(prior()))
    write(folder / "generator_ema.safetensors", joined(averaged))
    pickled(folder / "generator_optim.pt", {"state": {0: {"exp_avg": torch.zeros(3)}}})
    said = (r"generator_ema\.safetensors: its prior .*ema choose", r"generator_optim\.pt: left out, training state")
    return Saved([folder], {Stage.PRIOR: prior()}, said)


@row("Stability's trainer: the averaged weights of a run")
def _stability_ema(folder: Path) -> Saved:
    _stability(folder)
    truth = {Stage.PRIOR: {name: tensor + 1 for name, tensor in prior().items()}}
    return Saved([folder], truth, (r"generator\.safetensors: its prior .*left out",), options={"ema": True})


@row("Stability's trainer: both in one pickle")
def _stability_pickle(folder: Path) -> Saved:
    content = {"generator": joined(prior()), "generator_ema": joined(prior()), "step": 5}
    return Saved([pickled(folder / "run.pt", content)], {Stage.PRIOR: prior()}, ("holds the prior twice",))


@row("kohya: stage C and its text model in bf16")
def _kohya(folder: Path) -> Saved:
    half = cast(prior(), torch.bfloat16)
    text = cast(tower("text"), torch.bfloat16)
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None].to(torch.bfloat16)}  # cast like the rest
    metadata = {"modelspec.architecture": "stable-cascade", "modelspec.title": "tuned"}
    path = write(folder / "tuned.safetensors", joined(half), metadata)
    write(folder / "tuned_text_model.safetensors", {**text, **ids})
    return Saved([path], {Stage.PRIOR: half, Stage.TEXT_ENCODER: text}, ("position_ids",))


@row("OneTrainer: safetensors")
def _onetrainer(folder: Path) -> Saved:
    write(folder / "stage_c.safetensors", joined(prior()), {"ot_branch": "master"})
    write(folder / "text_encoder.safetensors", tower("text"))
    return Saved([folder], {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")})


@row("OneTrainer: a backup")
def _onetrainer_backup(folder: Path) -> Saved:
    pipeline_index(folder)
    unet(Stage.PRIOR).save_pretrained(folder / "prior")
    text_encoder().save_pretrained(folder / "text_encoder")
    pickled(folder / "optimizer/optimizer.pt", {"state": {}})
    pickled(folder / "ema/ema.pt", {"w": torch.zeros(1)})
    (folder / "meta.json").write_text("{}")
    said = (r"optimizer: left out.*optimizer\.pt", r"ema: left out.*ema\.pt")
    return Saved([folder], {Stage.PRIOR: prior(), Stage.TEXT_ENCODER: tower("text")}, said)


@row("SimpleTuner and accelerate: a checkpoint's folder")
def _simpletuner(folder: Path) -> Saved:
    unet(Stage.PRIOR).save_pretrained(folder / "prior")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        pickled(folder / name, {"state": {}})
    said = (r"optimizer\.bin: left out, training state", r"random_states_0\.pkl: left out, training state")
    return Saved([folder], {Stage.PRIOR: prior()}, said)


def wrapped(network: Any, kind: str) -> Tensors:
    """The names of a wrapper of torch, as it gives them."""
    match kind:
        case "torch.compile":
            return state(torch.compile(network))
        case "DataParallel":
            return state(torch.nn.DataParallel(network))
        case _:
            return state(torch.nn.DataParallel(torch.compile(network)))


def wrapper_row(kind: str, prefix: str = "") -> Writer:
    def writer(folder: Path) -> Saved:
        tensors = below(prefix, wrapped(unet(Stage.PRIOR), kind))
        said = (r"read without what a wrapper added to its names",)
        return Saved([write(folder / "x.safetensors", tensors)], {Stage.PRIOR: prior()}, said)

    return writer


row("torch.compile")(wrapper_row("torch.compile"))
row("DataParallel")(wrapper_row("DataParallel"))
row("DataParallel of torch.compile in a generator")(wrapper_row("both", "generator."))


@row("torch.compile of some inner modules")
def _compiled_inside(folder: Path) -> Saved:
    tensors = {name.replace("down_blocks.0.", "down_blocks.0._orig_mod."): t for name, t in prior().items()}
    return Saved([write(folder / "x.safetensors", tensors)], {Stage.PRIOR: prior()}, ("wrapper added",))


@row("Lightning: a checkpoint")
def _lightning(folder: Path) -> Saved:
    optimizer = {"state": {"0": {"exp_avg": torch.zeros(3)}}}
    content = {"state_dict": below("model.", joined(prior())), "optimizer_states": {"0": optimizer}, "epoch": 3}
    said = (r"left out \d+ tensors of training state",)
    return Saved([pickled(folder / "epoch=3.ckpt", content)], {Stage.PRIOR: prior()}, said)


@row("a dictionary of networks, pickled")
def _dictionary(folder: Path) -> Saved:
    content = {"prior": prior(), "vqgan": state(vqgan())}
    return Saved([pickled(folder / "all.pt", content)], {Stage.PRIOR: prior(), Stage.VQGAN: state(vqgan())})


# What is no checkpoint of the cascade, alone and beside one

FOREIGN: dict[str, tuple[tuple[str, ...], str]] = {
    "kohya LoRA": (("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"), r"a LoRA \(see `cascadekit lora`\)"),
    "PEFT LoRA": (("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"), "a LoRA"),
    "LyCORIS": (("lycoris_a.lokr_w1", "lycoris_a.lokr_w2"), "a LoRA"),
    "Stability LoRA": (("weights.0.lora_down", "weights.0.lora_up"), "a LoRA"),
    "textual inversion": (("clip_g", "clip_g_out"), "a textual inversion embedding"),
    "optimizer": (("state.0.exp_avg", "state.0.exp_avg_sq"), "training state"),
    "SDXL": (("conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"), "SDXL"),
    "Flux": (("double_blocks.0.img_attn.qkv.weight",), "a Flux transformer"),
    "SD VAE": (("encoder.conv_in.weight", "decoder.conv_in.weight"), "a Stable Diffusion VAE"),
    "T5": (("encoder.block.0.layer.0.SelfAttention.k.weight", "shared.weight"), "a T5 text encoder"),
}


def foreign_rows(names: tuple[str, ...], what: str) -> Iterator[Writer]:
    tensors = {name: torch.zeros(2, 2) for name in names}

    def alone(folder: Path) -> Saved:
        return Saved([write(folder / "x.safetensors", tensors)], said=(f"not a Stable Cascade component.*{what}",))

    def beside(folder: Path) -> Saved:
        write(folder / "stage_c.safetensors", joined(prior()))
        write(folder / "x.safetensors", tensors)
        return Saved([folder], {Stage.PRIOR: prior()}, (rf"left out: .*x\.safetensors.*{what}",))

    yield from (alone, beside)


for _name, (_names, _what) in FOREIGN.items():
    for _place, _writer in zip(("alone", "beside stage C"), foreign_rows(_names, _what), strict=True):
        row(f"{_name}, {_place}")(_writer)
