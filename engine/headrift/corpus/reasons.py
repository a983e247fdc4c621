"""Why a row is rejected: every reason by its code, with what to do about it. docs/cli.md has the same list.

The detail in the rejects says more, and may quote the row; with --redact it is the sentence from here.
"""

REASONS = {
    # the file
    "bad_csv": "The record is not valid CSV: put cells with commas, quotes or line breaks in double quotes.",
    "bad_json": "The line, or a cell that should be JSON, is not: write one whole JSON object a line.",
    "damaged_file": "The file is damaged or cut off here, so nothing after this row was read: restore it from a copy.",
    "invalid_utf8": "The row holds bytes that are not UTF-8: convert the file to UTF-8.",
    "lone_surrogate": "A text holds half a character (a lone surrogate): remove it or write the whole pair.",
    "not_an_object": "The line is JSON and no object: write an object a line, with a key `prompt` or `messages`.",
    "nul_byte": "The row holds a NUL byte: the file is no text, or UTF-16; convert it to UTF-8.",
    "row_too_big": "The line or cell is longer than 64 MiB: is the file one JSON list, or a quote left open?",
    "unreadable_rows": "This part of the Parquet file is damaged: write it anew, or restore it from a copy.",
    "wrong_columns": "The record has more or fewer cells than the first line names: quote cells that hold commas.",
    # the row
    "bad_prompt": "The prompt is neither a text nor an object: give a text, messages or token ids.",
    "duplicate_id": "An earlier row has the same id: give each row its own.",
    "no_prompt": "The row has no prompt, messages or token_ids: add the one that was sent.",
    "no_response": "Replay needs the logged answer: give it as `response`.",
    "several_prompts": "The row has more than one of prompt, messages and token_ids: keep the one that was sent.",
    "system_not_used": "`system` goes with `prompt`: put it first into messages, or name its tokens in regions.",
    "unknown_label": 'The label is unknown: write "attack" or "benign", or leave it out.',
    "wrong_type": "A field is of the wrong type: prompt is a text, messages and tools are lists of objects.",
    # the conversation
    "bad_messages": "The messages are malformed, or one has an unknown role: follow OpenAI's chat form.",
    "bad_tools": "The tools are not a list of JSON objects, each describing one tool.",
    "empty_system_prompt": "The system prompt is empty, or makes no token: give a text to measure attention on.",
    "invalid_text": "The rendered conversation is not valid Unicode: repair the encoding of the texts.",
    "no_system_prompt": "There is no system prompt: give `system`, a system message, or --system-prompt-file.",
    "no_user_message": "The conversation has no user message: add the prompt as one.",
    "prompt_too_long": "The prompt and its steps do not fit the model's context: shorten it or record fewer steps.",
    "span_not_found": "The chat template changes the text, so its tokens are not known: give token ids and regions.",
    "template_rejected": "The model's chat template does not take this conversation: change the order of the roles.",
    "unsupported_content": "A message has a part that is no text, such as an image: only text is scored.",
    # the engine
    "engine_died": "The engine died each time it was given this row, alone at last: leave it out, and report the bug.",
    # token ids
    "bad_regions": "A region is not [start, end) within the prompt, or is given without token ids.",
    "bad_token_ids": "The token ids are not a list of numbers that the model's vocabulary has.",
    "unknown_region": "A region has a name that the run was not told of: name it with --region.",
}
