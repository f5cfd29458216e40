"""Everything the TensorRT engines call is there in the real bindings: CUDA's, TensorRT-RTX's, TensorRT 10's and 11's.

No GPU, and of plain TensorRT no library: its bindings import over empty shared objects.
"""

import ast
import mmap
from pathlib import Path

import numpy as np
import pytest

from cascadekit.runtime.engines.tensorrt import cuda, execution, plan_ports
from cascadekit.runtime.engines.tensorrt import host as nvidia
from cascadekit.runtime.engines.tensorrt.cuda import Cuda
from cascadekit.schemas.errors import EngineError
from helpers.tensorrt_bindings_of import BINDINGS, look, missing

# The objects of TensorRT that are kept in variables or attributes of these names, and their classes.
CLASSES = {
    "trt": "",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "_runtime_cache": "IRuntimeCache",
}
# What TensorRT-RTX alone has, and is asked for with hasattr before it is used.
OF_RTX = {
    "CudaGraphStrategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
MEMBERS = ("CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE")


def used() -> set[str]:
    """Dotted names of what the engines use of TensorRT, read from their source."""
    names = set(MEMBERS)
    for module in (execution, nvidia, plan_ports):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in CLASSES and not node.attr.startswith("__"):
                names.add(".".join(part for part in (CLASSES[name], node.attr) if part))
    return names


def test_names_are_found_in_the_source() -> None:
    names = used()
    assert {"ILogger", "ICudaEngine.get_tensor_dtype", "IExecutionContext.execute_async_v3"} <= names
    assert names >= OF_RTX
    assert len(names) > 25


def test_tensorrt_rtx_has_it_all() -> None:
    import tensorrt_rtx

    assert missing(tensorrt_rtx, used()) == set()
    assert plan_ports.HOST_TYPES.keys() <= set(tensorrt_rtx.DataType.__members__)


def test_tensorrt_rtx_takes_a_mapped_file(tmp_path: Path) -> None:
    """Without a driver there are no engines; but the argument is accepted, and what it says reaches our logger."""
    import tensorrt_rtx

    path = tmp_path / "junk.plan"
    path.write_bytes(b"junk" * 100)
    host = nvidia.Host("tensorrt-rtx", tensorrt_rtx, None, None)  # type: ignore[arg-type]
    runtime = nvidia.make_runtime(host)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert runtime.deserialize_cuda_engine(content) is None
    assert host.messages
    with pytest.raises(EngineError, match=r"junk.plan: tensorrt-rtx cannot load it: \S"):
        execution._deserialize(host, runtime, path)


def test_cuda_takes_what_it_is_given() -> None:
    """Every call reaches CUDA, which has no driver here and says so; a wrong argument would be a TypeError."""
    from cuda.bindings import runtime

    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"no NVIDIA GPU can be used here: there is no NVIDIA driver$"):
        Cuda()
    there = object.__new__(Cuda)
    there._runtime = runtime
    array = np.zeros(4, np.float32)
    calls = {
        "device": (),
        "free_memory": (),
        "malloc": (16,),
        "free": (4096,),
        "upload": (4096, array, 1),
        "download": (array, 4096, 1),
        "create_stream": (),
        "destroy_stream": (1,),
        "synchronize": (1,),
        "begin_capture": (1,),
        "end_capture": (1,),
        "launch": (1, 1),
        "destroy_graph": (1,),
    }
    assert {*calls, "driver_version"} == {name for name in vars(Cuda) if not name.startswith("_")}
    assert there.driver_version() == "0.0"
    for name, arguments in calls.items():
        with pytest.raises(EngineError, match="no NVIDIA GPU"):
            getattr(there, name)(*arguments)
    for name in ("cudaGraphInstantiate", "cudaGraphDestroy"):
        status, *_ = getattr(runtime, name)(*((1, 0) if name == "cudaGraphInstantiate" else (1,)))
        assert status != runtime.cudaError_t.cudaSuccess
    assert cuda.OUT_OF_MEMORY in runtime.cudaError_t.__members__
    assert set(cuda.NO_DRIVER) <= set(runtime.cudaError_t.__members__)


@pytest.mark.parametrize("version", BINDINGS)
def test_tensorrt_has_it_all(bindings: Path, version: str) -> None:
    types = {f"DataType.{name}" for name in plan_ports.HOST_TYPES}
    assert look(bindings, version, (used() - OF_RTX) | types) == {
        "version": version,
        "missing": [],
        "takes a config": True,
        "captures itself": False,
    }
