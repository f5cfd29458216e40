"""Prints the catalog entry of a published checkpoint, from the headers of its files; no tensor is read.

    python tests/data/make_catalog.py FILE... --component prior --layout diffusers --variant full [--config config.json]

Several FILEs are the shards of one checkpoint. The output is the content of ``tests/data/catalog/LAYOUT_NAME.json``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from cascadekit.storage.weights_file import read_weights

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids")  # tensors that are not trained


def catalog_entry(files: list[Path], component: str, layout: str, variant: str, config: Any = None) -> dict[str, Any]:
    """Name, dtype and shape of every tensor in the `files`, and the totals that the tests check."""
    tensors = {name: tensor for file in files for name, tensor in read_weights(file).tensors.items()}
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    return {
        "component": component,
        "layout": layout,
        "variant": variant,
        **({"config": config} if config is not None else {}),
        "tensor_count": len(tensors),
        "element_count": sum(sizes.values()),
        "parameter_count": sum(size for name, size in sizes.items() if not name.endswith(BUFFERS)),
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in tensors.items()},
    }


def as_text(entry: dict[str, Any]) -> str:
    """The entry as JSON with one line for each tensor."""
    head = json.dumps({**entry, "tensors": None}, indent=1).removesuffix("null\n}")
    lines = [f"  {json.dumps(name)}: {json.dumps(spec)}" for name, spec in entry["tensors"].items()]
    return head + "{\n" + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--component", required=True)
    parser.add_argument("--layout", required=True)
    parser.add_argument("--variant", default="full")
    parser.add_argument("--config", type=Path)
    given = parser.parse_args()
    config = json.loads(given.config.read_text()) if given.config else None
    print(as_text(catalog_entry(given.files, given.component, given.layout, given.variant, config)), end="")


if __name__ == "__main__":
    main()
