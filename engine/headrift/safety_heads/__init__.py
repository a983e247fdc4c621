"""Attention heads that refusals depend on: ablated one by one, or together, in the engine's batches."""
