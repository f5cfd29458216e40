"""The text encoder and the image encoder, trained as CLIP's towers: a caption lies next to its picture.

The text encoder also has to give a head what it needs to paint a blurred picture. That keeps in the token rows which
colour belongs to which shape and where, which telling captions apart alone would not. Only tokens of the captions are
trained; the file's other rows are zero."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.runtime.engines.pytorch.networks.image_encoder import ImageEncoder
from cascadekit.runtime.engines.pytorch.networks.text_encoder import TextEncoder
from cascadekit.runtime.images.pictures import CLIP_MEAN, CLIP_STD
from cascadekit.schemas.stages import TextEncoderConfig

from .autoencoder import to_tensor
from .configs import IMAGE, TEXT
from .dataset import Dataset
from .device import to_array, to_device
from .pictures import sheet
from .trainer import Plan, train
from .words import LENGTH, Words

PLAN = Plan(steps=450, rate=2e-3, warmup=80, average=0.993, decay=0.02, sheet=150)
BATCH, SIDE = 64, 8  # the blurred picture has SIDE x SIDE pixels


class Towers(nn.Module):
    def __init__(self, words: Words) -> None:
        super().__init__()
        self.text = TextEncoder(compact_config(words))
        self.image = ImageEncoder(IMAGE)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.painter = Painter(TEXT.hidden_size)
        for table in (self.text.text_model.embeddings, self.image.vision_model.embeddings):
            nn.init.normal_(table.position_embedding.weight, std=0.1)
        nn.init.normal_(self.text.text_model.embeddings.token_embedding.weight, std=0.3)
        nn.init.normal_(self.image.vision_model.embeddings.class_embedding, std=0.1)


class Painter(nn.Module):
    """Blurred pictures from the text's rows: queries, one for each 2x2 pixels, attend to them."""

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn((SIDE // 2) ** 2, inner) * 0.3)
        self.rows = nn.Linear(width, inner)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(inner, 4, 2 * inner, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.colours = nn.Linear(inner, 12)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, made = self.rows(hidden), self.queries.expand(len(hidden), -1, -1)
        for layer in self.layers:
            made = layer(made, rows)
        side = SIDE // 2
        painted: Tensor = F.pixel_shuffle(self.colours(made).transpose(1, 2).unflatten(2, (side, side)), 2)
        return painted


def compact_config(words: Words) -> TextEncoderConfig:
    return replace(TEXT, vocab_size=len(words.vocabulary), eos_token_id=words.end, max_position_embeddings=LENGTH)


def encode(text: TextEncoder, ids: NDArray[np.int16], words: Words) -> tuple[Tensor, Tensor]:
    """Compact ids (B, LENGTH) to the text's rows (B, LENGTH, c) and the pooled text (B, 1, pooled)."""
    tokens = to_device(ids.astype(np.int64))
    ends = (tokens == words.end).int().argmax(dim=1, keepdim=True)
    mask = (torch.arange(LENGTH)[None] <= ends).long()
    found = text(input_ids=tokens, attention_mask=mask)
    return found["prompt_embeds"], found["pooled"]


def clip_pixels(images: Tensor) -> Tensor:
    """Pictures (B, 3, h, w) in 0..1 as the image encoder takes them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    large = F.interpolate(images, size=(IMAGE.image_size,) * 2, mode="bicubic")
    return (large - mean) / std


def train_towers(folder: Path, data: Dataset, words: Words, steps: int | None) -> None:
    network = Towers(words)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.choice(data.plain, BATCH, replace=False))
        images = to_tensor(data.pictures[rows])
        hidden, pooled = encode(
            network.text, words.captions[rows, rng.integers(words.captions.shape[1], size=BATCH)], words
        )
        seen = network.image(pixel_values=clip_pixels(images))["image_embeds"]
        alike = F.normalize(pooled[:, 0], dim=1) @ F.normalize(seen, dim=1).T * network.scale.exp().clamp(max=60)
        place = torch.arange(BATCH)
        contrast = (F.cross_entropy(alike, place) + F.cross_entropy(alike.T, place)) / 2
        paint = F.mse_loss(network.painter(hidden), F.adaptive_avg_pool2d(images, SIDE))
        right = (alike.argmax(dim=1) == place).float().mean()
        return {"loss": contrast + 20 * paint, "contrast": contrast, "paint": paint, "wrong": 1 - right}

    held = np.arange(12)

    def show(_: nn.Module, path: Path) -> None:
        images = to_tensor(data.pictures[held])
        hidden, _pooled = encode(network.text, words.captions[held, 0], words)
        painted = F.interpolate(network.painter(hidden), size=images.shape[-2:])
        sheet(path, [list(to_array(images)), list(to_array(painted))])

    train(folder, network, PLAN.cut(steps), loss, show)


@torch.no_grad()
def all_image_embeds(network: Towers, data: Dataset, path: Path, batch: int = 64) -> None:
    """The image embedding of every picture, into `path` (n, projection)."""
    made = [
        network.image(pixel_values=clip_pixels(to_tensor(data.pictures[at : at + batch])))["image_embeds"]
        for at in range(0, len(data.pictures), batch)
    ]
    np.save(path, to_array(torch.cat(made)))
