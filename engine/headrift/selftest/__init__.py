"""Does headrift measure right on this machine, with this model: what `headrift selftest` runs.

`run` drives it, `checks` judges, `chats` has the prompts; `plain_engine` and `eager` are what is compared with: vLLM
without headrift, and transformers with eager attention.
"""
