"""A LLaMA-Factory recipe, its YAML or its argument dictionary in JSON, as the sections of ours."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from training.errors import TrainingError
from training.fields import suggest

SUFFIXES = (".yaml", ".yml", ".json")
Sections = dict[str, dict[str, Any]]
_HELD_OUT = 100  # rows, where the recipe sets none aside: the evaluation needs some
_HUB_SETS = ("alpaca_gpt4_en", "alpaca_gpt4_zh", "alpaca_en", "alpaca_zh")  # of its own dataset_info.json

# Values that Graft cannot follow without becoming another experiment.
_ONLY: dict[str, tuple[Any, ...]] = {
    "stage": ("sft",),
    "do_train": (True,),
    "finetuning_type": ("lora",),
    "quantization_bit": (4, None),
    "quantization_type": ("nf4",),
    "quantization_method": ("bnb", "bitsandbytes"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
    "optim": ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"),
    "streaming": (False,),
}
_PLAIN = {  # LLaMA-Factory's argument -> section, field, LLaMA-Factory's default where it differs from ours
    "model_name_or_path": ("model", "id", None),
    "model_revision": ("model", "revision", None),
    "cutoff_len": ("data", "cutoff", 2048),
    "max_samples": ("data", "limit", None),
    "lora_rank": ("lora", "rank", 8),
    "lora_dropout": ("lora", "dropout", 0.0),
    "use_rslora": ("lora", "rslora", False),
    "use_dora": ("lora", "dora", False),
    "learning_rate": ("optim", "learning_rate", 5e-5),
    "weight_decay": ("optim", "weight_decay", 0.0),
    "max_grad_norm": ("optim", "max_grad_norm", 1.0),
    "neftune_noise_alpha": ("optim", "neftune_alpha", None),
    "seed": ("run", "seed", 42),
    "logging_steps": ("run", "log_every", 500),
    "save_steps": ("run", "save_every", 500),
    "save_total_limit": ("run", "keep_checkpoints", None),
    "early_stopping_steps": ("run", "early_stopping_patience", None),
}
_READ = (  # by functions below
    *"dataset dataset_dir val_size template lora_alpha lora_target fp16 bf16 warmup_ratio warmup_steps".split(),  # noqa: SIM905
    *"num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps output_dir".split(),  # noqa: SIM905
    *"eval_steps report_to gradient_checkpointing disable_gradient_checkpointing run_name mask_history".split(),  # noqa: SIM905
)
_MOOT = {  # asks for what Graft does in any case, or for what changes no number
    "plot_loss": "loss.png is always drawn",
    "packing": "rows are always packed, and never attend to each other",
    "neat_packing": "rows are always packed, and never attend to each other",
    "flash_attn": "the fastest packed attention of the device is used",
    "double_quantization": "always",
    "overwrite_output_dir": "--fresh discards an unfinished run",
    "overwrite_cache": "there is no cache of rendered rows",
    "preprocessing_num_workers": "rows are rendered in one process",
    "dataloader_num_workers": "packs are made in the training process",
    "do_eval": "the held-out NLL is always measured",
    "eval_strategy": "the held-out NLL is measured each eval_steps",
    "per_device_eval_batch_size": "validation packs as training does",
    "include_num_input_tokens_seen": "tokens are always logged",
    "ddp_timeout": "accelerate's own is used",
    "resume_from_checkpoint": "--resume goes on with an unfinished run",
    "use_fast_tokenizer": "always",
    "save_strategy": "checkpoints are written each save_steps",
}


class LlamaFactoryError(TrainingError):
    """A LLaMA-Factory recipe that would be another experiment here; names the argument, its value, what is allowed."""


def read_llamafactory(path: Path) -> Sections:
    """Returns the recipe's sections and prints, on stderr, each argument that has no equivalent.

    What is left out takes LLaMA-Factory's default, not ours. Raises LlamaFactoryError.
    """
    arguments = _load(path)
    try:
        sections, notes = map_arguments(arguments)
    except LlamaFactoryError as error:
        raise LlamaFactoryError(f"{path}: {error}") from None
    print(f"{path}: a LLaMA-Factory recipe of {len(arguments)} arguments", file=sys.stderr)
    print("\n".join(f"  {note}" for note in notes), file=sys.stderr)
    return sections


def map_arguments(arguments: Mapping[str, Any]) -> tuple[Sections, list[str]]:
    """Returns (sections, notes): a note for each argument that is not taken over as it stands."""
    for key, allowed in _ONLY.items():
        if key in arguments and arguments[key] not in allowed:
            words = " or ".join(str(value) for value in allowed if value is not None)
            raise LlamaFactoryError(f"{key} = {arguments[key]!r} has no equivalent; give {words}")
    sections: Sections = {"model": {}, "data": {}, "lora": {}, "optim": {}, "run": {}}
    for key, (section, field, default) in _PLAIN.items():
        value = arguments.get(key, default)
        if value is not None:
            sections[section][field] = value if section == "model" else _parsed(value)
    notes = _notes(arguments)
    for part in (_model, _data, _lora, _steps, _batch, _run):
        notes += part(arguments, sections)
    return sections, notes


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise LlamaFactoryError(f"{path}: not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise LlamaFactoryError(f"{path}: is no table of arguments, such as `stage: sft`")
    return found


def _notes(arguments: Mapping[str, Any]) -> list[str]:
    known = {*_ONLY, *_PLAIN, *_READ, *_MOOT}
    notes = []
    for key, value in arguments.items():
        if key in _MOOT:
            notes.append(f"{key} = {value!r}: not needed: {_MOOT[key]}")
        elif key not in known and value not in (None, False):
            near = suggest(key, known)
            notes.append(f"{key} = {value!r}: no equivalent, left out{near if 'did you mean' in near else ''}")
        elif key not in known:
            notes.append(f"{key} = {value!r}: no equivalent, and off")
    return notes


def _model(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    sections["model"]["quantisation"] = "nf4" if arguments.get("quantization_bit") else "none"
    if arguments.get("fp16") or arguments.get("bf16"):
        sections["model"]["dtype"] = "bfloat16" if arguments.get("bf16") else "float16"
    return []


def _data(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    data, name, folder = sections["data"], arguments.get("dataset"), arguments.get("dataset_dir")
    if not isinstance(name, str) or "," in name:
        raise LlamaFactoryError(f"dataset = {name!r}: give the name of one data set")
    notes = _place(data, name, folder)
    template = arguments.get("template")
    data["template"] = "qwen" if template == "qwen" else "model"
    if template not in (None, "qwen"):
        notes.append(f"template = {template!r}: the model's own chat template is used")
    data["turns"] = "last" if arguments.get("mask_history") else "all"
    return notes + _split(data, arguments)


def _place(data: dict[str, Any], name: str, folder: Any) -> list[str]:
    info = Path(str(folder or "data"), "dataset_info.json")
    if folder == "ONLINE":
        data["dataset"] = name
    elif info.is_file():
        data |= {"dataset": name, "dataset_info": str(info)}
    elif folder is None and name in _HUB_SETS:
        data["dataset"] = f"llamafactory/{name}"
        return [f"dataset = {name!r}: there is no {info}; read from the hub as {data['dataset']}"]
    else:
        raise LlamaFactoryError(f"dataset = {name!r}: there is no {info}; set dataset_dir to the folder that has it")
    return []


def _split(data: dict[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    size = _number(arguments, "val_size", 0)
    if isinstance(size, float) and 0 < size < 1 and "limit" in data:
        size = max(1, int(size * data["limit"]))
    data["held_out"] = int(size) if size >= 1 else _HELD_OUT
    if size >= 1:
        return []
    given = f"val_size = {arguments['val_size']!r}" if size else "val_size is not set"
    return [f"{given}: {_HELD_OUT} rows are held out for the evaluation; --data.held_out sets another number"]


def _lora(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    lora, target = sections["lora"], arguments.get("lora_target", "all")
    lora["alpha"] = _number(arguments, "lora_alpha", 2 * _number(arguments, "lora_rank", 8))
    names = target.split(",") if isinstance(target, str) else target
    lora["target_modules"] = "all-linear" if target in ("all", ["all"]) else [str(name).strip() for name in names]
    return []


def _steps(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    optim, kind = sections["optim"], arguments.get("lr_scheduler_type", "linear")
    epochs, steps = _number(arguments, "num_train_epochs", 3), _number(arguments, "max_steps", -1)
    if steps > 0:  # there, steps alone decide
        optim |= {"max_steps": steps, "epochs": 1000}
    elif epochs != int(epochs):
        raise LlamaFactoryError(f"num_train_epochs = {epochs}: give a whole number, or max_steps")
    else:
        optim["epochs"] = int(epochs)
    optim["schedule"] = "constant" if kind == "constant_with_warmup" else kind
    optim["optimizer"] = "paged_adamw_8bit" if arguments.get("optim") == "paged_adamw_8bit" else "adamw"
    return _warmup(arguments, optim, warms=kind != "constant")


def _warmup(arguments: Mapping[str, Any], optim: dict[str, Any], *, warms: bool) -> list[str]:
    ratio, steps = (_number(arguments, key, 0) for key in ("warmup_ratio", "warmup_steps"))
    optim["warmup_ratio"] = float(ratio) if warms else 0.0
    if steps >= 1 and "max_steps" in optim and warms:
        optim["warmup_ratio"] = steps / optim["max_steps"]
    elif 0 < steps < 1 and warms:  # newer releases of transformers take a share here
        optim["warmup_ratio"] = float(steps)
    elif steps and warms:
        return [f"warmup_steps = {steps}: no equivalent without max_steps; warmup_ratio = {float(ratio)} is used"]
    return [] if warms or not (ratio or steps) else ["lr_scheduler_type = 'constant': warms up neither there nor here"]


def _batch(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    rows = _number(arguments, "per_device_train_batch_size", 8)
    times = _number(arguments, "gradient_accumulation_steps", 1)
    sections["optim"] |= {
        "batch_size": rows * times,
        "micro_batch_tokens": rows * _number(arguments, "cutoff_len", 2048),
    }
    return [f"{rows} rows x {times} accumulations: {rows * times} rows an optimizer step, over all devices"]


def _run(arguments: Mapping[str, Any], sections: Sections) -> list[str]:
    run, out = sections["run"], str(arguments.get("output_dir", "llamafactory"))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(out).name).strip("-._")[:64]
    run["name"] = name if name and name != "base" else "llamafactory"
    run["eval_every"] = _number(arguments, "eval_steps", _number(arguments, "save_steps", 500))
    trackers = arguments.get("report_to") or []
    names = [trackers] if isinstance(trackers, str) else trackers
    run["trackers"] = [name for name in names if name != "none"]
    if arguments.get("disable_gradient_checkpointing"):
        run["gradient_checkpointing"] = "off"
    elif arguments.get("gradient_checkpointing"):
        run["gradient_checkpointing"] = "on"
    notes = [f"output_dir = {out!r}: the run is named {run['name']!r}; --out DIR puts it elsewhere than runs/<name>"]
    return notes + ([f"run_name = {arguments['run_name']!r}: left out"] if arguments.get("run_name") else [])


def _number(arguments: Mapping[str, Any], key: str, default: float) -> Any:
    """Returns the argument's number, or `default` where it is absent or null."""
    value = _parsed(arguments.get(key))
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LlamaFactoryError(f"{key} = {value!r}: give a number")
    return value


def _parsed(value: Any) -> Any:
    """YAML 1.1 reads 5e-5, which has no dot, as text."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError:
        return value
