"""The queries that heads are looked for with: files in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrift.corpus import sources
from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.sources import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How a query is put to the model: as a user's message in its chat template, in the form that the paper's released code
# gives base models, or as it is.
CHAT, QUERY, TEXT = FORMS = ("chat", "query", "text")
_QUERY = "## Query:{query} \n## Answer:"
# The column of a query in public sets (maliciousinstruct.csv, advbench.csv, jailbreakbench.csv).
_PUBLIC_COLUMN = "input"


@dataclass(frozen=True, slots=True)
class Query:
    """A query as the model gets it. label, category: as its row has them, or None."""

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
    """The rows of .txt, .jsonl, .csv and .parquet files, as `headrift score` takes them; a column `input` is a prompt.

    label: only rows with this one. limit: the first so many of them. labels: one per input, for rows that bring none.
    InputError, which names the row, where there is none or one cannot be used.
    """
    found = sources.find(inputs, labels)
    try:
        reader = Reader(found, columns)
    except InputError:
        if columns:
            raise
        try:
            reader = Reader(found, {"prompt": _PUBLIC_COLUMN})
        except InputError:
            reader = Reader(found)  # which says what is missing
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
        raise InputError(f"there is no {what} in {', '.join(inputs)}: give a file with at least one")
    return rows


def prepare(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, form: str = CHAT, system_prompt: str | None = None
) -> list[Query]:
    """The rows' token ids. system_prompt: of chats that bring none. InputError, which names the row, where a row has
    no text for this form, or the model's chat template does not take it."""
    return [Query(row.id, row.label, row.category, _token_ids(row, tokenizer, form, system_prompt)) for row in rows]


def _token_ids(row: Row, tokenizer: Any, form: str, system_prompt: str | None) -> list[int]:
    prompt = row.prompt
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if form != CHAT:
        if prompt.prompt is None:
            raise InputError(f"{row.source}, row {row.row}: it has messages, which --as {form} has no place for")
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
            f"{row.source}, row {row.row}: the model's chat template does not take it ({error}); "
            f"without one, ask with --as {QUERY} or --as {TEXT}"
        ) from error
    return rendered
