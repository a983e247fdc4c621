"""What a system prompt changes inside a model and in what it says: `headrift internals`."""
