"""Queries of a job that ablates heads: files in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrift.corpus import sources
from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.sources import InputError
from headrift.model_facts import ModelFacts
from headrift.runs.folder import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How a query is put to the model: as a user message in its chat template, in the form that the paper's released code
# gives base models, or as plain text.
CHAT, QUERY, TEXT = FORMS = ("chat", "query", "text")
_QUERY = "## Query:{query} \n## Answer:"
# The column of a query in public sets (maliciousinstruct.csv, advbench.csv, jailbreakbench.csv).
_PUBLIC_COLUMN = "input"


@dataclass(frozen=True, slots=True)
class Query:
    """A query's token ids, with the label and category of its row (None if it has none)."""

    id: str
    label: str | None
    category: str | None
    token_ids: list[int] = field(repr=False)


def read_rows(
    inputs: Sequence[str],
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
    limit: int | None = None,
    labels: Sequence[str] | None = None,
) -> list[Row]:
    """Read the rows of .txt, .jsonl, .csv and .parquet files; a column `input` is a prompt.

    Args:
        columns: what the files call a key.
        label: only rows with this label.
        limit: only the first `limit` of them.
        labels: one per input, for rows without a label.

    Raises:
        InputError: there is no row, or one cannot be used; the message names it.
    """
    inputs_found = sources.find(inputs, labels)
    try:
        reader = Reader(inputs_found, columns)
    except InputError:
        if columns:
            raise
        try:
            reader = Reader(inputs_found, {"prompt": _PUBLIC_COLUMN})
        except InputError:
            reader = Reader(inputs_found)  # raises, and names the missing key
    rows: list[Row] = []
    for row in reader.rows():
        if limit is not None and len(rows) == limit:
            break
        if isinstance(row, BadRow):
            raise InputError(f"{row.source}, row {row.row}: {row.detail}")
        if label in (None, row.label):
            rows.append(row)
    if not rows:
        what = "query" if label is None else f"query with the label {label}"
        raise InputError(f"{', '.join(inputs)}: no {what}; give a file with at least one")
    return rows


def prepare(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, form: str = CHAT, system_prompt: str | None = None
) -> list[Query]:
    """Render rows to token ids.

    Args:
        form: one of FORMS.
        system_prompt: for chats without one.

    Raises:
        InputError: a row has no text for this form, or the chat template rejects it; the message names the row.
    """
    return [Query(row.id, row.label, row.category, _token_ids(row, tokenizer, form, system_prompt)) for row in rows]


def check_lengths(queries: Sequence[Query], facts: ModelFacts, answer_tokens: int) -> None:
    """Raise JobError if a query and its answer exceed the model's context."""
    for query in queries:
        n = len(query.token_ids) + answer_tokens
        if facts.context is not None and n > facts.context:
            raise JobError(
                f"query {query.id}: {len(query.token_ids)} tokens and an answer of {answer_tokens} exceed the model's "
                f"context of {facts.context:,} tokens; leave the query out"
            )


def _token_ids(row: Row, tokenizer: Any, form: str, system_prompt: str | None) -> list[int]:
    prompt = row.prompt
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if form != CHAT:
        if prompt.prompt is None:
            raise InputError(f"{row.source}, row {row.row}: it has messages, which --as {form} cannot use")
        text = _QUERY.format(query=prompt.prompt) if form == QUERY else prompt.prompt
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids
    messages = [dict(message) for message in prompt.messages or [{"role": "user", "content": prompt.prompt}]]
    system = prompt.system if prompt.system is not None else system_prompt
    if system is not None and messages[0].get("role") not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    import jinja2

    try:
        rendered: list[int] = tokenizer.apply_chat_template(
            messages, tools=prompt.tools, add_generation_prompt=True, return_dict=False
        )
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise InputError(
            f"{row.source}, row {row.row}: the model's chat template rejects it ({error}); "
            f"use --as {QUERY} or --as {TEXT} for a model without one"
        ) from error
    return rendered
