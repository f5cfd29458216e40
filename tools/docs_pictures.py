"""python -m tools.docs_pictures: makes the pictures of the README and of docs/ with the example model."""

from pathlib import Path
from tempfile import TemporaryDirectory

from cascadekit import Cascade, export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL, EXAMPLE_PROMPTS
from cascadekit.runtime.images.contact_sheet import contact_sheet

FOLDER = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as work:
        export(EXAMPLE_MODEL, Path(work) / "bundle")
        with Cascade.open(Path(work) / "bundle", engine="onnxruntime") as cascade:
            images = cascade.generate(EXAMPLE_PROMPTS, seed=0).images
    contact_sheet(images, EXAMPLE_PROMPTS).save(FOLDER / "example-model.png", optimize=True)


if __name__ == "__main__":
    main()
