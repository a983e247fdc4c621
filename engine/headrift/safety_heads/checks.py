"""What every job that ablates heads has to know and to refuse before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrift.model_facts import ModelFacts, read_model
from headrift.safety_heads.queries import Query


class JobError(ValueError):
    """The job cannot be done as asked; the message says why and what to do."""


def shape_of(model: Path) -> tuple[ModelFacts, int, int]:
    """A model's facts, layers and heads. ModelError, JobError where they cannot be told."""
    facts = read_model(model)
    if facts.layers is None or facts.heads is None:
        raise JobError(f"--model {model}: its config.json does not say how many layers and heads it has")
    return facts, facts.layers, facts.heads


def check_backend(attention_backend: str) -> None:
    """JobError for the one that does not ablate."""
    if attention_backend == "flash":
        raise JobError("heads are not ablated with the attention backend 'flash': leave it at auto, or use 'triton'")


def check_lengths(queries: Sequence[Query], facts: ModelFacts, tokens: int) -> None:
    """JobError where a query and so many more tokens do not fit the context."""
    for query in queries:
        if facts.context is not None and len(query.token_ids) + tokens > facts.context:
            raise JobError(
                f"query {query.id} has {len(query.token_ids)} tokens, and the model's context holds {facts.context}, "
                f"{tokens} of the answer among them: leave it out"
            )


def new_folder(out: Path) -> None:
    """Make the folder for results. JobError where there is something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(f"--out {out} is not an empty folder: give another")
    out.mkdir(parents=True, exist_ok=True)
