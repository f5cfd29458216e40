"""The sound files that are made odd: those of the tiny cascade, and what is made from them once for each process."""

import io
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from cascadekit import convert, export
from cascadekit.converters.checkpoints.tiny_cascade import write_tiny_cascade
from cascadekit.schemas.lora_keys import lora_modules
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage.gguf_file import read_gguf

from .mutate import split_safetensors

PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "use_rslora": False}


def write_cascade(root: Path) -> None:
    """original/, model/ and bundle/, as the tests' own fixture has them."""
    write_tiny_cascade(root / "original")
    convert([root / "original"], root / "model", "diffusers")
    export(root / "model", root / "bundle", weights="copy")


class Corpus:
    """Reads original/, model/ and bundle/ in `root`; `scratch` is for what is made from them."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch

    @cached_property
    def weights(self) -> list[tuple[dict[str, Any], bytes]]:
        """Headers and data of files of weights, from a few tensors to hundreds."""
        names = ("stage_a", "stage_b", "stage_c", "text_encoder/model")
        return [split_safetensors((self.root / "original" / f"{name}.safetensors").read_bytes()) for name in names]

    @cached_property
    def sharded(self) -> Path:
        convert([self.root / "original"], self.scratch / "sharded", "diffusers", shard_size=600_000)
        return self.scratch / "sharded"

    @cached_property
    def bundle(self) -> Path:
        """A bundle of two stages, which are checked in half the time: the same faults are found in all."""
        stages = (Stage.VQGAN, Stage.TEXT_ENCODER)
        export(self.root / "model", self.scratch / "bundle", stages=stages, weights="copy")
        return self.scratch / "bundle"

    @cached_property
    def lora(self) -> tuple[dict[str, Any], bytes]:
        """A PEFT LoRA of a few of the tiny prior's modules."""
        modules = dict(list(lora_modules(PRESETS[Stage.PRIOR, Variant.TINY]).items())[::7])
        tensors = {}
        for name, shape in modules.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((2, *shape[1:]), np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones(
                (shape[0], 2, *[1] * (len(shape) - 2)), np.float32
            )
        return split_safetensors(save(tensors))

    @cached_property
    def pickled(self) -> bytes:
        import torch

        content = {
            "state_dict": {"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(4).half()},
            "step": 7,
            "x": [1, {}],
        }
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    @cached_property
    def gguf(self) -> list[tuple[bytes, int]]:
        """GGUF files of the prior, and where their headers end: as floats, and in blocks of two types."""
        files = []
        for quantize in (None, "q8_0", "q4_k"):
            path = self.scratch / f"{quantize}.gguf"
            convert(self.root / "original" / "stage_c.safetensors", path, "gguf", quantize=quantize)
            files.append((path.read_bytes(), min(tensor.offset for tensor in read_gguf(path).tensors.values())))
        return files

    @cached_property
    def quantised(self) -> list[Path]:
        """Folders of the prior with weights by each program, and how they are described."""
        from helpers.quantised import folder  # imports torch

        names = ("torchao_int8", "bitsandbytes_nf4_nested", "bitsandbytes_int8", "sdnq_uint4", "sdnq_mixed")
        for name in names:
            folder(name, self.scratch / name)
        comfyui = self.scratch / "comfyui"
        convert(self.root / "original" / "stage_c.safetensors", comfyui, "split", quantize="nvfp4")
        (comfyui / "stage_c.safetensors").rename(comfyui / "diffusion_pytorch_model.safetensors")
        return [comfyui, *(self.scratch / name for name in names)]

    @cached_property
    def tokenizer(self) -> tuple[Any, dict[str, str]]:
        """A tokenizer.json with marks in place of its long lists, and the texts of these."""
        document = read_json(self.root / "model" / "tokenizer" / "tokenizer.json")
        lists = {name: document["model"].pop(name) for name in ("vocab", "merges")}
        document["model"] |= {name: f"<{name}>" for name in lists}
        return document, {json.dumps(f"<{name}>"): json.dumps(values) for name, values in lists.items()}

    @cached_property
    def picture(self) -> Image.Image:
        return Image.new("RGB", (16, 16), "navy")


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are the same ones: to be replaced, and never written to."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
