"""Parts of messages: lists of names, values that were found, fields that are wrong, names that were meant."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import UsageError

if TYPE_CHECKING:
    from pydantic import ValidationError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

LONG, LONG_BITS = 60, 512  # characters of a value in a message, bits of a number that is written out
PYDANTIC_WORDS = "Value error, "  # which pydantic puts before the message of a validator of ours

# Names here -> words of diffusers, ComfyUI, AUTOMATIC1111 and of habit for the same. A name is that of an argument in
# Python, an option of the command line, or both. A function or command has some of the names in a row.
_ELSEWHERE: Mapping[tuple[str, ...], str] = {
    ("steps", "prior_steps", "decoder_steps"): "steps num_steps inference_steps num_inference_steps sampling_steps",
    ("prior_steps",): "prior_num_inference_steps",
    ("guidance", "prior_guidance", "decoder_guidance"): "guidance guidance_scale cfg cfg_scale",
    ("prior_guidance",): "prior_guidance_scale",
    ("decoder_guidance",): "decoder_guidance_scale",
    ("width", "height"): "size",
    ("size",): "width height w",
    ("size", "width", "height"): "resolution",
    ("num_images", "images"): "n num num_images num_images_per_prompt batch_count n_iter",
    ("batch", "num_images", "rows"): "batch_size",
    ("seed",): "generator",
    ("embeds",): "prompt_embeds",
    ("negative",): "negative_prompt neg uncond",
    ("sampler",): "scheduler sampler_name",
    ("strength",): "denoise denoising_strength alpha scale",
    ("strength", "strengths"): "weight",
    ("strengths",): "strength",
    ("strengths", "lora"): "lora_scale",
    ("lora", "loras"): "lora loras",
    ("init_image", "image_prompts", "image_prompt"): "image",
    ("init_image",): "init_img input_image",
    ("mask",): "mask_image",
    ("control", "controls"): "controlnet",
    ("on_step",): "callback_on_step_end",
    ("vqgan_scale",): "vae",
    ("output",): "output_type out outdir output_dir output_path save_path dest",
    ("force",): "overwrite yes f",
    ("precision", "dtype"): "torch_dtype half fp16 bf16",
    ("precision",): "dtype",
    ("dtype", "reference_precision"): "precision",
    ("quantize",): "quantization",
    ("to",): "format layout",
    ("shard_size",): "max_shard_size",
    ("stage", "stages"): "stage stages only component",
    ("engine", "device"): "provider",
    ("engine",): "backend",
    ("device",): "gpu cuda",
    ("memory",): "lowvram offload",
    ("arch", "targets"): "arch sm target",
    ("against",): "reference_model",
    ("bundle",): "model",
    ("reports",): "report",
}
NAMES_ELSEWHERE = {word: names for names, words in _ELSEWHERE.items() for word in words.split()}
STAGE_PREFIXES = ("prior_", "decoder_")


def changed_fields(value: Any) -> str:
    """A dataclass with defaults as text, with the fields alone that differ from them: `ExportOptions(force=True)`."""
    plain = type(value)()
    changed = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in fields(value)
        if getattr(value, field.name) != getattr(plain, field.name)
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


def with_shapes(value: Any) -> str:
    """A dataclass as text, with the dtypes and shapes of arrays in place of values: `Step(latents=float32 (1, 4))`."""
    shown = []
    for name in (field.name for field in fields(value) if field.repr):
        found = getattr(value, name)
        text = f"{found.dtype} {found.shape}" if hasattr(found, "dtype") else repr(found)
        shown.append(f"{name}={text}")
    return f"{type(value).__name__}({', '.join(shown)})"


def listed(items: Sequence[str], most: int = 6) -> str:
    """Return the first `most` of `items` in one line, and how many more there are.

    Examples:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def one_line(error: object, most: int | None = None) -> str:
    """The message of an error, or another text, in one line of at most `most` characters.

    An error without a message is named by its class."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def reason(error: Exception) -> str:
    """What went wrong, in one line; of an OSError without its number and file, which a message names itself."""
    return one_line(error.strerror if isinstance(error, OSError) and error.strerror else error)


def listed_below(items: Sequence[str], most: int = 6) -> str:
    """Return the first `most` of `items`, each on an indented line, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n  {item}" for item in (*items[:most], *more))


def shown_bytes(nbytes: float) -> str:
    """A size in gigabytes, or below one in megabytes: "4.9 GB", "20.1 MB"."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def shown(value: object) -> str:
    """A wrong value of any type, shortened to LONG characters."""
    if isinstance(value, list | tuple | dict):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > LONG_BITS:
        return "a number of hundreds of digits"
    text = repr(value[:LONG] if isinstance(value, str) else value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: `function` raises UsageError for an unknown keyword, with the name that was probably meant."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        require_known(function.__name__, kwargs, signature(function).parameters)
        return function(*args, **kwargs)

    return call


def known_fields(kind: type[T]) -> type[T]:
    """A decorator of a dataclass, which then refuses an unknown field as `known_keywords` refuses a keyword."""
    known, make = [field.name for field in fields(kind)], kind.__init__  # type: ignore[arg-type]

    @wraps(make)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        require_known(kind.__name__, kwargs, known)
        make(self, *args, **kwargs)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def require_known(what: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise UsageError for names in `given` that are not in `known`; the message suggests a name for each."""
    wrong = [name for name in given if name not in known]
    if wrong:
        raise UsageError(f"{what}: {'; '.join(_unknown(name, known) for name in wrong[:5])}")


def wrong_fields(error: "ValidationError", known: Collection[str] = ()) -> str:
    """A short message for each of the first five fields that pydantic refused; `known` are the names there are."""
    return "; ".join(
        _unknown(_dotted(e["loc"]), known)
        if known and e["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        else f"{_dotted(e['loc']) or 'all of it'}: {e['msg'].removeprefix(PYDANTIC_WORDS)}{_found(e)}"
        for e in error.errors()[:5]
    )


def _found(error: Mapping[str, object]) -> str:
    """The wrong value, where a message of pydantic's own leaves it out."""
    said = str(error["msg"]).startswith(PYDANTIC_WORDS) or not isinstance(error["input"], str | int | float)
    return "" if said else f", found {shown(error['input'])}"


def _dotted(place: Sequence[int | str]) -> str:
    """The path of a field, such as controls.0.strength."""
    return ".".join(str(part)[:LONG] for part in place)


def _unknown(name: str, known: Collection[str]) -> str:
    meant = _nearest_names(name, known)
    return f"{name[:LONG]}: unknown" + (f", did you mean {' or '.join(meant)}?" if meant else "")


def _nearest_names(name: str, known: Collection[str]) -> list[str]:
    """At most two names of `known` that somebody who wrote `name` probably meant."""
    stem = next((name.removeprefix(prefix) for prefix in STAGE_PREFIXES if name.startswith(prefix)), name)
    candidates = (*NAMES_ELSEWHERE.get(name, ()), *(prefix + name for prefix in STAGE_PREFIXES), stem)
    return [each for each in candidates if each in known][:2] or get_close_matches(name[:LONG], sorted(known), 2)
