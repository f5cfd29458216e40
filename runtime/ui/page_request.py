"""Parses the flat JSON that the page submits into requests, and describes to the page the requests it may make."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGE_SIDE, MAX_STEPS
from ...schemas.manifest import ENCODER_GRAPH, Manifest
from ...schemas.messages import shown as shown_value
from ...schemas.settings import Sampler, parse_settings
from ...schemas.sizes import SIZE_STEP, SMALLEST_SIDE, SizePolicy
from ...schemas.stages import Stage
from ..batch.prompt_requests import counted_requests
from ..sampling.controlnets import CONTROLS, INPAINTING, require_control
from .models import Models
from .queued_job import PageRequest
from .uploads import Uploads

MOST_IMAGES = 64  # of one submission; more are a typing error

PICTURED = frozenset({"image_prompts", "init_image", "mask"})
PREVIEWED = (Stage.PRIOR, Stage.DECODER)


def features(manifest: Manifest) -> dict[str, Any]:
    """The features of the bundle besides following a prompt."""
    has = manifest.stages
    varies = Stage.EFFNET_ENCODER in has and Stage.VQGAN in has
    controls = [name for name in CONTROLS if _can(manifest, name)]
    return {
        "image_prompts": Stage.IMAGE_ENCODER in has,
        "init_image": varies,
        "mask": (varies and ENCODER_GRAPH in has[Stage.VQGAN].graphs) or INPAINTING in controls,
        "controls": controls,
        "previews": [stage for stage in PREVIEWED if stage is not Stage.PRIOR or Stage.PREVIEWER in has],
    }


def describe(manifest: Manifest) -> dict[str, Any]:
    """The stages of a bundle, its features, and defaults and limits of the settings."""
    sides = {"min": SMALLEST_SIDE, "max": MAX_IMAGE_SIDE, "step": SIZE_STEP}
    size = manifest.default_size
    return {
        "stages": [
            {"stage": stage, "variant": entry.variant, "precision": entry.precision}
            for stage, entry in manifest.stages.items()
        ],
        "features": features(manifest),
        "defaults": {sampler: parse_settings({"sampler": sampler}, size).to_json() for sampler in Sampler},
        "size_policies": list(SizePolicy),
        "limits": {"side": sides, "steps": MAX_STEPS, "images": MOST_IMAGES},
        "created_by": manifest.created_by,
    }


def parse_page_request(given: Mapping[str, Any], models: Models, pictures: Uploads) -> PageRequest:
    """Parse the JSON that the page submits.

    `given` has the fields of a request, with ids in place of pictures. Its `bundle`, `engine` and `loras` are names on
    the page. `images` is the number of images, whose seeds count on from `seed`; `previews` is a list of stages.

    Raises UsageError for a request that cannot be generated."""
    fields = dict(given)
    count, shown = _count(fields.pop("images", 1)), _stages(fields.pop("previews", []))
    choice = models.choice(fields.pop("bundle", None), fields.pop("engine", None), fields.pop("loras", None))
    manifest = models.manifest(choice.bundle)
    fields = {name: value for name, value in fields.items() if value or name not in PICTURED}
    for name in PICTURED & fields.keys():
        value = fields[name]
        fields[name] = (
            [_picture(each, pictures) for each in value] if isinstance(value, list) else _picture(value, pictures)
        )
    if fields.get("controls"):
        fields["controls"] = [_control(each, pictures) for each in _list("controls", fields["controls"])]
    fields["loras"] = [{"name": name, "strength": strength} for name, strength in choice.loras]
    if fields.get("seed") in (None, ""):
        fields.pop("seed", None)
    requests = counted_requests(fields, count, manifest)
    return PageRequest(choice, requests, shown & frozenset(features(manifest)["previews"]))


def _count(value: Any) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        count = 0
    if not 1 <= count <= MOST_IMAGES:
        raise UsageError(f"images {shown_value(value)}: expected 1 to {MOST_IMAGES}")
    return count


def _stages(value: Any) -> frozenset[Stage]:
    wrong = [each for each in _list("previews", value) if each not in PREVIEWED]
    if wrong:
        raise UsageError(f"previews {shown_value(wrong[0])}: expected {' and '.join(PREVIEWED)}")
    return frozenset(Stage(each) for each in value)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{name}: expected a list")
    return value


def _picture(value: Any, pictures: Uploads) -> dict[str, str]:
    """The picture of an id as a request names it."""
    return {"path": str(pictures.path(value)), "sha256": value}


def _control(value: Any, pictures: Uploads) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= {"name", "picture", "strength"}:
        raise UsageError("controls: expected each as {name, picture, strength}")
    strength = {"strength": value["strength"]} if value.get("strength") not in (None, "") else {}
    return {"name": value.get("name"), **_picture(value.get("picture"), pictures), **strength}


def _can(manifest: Manifest, name: str) -> bool:
    try:
        require_control(manifest, name)
    except UsageError:
        return False
    return name != "canny" or find_spec("cv2") is not None  # without OpenCV, "edges" takes its place
