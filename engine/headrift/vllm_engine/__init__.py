"""vLLM as headrift starts it: configuration, patches, and the ranks of one engine put together."""
