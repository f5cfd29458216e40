"""Stage C as a graph: text, pooled text and image embeddings condition the pyramid."""

import onnx

from ...schemas.errors import ExportError
from ...schemas.stages import UNetConfig
from .builder import Graph
from .unet import Pyramid, check_supported, classify, conditions, embed, pooled_tokens


def write_prior(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The prior: any latent size, number of text tokens and number of image embeddings.

    Raises ExportError for a config without text or image conditioning, and for missing weights."""
    check_supported(config)
    if config.clip_text_in_channels is None or config.clip_image_in_channels is None:
        raise ExportError("prior: its config must have clip_text_in_channels and clip_image_in_channels")
    tokens = graph.node(
        "Concat",
        "clip_tokens",
        _tokens(graph, config, "clip_txt_mapper", "clip_text", config.clip_text_in_channels),
        pooled_tokens(graph, config),
        _tokens(graph, config, "clip_img_mapper", "clip_img", config.clip_image_in_channels),
        axis=1,
    )
    pyramid = Pyramid(graph, config, conditions(graph, config, "timestep_ratio", tokens))
    classify(graph, config, pyramid.write(embed(graph, config, "sample")), "noise_pred")
    return graph.model("prior", "Stable Cascade stage C (prior): latents and conditioning to predicted noise")


def _tokens(graph: Graph, config: UNetConfig, mapper: str, embeddings: str, channels: int) -> str:
    """(B, n, channels) -> (B, n*k, conditioning_dim); the image mapper gives k = clip_seq tokens for one embedding."""
    mapped = graph.linear(mapper, graph.rows(embeddings, channels))
    return graph.node("Reshape", f"{mapper}/tokens", mapped, graph.shape(graph.batch, -1, config.conditioning_dim))
