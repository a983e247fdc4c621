"""Check before a model is loaded that the queries of a job that ablates heads fit."""

from __future__ import annotations

from collections.abc import Sequence

from headrift.model_facts import ModelFacts
from headrift.runs.folder import JobError
from headrift.safety_heads.queries import Query


def check_lengths(queries: Sequence[Query], facts: ModelFacts, tokens: int) -> None:
    """JobError where a query and so many more tokens do not fit the context."""
    for query in queries:
        if facts.context is not None and len(query.token_ids) + tokens > facts.context:
            raise JobError(
                f"query {query.id} has {len(query.token_ids)} tokens, and the model's context holds {facts.context}, "
                f"{tokens} of the answer among them: leave it out"
            )
