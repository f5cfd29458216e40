"""Options that people bring along from other programs, and what the same is called here."""

from collections.abc import Mapping, Sequence

import click

STEPS = ("--prior-steps", "--decoder-steps")
GUIDANCE = ("--prior-guidance", "--decoder-guidance")

# Options of `generate` that change the image, and that only it has.
IMAGE_OPTIONS = (
    *STEPS,
    *GUIDANCE,
    *("--size", "--images", "--negative", "--sampler", "--strength", "--init-image", "--image-prompt", "--mask"),
    *("--control", "--seed", "--prompts", "--like", "--weighted", "--long-prompts"),
)

# Words of diffusers, ComfyUI, AUTOMATIC1111 and of habit -> options, of which those that a command has are named.
OPTIONS_ELSEWHERE: Mapping[str, Sequence[str]] = {
    "steps": STEPS,
    "num_steps": STEPS,
    "inference_steps": STEPS,
    "num_inference_steps": STEPS,
    "prior_num_inference_steps": STEPS[:1],
    "sampling_steps": STEPS,
    "cfg": GUIDANCE,
    "cfg_scale": GUIDANCE,
    "guidance": GUIDANCE,
    "guidance_scale": GUIDANCE,
    "prior_guidance_scale": GUIDANCE[:1],
    "decoder_guidance_scale": GUIDANCE[1:],
    "width": ("--size",),
    "height": ("--size",),
    "resolution": ("--size",),
    "w": ("--size",),
    "n": ("--images",),
    "num": ("--images",),
    "num_images": ("--images",),
    "num_images_per_prompt": ("--images",),
    "batch_count": ("--images",),
    "n_iter": ("--images",),
    "batch_size": ("--batch",),
    "neg": ("--negative",),
    "negative_prompt": ("--negative",),
    "uncond": ("--negative",),
    "scheduler": ("--sampler",),
    "sampler_name": ("--sampler",),
    "denoise": ("--strength",),
    "denoising_strength": ("--strength",),
    "image": ("--init-image", "--image-prompt"),
    "init_img": ("--init-image",),
    "input_image": ("--init-image",),
    "mask_image": ("--mask",),
    "controlnet": ("--control",),
    "lora_scale": ("--lora",),
    "loras": ("--lora",),
    "vae": ("--vqgan-scale",),
    "out": ("--output",),
    "outdir": ("--output",),
    "output_dir": ("--output",),
    "output_path": ("--output",),
    "save_path": ("--output",),
    "dest": ("--output",),
    "overwrite": ("--force",),
    "yes": ("--force",),
    "f": ("--force",),
    "half": ("--precision", "--dtype"),
    "fp16": ("--precision", "--dtype"),
    "bf16": ("--precision", "--dtype"),
    "dtype": ("--precision",),
    "torch_dtype": ("--precision", "--dtype"),
    "precision": ("--dtype", "--reference-precision"),
    "quantization": ("--quantize",),
    "format": ("--to",),
    "layout": ("--to",),
    "stages": ("--stage",),
    "only": ("--stage",),
    "component": ("--stage",),
    "provider": ("--engine", "--device"),
    "backend": ("--engine",),
    "gpu": ("--device",),
    "cuda": ("--device",),
    "lowvram": ("--memory",),
    "offload": ("--memory",),
    "max_shard_size": ("--shard-size",),
    "reference_model": ("--against",),
    "sm": ("--arch",),
    "target": ("--arch",),
    "weight": ("--strength",),
    "alpha": ("--strength",),
    "scale": ("--strength",),
}

# What is no option here, but an argument: words -> the argument, which a command has by one of these names.
ARGUMENTS_ELSEWHERE: Mapping[str, Sequence[str]] = {
    "prompt": ("prompts", "prompt"),
    "p": ("prompts", "prompt"),
    "text": ("prompts", "prompt"),
    "model": ("model", "bundle", "checkpoint", "sources", "path"),
    "m": ("model", "bundle", "checkpoint", "sources", "path"),
    "ckpt": ("model", "bundle", "checkpoint", "sources", "path"),
    "checkpoint": ("model", "bundle", "sources", "path"),
    "bundle": ("bundle",),
    "input": ("model", "bundle", "checkpoint", "sources", "path"),
    "i": ("model", "bundle", "checkpoint", "sources", "path"),
    "lora": ("loras",),
}


def meant_instead(error: click.NoSuchOption) -> click.UsageError | None:
    """An error that names the option or argument which is the same here; None when the tables have none."""
    if error.ctx is None:
        return None
    params = error.ctx.command.params
    options = {name: param for param in params if isinstance(param, click.Option) for name in param.opts}
    arguments = {param.name: param for param in params if isinstance(param, click.Argument)}
    word = error.option_name.lstrip("-").replace("-", "_").lower()
    meant = [name for name in OPTIONS_ELSEWHERE.get(word, ()) if name in options]
    places = [name for name in ARGUMENTS_ELSEWHERE.get(word, ()) if name in arguments]
    if meant:
        here = " or ".join(" ".join(filter(None, (name, options[name].metavar))) for name in meant)
        advice = f"here it is {here}"
    elif places:
        here = arguments[places[0]].metavar or places[0].upper()
        advice = f"give {here} as an argument, without an option"
    elif elsewhere := _of_generate(error.ctx, word):
        advice = f"`cascadekit generate` has {' or '.join(elsewhere)}"
    else:
        return None
    return click.UsageError(f"No such option {error.option_name}: {advice}.", error.ctx)


def _of_generate(ctx: click.Context, word: str) -> list[str]:
    """The options by which `generate` means `word`; those that change an image are tried with other commands too."""
    if ctx.command.name == "generate":
        return []
    own = f"--{word.replace('_', '-')}"
    return [name for name in (own, *OPTIONS_ELSEWHERE.get(word, ())) if name in IMAGE_OPTIONS]
