"""Random models of a few architectures, small enough that a test makes them."""

import os
import shutil
from pathlib import Path

import torch

VOCAB = 211
# An interpreted layer costs half a second a step.
LAYERS = 2 if os.environ.get("TRITON_INTERPRET") == "1" else 3
TINY = {
    # GQA 3:1
    "llama-3to1": {"kind": "Llama", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 192},
    # GQA 4:1
    "llama-4to1": {"kind": "Llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256},
    # norms on q and k; head_dim is not hidden_size / heads
    "qwen3": {"kind": "Qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 64},
    # a sliding window shorter than the prompts
    "mistral": {
        "kind": "Mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 128,
        "head_dim": 32,
        "sliding_window": 24,
    },
    # local and global layers, head_dim 256, another query scale
    "gemma3": {
        "kind": "Gemma3Text",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 128,
        "head_dim": 256,
        "sliding_window": 24,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"][:LAYERS],
    },
    # a sink in every head
    "granite-sinks": {
        "kind": "GraniteSWA",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 128,
        "sliding_window": 24,
        "attention_multiplier": 32**-0.5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"][:LAYERS],
    },
}


def make_chat_model(folder: Path, source: Path, **options: object) -> Path:
    """A random Llama with the tokenizer and chat template of the model in `source`; its folder. Two layers of four
    heads, where no options for the configuration say otherwise."""
    import transformers

    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"vocab_size": 49152, "intermediate_size": 128, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = transformers.LlamaConfig(**{**size, **tokens, "initializer_range": 0.1, **options})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return folder


def make_tiny_model(name: str, folder: Path) -> Path:
    """A random model of LAYERS layers in float32, wide enough in its weights that attention is far from uniform."""
    import transformers

    options = dict(TINY[name])
    kind = options.pop("kind")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        intermediate_size=128,
        max_position_embeddings=512,
        # Scores spread alike whatever the width: attention far from uniform, and not so sharp that rounding grows.
        initializer_range=1.6 / options["hidden_size"] ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name_of_weight, weight in model.named_parameters():
        if name_of_weight.endswith("sinks"):  # zero in a new model
            torch.nn.init.normal_(weight, mean=3.0)
    model.save_pretrained(folder)
    return folder
