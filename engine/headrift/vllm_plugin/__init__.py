"""Everything that runs inside vLLM. Importing this package imports nothing else."""
