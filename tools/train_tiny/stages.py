"""The stages of the training, in the order in which they build on each other."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cascadekit import Cascade, export
from cascadekit.bench.judge.prompts import prompts_of, scenes_to_ask
from cascadekit.bench.quality import generated, judge_cascade
from cascadekit.runtime.engines.pytorch.networks.previewer import Previewer
from cascadekit.runtime.images.contact_sheet import contact_sheet
from cascadekit.schemas.stages import Stage

from .autoencoder import VQGANPair, all_latents, calibrate, to_tensor, train_vqgan
from .compressor import Compressor, all_semantic, train_compressor, train_previewer
from .configs import PREVIEWER
from .control import all_edges, make_controlnet, train_controlnet
from .dataset import Dataset, load_dataset, make_dataset
from .decoder import make_decoder, train_decoder
from .device import to_array, to_device
from .lora import adapt, train_lora
from .pictures import sheet
from .prior import Inputs, Writer, train_prior
from .references import write_references
from .render import Renderer
from .rows import RowsReader, train_rows
from .towers import Towers, all_image_embeds, train_towers
from .trainer import averaged
from .words import Words, load_words, make_words
from .write import text_tensors, vqgan_tensors, write_loras, write_original

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Job:
    runs: Path
    packages: Path
    steps: int | None = None
    share: float = 1.0

    @property
    def folder(self) -> Path:
        """Where the pictures are, and what the trained networks make of them."""
        return self.runs / "data"

    @cached_property
    def data(self) -> Dataset:
        return load_dataset(self.folder)

    @cached_property
    def words(self) -> Words:
        path = self.folder / "words.npz"
        if not path.exists():
            make_words(path, self.data.scenes)
        return load_words(path)

    def cached(self, name: str) -> NDArray[np.float32]:
        """An array that an earlier stage wrote."""
        found: NDArray[np.float32] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return found

    def trained(self, stage: str, network: Network) -> Network:
        averaged(self.runs / stage, network)
        return network

    @cached_property
    def vqgan(self) -> VQGANPair:
        network = self.trained("vqgan", VQGANPair()).to(memory_format=torch.channels_last)
        calibrate(network, self.data)
        return network

    @cached_property
    def compressor(self) -> Compressor:
        network = self.trained("effnet", Compressor())
        norm, saved = network.encoder.mapper[1], self.folder / "whitening.npy"
        if saved.exists():  # `all_semantic` has measured the latents
            mean, variance = to_device(np.load(saved))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        return network

    @cached_property
    def inputs(self) -> Inputs:
        text = self.trained("text", Towers(self.words)).text
        rows = RowsReader(self.words)
        rows.text.load_state_dict(text.state_dict())
        if (self.runs / "rows" / "state.pt").exists():
            self.trained("rows", rows)
        semantic, seen = (np.array(self.cached(name)) for name in ("semantic", "image_embeds"))
        return Inputs(self.words, text, rows.text, semantic, seen, self.data.plain)

    def guess(self, semantic: Tensor) -> NDArray[np.float32]:
        """Pictures of stage C's latents, by the head that was trained with the effnet encoder."""
        raw = semantic  # the head takes the latents as they were while it was trained
        saved = self.folder / "unwhitening.npy"
        if saved.exists():
            mean, deviation = to_device(np.load(saved))
            raw = semantic * deviation[:, None, None] + mean[:, None, None]
        with torch.no_grad():
            return to_array(self.vqgan.images(self.compressor.predict(raw)))


def _data(job: Job) -> None:
    make_dataset(job.folder, job.packages, share=job.share)


def _vqgan(job: Job) -> None:
    train_vqgan(job.runs / "vqgan", job.data, job.steps)
    all_latents(job.vqgan, job.data, job.folder)


def _effnet(job: Job) -> None:
    train_compressor(job.runs / "effnet", job.data, job.cached("latents"), job.vqgan, job.steps)
    all_semantic(job.trained("effnet", Compressor()), job.data, job.folder)


def _previewer(job: Job) -> None:
    train_previewer(job.runs / "previewer", job.data, np.array(job.cached("semantic")), job.steps)


def _text(job: Job) -> None:
    train_towers(job.runs / "text", job.data, job.words, job.steps)
    all_image_embeds(job.trained("text", Towers(job.words)), job.data, job.folder / "image_embeds.npy")


def _rows(job: Job) -> None:
    train_rows(job.runs / "rows", job.inputs, job.steps)


def _prior(job: Job) -> None:
    train_prior(job.runs / "prior", job.inputs, _latents_sheet(job), job.steps)


def _decoder(job: Job) -> None:
    def show(latents: Tensor, rows: NDArray[np.int64], path: Path) -> None:
        guessed = job.guess(to_device(job.inputs.semantic[rows]))
        sheet(
            path,
            [
                list(to_array(to_tensor(job.data.pictures[rows]))),
                list(guessed),
                list(to_array(job.vqgan.images(latents))),
            ],
        )

    latents, scenes = job.cached("latents"), job.data.scenes
    train_decoder(job.runs / "decoder", job.inputs, latents, scenes, show, job.steps)


def _latents_sheet(job: Job) -> Callable[[Tensor, Path], None]:
    """Makes a sheet of stage C's latents below the pictures that were asked for."""

    def decode(semantic: Tensor, path: Path) -> None:
        wanted, made = list(to_array(to_tensor(job.data.pictures[: len(semantic)]))), list(job.guess(semantic))
        sheet(path, [wanted[:8], made[:8], wanted[8:], made[8:]])

    return decode


def _lora(job: Job) -> None:
    writer = job.trained("prior", Writer(job.words))
    train_lora(job.runs / "lora", job.inputs, writer, _latents_sheet(job), job.steps)


def _control(job: Job) -> None:
    path = job.folder / "edges.npy"
    if not path.exists():
        all_edges(job.data, path)
    writer = job.trained("prior", Writer(job.words))
    train_controlnet(job.runs / "control", job.inputs, np.load(path), writer, _latents_sheet(job), job.steps)


def _write(job: Job) -> None:
    towers, writer = job.trained("text", Towers(job.words)), job.trained("prior", Writer(job.words))
    tensors: dict[Stage, Mapping[str, Tensor]] = {
        Stage.TEXT_ENCODER: text_tensors(writer.text, job.words),
        Stage.IMAGE_ENCODER: towers.image.state_dict(),
        Stage.PRIOR: writer.prior.state_dict(),
        Stage.DECODER: job.trained("decoder", make_decoder()).state_dict(),
        Stage.VQGAN: vqgan_tensors(job.vqgan, job.cached("latents")),
        Stage.EFFNET_ENCODER: job.compressor.encoder.state_dict(),
        Stage.PREVIEWER: job.trained("previewer", Previewer(PREVIEWER)).state_dict(),
    }
    if (job.runs / "control" / "state.pt").exists():
        tensors[Stage.CONTROLNET_CANNY] = job.trained("control", make_controlnet()).state_dict()
    write_original(job.runs / "original", tensors)
    if (job.runs / "lora" / "state.pt").exists():
        write_loras(job.runs, job.trained("lora", adapt(writer.prior)))


def _references(job: Job) -> None:
    write_references(Renderer(job.packages))


def _judge(job: Job) -> None:
    """Judge the files through the product; writes counts, what was wrong, and a sheet of each kind."""
    folder, bundle = job.runs / "quality", job.runs / "bundle"
    folder.mkdir(exist_ok=True)
    export(job.runs / "original", bundle, force=True)
    asked = scenes_to_ask(job.steps or 48)
    with Cascade.open(bundle, engine="onnxruntime") as cascade:
        shares = judge_cascade(cascade, asked)
        for kind, scenes in asked.items():
            pictures = [Image.fromarray(picture) for picture in generated(cascade, scenes)]
            contact_sheet(pictures, prompts_of(scenes), columns=8).save(folder / f"{kind.replace(' ', '-')}.png")
    content = json.dumps(shares.to_json(), indent=1)
    (folder / "quality.json").write_text(content)
    print(content)


STAGES: Mapping[str, Callable[[Job], None]] = {
    "data": _data,
    "vqgan": _vqgan,
    "effnet": _effnet,
    "previewer": _previewer,
    "text": _text,
    "rows": _rows,
    "prior": _prior,
    "decoder": _decoder,
    "lora": _lora,
    "control": _control,
    "write": _write,
    "references": _references,
    "judge": _judge,
}
