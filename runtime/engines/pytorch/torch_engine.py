"""Runs the networks in PyTorch on the weights of a bundle, on the CPU or on a GPU."""

import torch
from torch import nn

from ....schemas.config_json import from_json
from ....schemas.errors import EngineError
from ....schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH, StageEntry
from ....schemas.precision import Precision
from ....schemas.quantization import Quantization
from ....schemas.stages import Stage, VQGANConfig
from ....storage.bundle import Bundle
from .device import HOST, require_device, torch_errors
from .networks import load_reference, load_vqgan_encoder
from .networks.blocks import AttentionBlock, ResBlock
from .networks.clip import EncoderLayer
from .networks.unet import UNet
from .networks.vqgan import MixingBlock
from .stage_runner import TensorStage
from .tensors import LazyTensors, bundle_tensors

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
REGIONS = (AttentionBlock, EncoderLayer, MixingBlock, ResBlock)  # modules that repeat, and are compiled alike


class PyTorchEngine:
    """An engine for every stage of `bundle` that is not quantised.

    `precision=None` computes each stage in the precision of its graphs. With `compiled`, torch.compile makes kernels of
    the blocks that repeat, which takes minutes for every new size. `threads=None` leaves their number to torch. On a
    GPU, prior and decoder are replayed as CUDA graphs."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = HOST,
        *,
        precision: Precision | None = None,
        compiled: bool = False,
        threads: int | None = None,
    ) -> None:
        """Raises EngineError when torch finds no GPU for the device "cuda"."""
        require_device(device, "torch")
        if threads is not None:
            torch.set_num_threads(threads)
        self.bundle = bundle
        self.device = device
        self.precision = precision
        self.name = f"torch-{'compiled' if compiled else precision}" if compiled or precision else "torch"
        self._compiled = compiled

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(name for name in (MAIN_GRAPH, ENCODER_GRAPH) if name in self.bundle.entry(stage).graphs)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> TensorStage:
        entry = self.bundle.entry(stage)
        if graph not in self.graphs(stage):
            raise EngineError(
                f"{stage}: engine {self.name} has no graph {graph!r}, only {', '.join(self.graphs(stage))}"
            )
        dtype = DTYPES[computed_precision(stage, entry, self.precision)]
        with torch_errors(f"{stage}: torch cannot load it"):
            network = load_network(self.bundle, stage, graph, dtype=dtype, device=self.device)
        if self._compiled:
            _compile_regions(network)
        return TensorStage(stage, entry, graph, compute=network, dtype=dtype, device=self.device)


def computed_precision(stage: Stage, entry: StageEntry, asked: Precision | None) -> Precision:
    """The precision that torch computes a stage in: `asked`, or that of the stage's graphs.

    Raises EngineError for a stage whose graphs do what the networks in PyTorch do not. These are graphs with quantised
    weights, and graphs in fp16 with scaled streams or blocks in fp32."""
    if entry.quantization is not Quantization.NONE:
        raise EngineError(
            f"{stage}: its weights are {entry.quantization}, which torch does not multiply; "
            'set engine="onnxruntime", or export it again without quantize=...'
        )
    precision = asked or entry.precision
    if precision is Precision.FP16 and (any(entry.exponents.values()) or entry.fp32_blocks):
        raise EngineError(
            f"{stage}: its fp16 graphs keep large sums from overflowing, which torch does not; "
            'set engine="torch-bf16", or engine="onnxruntime"'
        )
    return precision


def load_network(bundle: Bundle, stage: Stage, graph: str, *, dtype: torch.dtype, device: str) -> nn.Module:
    """The network of a graph of a stage with the bundle's weights; prior and decoder take the embedded timestep.

    Raises LayoutError when weights are missing, CheckpointError for damaged files."""
    config = from_json(stage, bundle.entry(stage).config)
    tensors = LazyTensors(bundle_tensors(bundle, stage))
    if isinstance(config, VQGANConfig) and graph == ENCODER_GRAPH:
        return load_vqgan_encoder(config, tensors, dtype, device)
    return with_embedded_time(load_reference(config, tensors, dtype, device))


def with_embedded_time(network: nn.Module) -> nn.Module:
    """The same network, which takes ``time`` in place of ``timestep_ratio`` if it has a timestep."""
    if isinstance(network, UNet):
        network.forward = network.predict  # type: ignore[assignment]
    return network


def _compile_regions(network: nn.Module) -> None:
    """Have torch.compile make kernels of the blocks that repeat: one compilation serves all blocks of a width."""
    for part in network.modules():
        if isinstance(part, REGIONS):
            part.compile(dynamic=False)
