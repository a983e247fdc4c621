"""Low-rank adapters (LoRA, by peft): made for a model, or recognised as another model's before anything loads."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

ADAPTER, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The attention's own matrices: what attention consistency can change, and the same for all methods.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_INSTALL = "peft is not installed: pip install 'headrift[train]'"


class LoraError(ValueError):
    """The adapter cannot be used with the model; the message says why and what to do."""


def check_peft() -> None:
    """LoraError where peft is missing."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise LoraError(_INSTALL)


def check(folder: Path, model: Path) -> None:
    """LoraError unless the folder holds a LoRA whose matrices fit those of the model's folder. Reads headers only."""
    for name in (_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise LoraError(f"--lora {folder} has no {name}: give the folder `adapter` of a finished training")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        adapter = _shapes(folder / ADAPTER)
    except (OSError, ValueError) as error:
        raise LoraError(f"--lora {folder} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise LoraError(f"--lora {folder} is no LoRA but of the kind {config.get('peft_type')}: give a LoRA")
    weights = {name: shape for path in sorted(model.glob("*.safetensors")) for name, shape in _shapes(path).items()}
    for name, shape in adapter.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not found or not weights:
            continue
        base = weights.get(f"{found.group(1)}.weight")
        side = 1 if found.group(2) == "A" else 0
        if base is None:
            raise LoraError(f"--lora {folder} is of another model: {model} has no {found.group(1)}")
        if base[side] != shape[side]:
            raise LoraError(
                f"--lora {folder} is of another model: its {found.group(1)} has {shape[side]} "
                f"{'inputs' if side else 'outputs'}, and that of {model} {base[side]}"
            )
    layers = {int(n) for name in adapter for n in re.findall(r"\.layers\.(\d+)\.", name)}
    has = {int(n) for name in weights for n in re.findall(r"\.layers\.(\d+)\.", name)}
    if layers and has and config.get("layers_to_transform") is None and layers != has:
        raise LoraError(f"--lora {folder} is of another model: it has {len(layers)} layers, and {model} {len(has)}")


def fingerprint(folder: Path) -> str:
    """What tells an adapter from another: its weights and its settings."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (_CONFIG, ADAPTER))).hexdigest()


def attach(model: Any, rank: int, alpha: float, seed: int, start: Path | None = None) -> Any:
    """The model with a LoRA on its attention matrices that changes nothing yet, or with the one to start from."""
    import peft
    import torch

    if start is not None:
        return peft.PeftModel.from_pretrained(model, str(start), is_trainable=True)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM", bias="none"
    )
    return peft.get_peft_model(model, config)


def trained(model: Any) -> dict[str, Any]:
    """The adapter's weights by name: the parameters themselves."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({error}): copy it anew") from error
