"""Export a model as ONNX graphs, and list the inputs of every stage.

python examples/export_bundle.py model bundle
"""

import sys

from cascadekit import export


def main(model: str, output: str) -> None:
    manifest = export(model, output)
    for stage, entry in manifest.stages.items():
        print(f"{stage}: {', '.join(port.name for port in entry.inputs)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
