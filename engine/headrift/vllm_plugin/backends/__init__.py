"""vLLM's attention backends, subclassed; a file here holds only what is particular to its backend."""
