"""Which attention heads a model's refusals hang on: every head ablated in turn, as rows of the engine's batches."""
