"""Compiles one package in a process of its own; answers as the worker of TensorRT's plans does."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ...runtime.memory.free_memory import byte_fields
from ...schemas.config_json import from_json
from ...schemas.manifest import ENCODER_GRAPH
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...schemas.tensors import is_counter
from ..tensorrt.worker import BuildFailed, SendAnswer, serve
from .package_request import PackageRequest

SUFFIX = ".pt2"  # which torch insists on
SETTINGS: Mapping[str, Any] = {
    "aot_inductor.package_constants_in_so": False,  # weights come from the bundle when the package is loaded
    "cpp.dynamic_threads": True,  # a package built with two threads runs with any number
    "fx_graph_cache": False,  # nothing is taken from earlier builds but what our own cache of plans has
}
HEADERS = "aot_inductor.precompile_headers"


def main() -> None:
    """Read a request from standard input, build its package, and answer on standard output."""
    serve(lambda line, answer: build(PackageRequest.from_line(line), answer))


def build(request: PackageRequest, answer: SendAnswer) -> dict[str, Any]:
    """Build the package of `request` at its output, which must not exist. Returns the fields of a `BuildOutcome`.

    Raises BuildFailed, or any exception of torch's compiler."""
    started = perf_counter()
    output = Path(request.output)
    # The default is a folder in /tmp whose name everybody knows.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(output.parent / "inductor")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers that would outlive this process
    import torch

    answer(phase="tracing the network")
    with torch.no_grad():
        program = trace(request)
        answer(phase="compiling")
        _keep_small_weights_out()
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(output.with_suffix(SUFFIX)), inductor_configs=_settings()
        )
    _require_all_weights(torch._inductor.aoti_load_package(made).get_constant_fqns(), request)
    Path(made).rename(output)
    content = output.read_bytes()
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "version": str(torch.__version__),
        "seconds": perf_counter() - started,
        "cpu_seconds": sum(os.times()[:4]),
        "layers": len(program.graph.nodes),
        "peak_rss": byte_fields(Path("/proc/self/status")).get("VmHWM", 0),
    }


def trace(request: PackageRequest) -> Any:
    """The network of `request` as torch.export sees it. Its weights have no values, and take no memory."""
    import torch

    network = _network(request, request.runs_on)
    shapes = request.profiles[0]
    examples, dynamic = {}, {}
    for port, dims in request.dims.items():
        low, likely, high = (shapes[port][end] for end in ("min", "opt", "max"))
        sizes = [_example(least, each, most) for least, each, most in zip(low, likely, high, strict=True)]
        name, sizes = ("time", [sizes[0], _time_width(request)]) if port == "timestep_ratio" else (port, sizes)
        examples[name] = _zeros(request, port, sizes)
        dynamic[name] = {
            axis: _dim(dim, low[axis], high[axis], request.steps)
            for axis, dim in enumerate(dims)
            if isinstance(dim, str) and low[axis] != high[axis]
        }
    return torch.export.export(network, (), examples, dynamic_shapes=dynamic, strict=False)


def _network(request: PackageRequest, device: str) -> Any:
    import torch

    from ...runtime.engines.pytorch.networks import build_reference
    from ...runtime.engines.pytorch.networks.vqgan import VQGANEncoder
    from ...runtime.engines.pytorch.torch_engine import DTYPES, with_embedded_time

    config: Any = from_json(Stage(request.stage), dict(request.config))
    with torch.device("meta"):
        network = VQGANEncoder(config) if request.name == ENCODER_GRAPH else build_reference(config)
    network = network.to(DTYPES[Precision(request.precision)]).to_empty(device=device)
    return with_embedded_time(network.requires_grad_(False).eval())


def _time_width(request: PackageRequest) -> int:
    config: Any = from_json(Stage(request.stage), dict(request.config))
    return int(config.timestep_ratio_embedding_dim * (1 + len(config.timestep_conditioning_type)))


def _example(least: int, likely: int, most: int) -> int:
    """The size to trace with. torch.export takes a dim of 1 for a constant, so a dim that varies is traced with 2."""
    return likely if least == most else max(likely, 2)


def _zeros(request: PackageRequest, port: str, sizes: list[int]) -> Any:
    import torch

    from ...runtime.engines.pytorch.torch_engine import DTYPES

    ids = port in ("input_ids", "attention_mask")
    dtype = torch.int64 if ids else DTYPES[Precision(request.precision)]
    return torch.zeros(sizes, dtype=dtype, device=request.runs_on)


def _dim(name: str, least: int, most: int, steps: Mapping[str, int]) -> Any:
    """The range of a dim: all multiples of its step from `least` to `most`. Equal names are one dim to torch."""
    from torch.export import Dim

    step = steps.get(name, 1)
    dim: Any = Dim(f"n_{name}", min=-(-least // step), max=most // step)
    return dim if step == 1 else step * dim


def _settings() -> dict[str, Any]:
    """SETTINGS without precompiled headers, where this torch has the option. To compile the headers takes longer than
    one package saves by them, and they would lie in a folder in /tmp whose name everybody knows."""
    import torch

    return {**SETTINGS, **({HEADERS: False} if HEADERS in torch._inductor.list_options() else {})}


def _keep_small_weights_out() -> None:
    """Inductor writes the values of vectors of up to 8 numbers into the code. Here they are weights without values."""
    from torch._inductor.graph import GraphLowering

    lowering: Any = GraphLowering
    lowering.can_inline_constant = staticmethod(lambda tensor: False)


def _require_all_weights(found: Iterable[str], request: PackageRequest) -> None:
    """A weight that is not among those `found` in the package is in its code, without a value.

    A constant that is no weight would have no value when the package is loaded."""
    expected = {name for name in _network(request, device="meta").state_dict() if not is_counter(name)}
    odd = sorted(expected.symmetric_difference(found))
    if odd:
        raise BuildFailed(f"this torch does not keep the weights of the {request.stage} apart: {', '.join(odd[:5])}")
