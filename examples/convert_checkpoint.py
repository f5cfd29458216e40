"""Convert Stability's single files to a diffusers model folder, and print what they hold.

python examples/convert_checkpoint.py demo/original model
"""

import sys

from cascadekit import convert, inspect


def main(source: str, output: str) -> None:
    for stage, component in inspect(source).components.items():
        print(f"{stage}: {component.parameters:,} parameters in the {component.layout} layout")
    done = convert([source], output, "diffusers")
    print(f"wrote {len(done.files)} weights files to {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
