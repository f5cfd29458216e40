"""The settings of PEFT's adapters, fields of its LoraConfig, LoHaConfig and LoKrConfig, and their effect on weights.

Source: https://github.com/huggingface/peft, src/peft/tuners/lora/config.py."""

from collections.abc import Mapping
from dataclasses import dataclass

OFF: tuple[object, ...] = (None, False, "", [], {})  # values that switch any setting off

ALPHA_FIELDS: Mapping[str, str] = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # by peft_type

UNDERSTOOD = frozenset({"peft_type", "r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"})

# Settings without effect on the change of a weight: factors and alpha decide it alone.
_HARMLESS = (
    # the origin and the purpose of the adapter
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config",
    # the modules with factors and biases; the file's keys show them
    "target_modules exclude_modules layers_to_transform layers_pattern lora_bias ensure_weight_tying",
    # training alone
    "lora_dropout rank_dropout module_dropout rank_dropout_scale velora_config init_weights",
    # the shapes of the factors; the file has them
    "use_effective_conv2d decompose_both decompose_factor",
    # details of a method that another setting switches on: init_lora_weights, use_qalora, megatron_config
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core",
)
HARMLESS = frozenset(" ".join(_HARMLESS).split())


@dataclass(frozen=True)
class Limit:
    """The values of a setting that are supported besides those of OFF, and why other values are not."""

    values: tuple[object, ...]
    why: str


_OTHER_BASE = (
    "the adapter belongs to weights that this changed before training; save it with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...), or merge it with PEFT"
)
_OTHER_FORM = "its change is not alpha / r · B @ A; merge it with PEFT"

LIMITED: Mapping[str, Limit] = {
    "init_lora_weights": Limit((True, "gaussian", "eva", "orthogonal", "mica"), _OTHER_BASE),
    "kasa_config": Limit((), _OTHER_BASE),
    "use_qalora": Limit((), _OTHER_FORM),
    "use_bdlora": Limit((), _OTHER_FORM),
    "arrow_config": Limit((), _OTHER_FORM),
    "monteclora_config": Limit((), _OTHER_FORM),
    "alora_invocation_tokens": Limit((), "it acts on some tokens only, which no change of the weights does"),
    "bias": Limit(("none",), "the file's biases replace the model's; train with bias='none' or lora_bias"),
    "modules_to_save": Limit((), "the file's whole modules replace the model's; extract a LoRA from the merged model"),
    "trainable_token_indices": Limit((), "the file's rows replace those of the token table"),
    "target_parameters": Limit((), "the weights of these networks are those of modules"),
    "layer_replication": Limit((), "the adapter is for a network with other blocks"),
    "fan_in_fan_out": Limit((), "no module of these networks is transposed"),
    "megatron_config": Limit((), "these networks have no parallel layers of Megatron"),
}
