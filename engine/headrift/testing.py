"""Doubles for tests of what is built on headrift: an engine without vLLM, and a model's folder that loads at once.

    model = write_fake_model(tmp_path / "model")
    with fake_engines():
        CliRunner().invoke(app, ["score", "in.jsonl", "--model", str(model), "--out", "out"])

Everything else is real: reading, chat rendering, scheduling, scores, parts. The fake model has a token for each byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headrift import signal
from headrift.probed_engine import REGIONS, ProbedEngine
from headrift.requests import Finished, ProbeRequest, Recording, Ticket
from headrift.scorer import engine_factory

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")  # their ids follow those of the 256 bytes


class FakeEngine(ProbedEngine):
    """A ProbedEngine without vLLM and without a model.

    Its numbers are drawn from a request's token ids, so equal requests have equal results. Every request finishes in
    the step after it was submitted. An answer is `answer` over and over; it ends after one token if the sum of the
    prompt's token ids is divisible by `short_every`.

    Args:
        layers: Of the model that it stands for, as heads, max_model_len and vocabulary.
        slots: The most requests in flight.
        short_every: 0 for no short answers.
        on_submit: Called with each request; may raise.
        ignored: Other arguments of ProbedEngine.
    """

    dtype = "float32"
    recorder_bytes = 1_000_000
    sinks = False

    def __init__(
        self,
        model: object,
        *,
        steps: int,
        regions: Sequence[str] = REGIONS,
        layers: int = 6,
        heads: int = 3,
        slots: int = 4,
        max_model_len: int = 4096,
        vocabulary: int = 256 + len(CONTROL_TOKENS),
        answer: str = "The capital of France is Paris. ",
        short_every: int = 3,
        on_submit: Callable[[ProbeRequest], None] = lambda request: None,
        **ignored: Any,
    ) -> None:
        self.steps, self.regions, self.slots = steps, tuple(regions), slots
        self.layers, self.heads, self.windows = layers, heads, [None] * layers
        self.max_model_len, self.vocabulary = max_model_len, vocabulary
        self._answer, self._short_every, self._on_submit = list(answer.encode()), short_every, on_submit
        self._queue: list[Finished] = []
        self._want_mass = False
        self._taken_slots = self._submitted = self._tickets = self.steps_run = 0

    def close(self) -> None:
        """Nothing to free."""

    @property
    def free_slots(self) -> int:
        return self.slots - self._taken_slots

    @property
    def running(self) -> int:
        return len(self._queue)

    def submit(self, request: ProbeRequest) -> int:
        """Queue a request; return its id. As strict as a ProbedEngine about slots, token ids and length."""
        self._on_submit(request)
        if not self.free_slots:
            raise RuntimeError("every slot is taken; collect finished requests first")
        if not all(0 <= token < self.vocabulary for token in request.prompt_ids):
            raise ValueError("a token is not one of the model's")
        tokens = max(request.steps + 1, request.answer_tokens or 0)
        length = len(request.prompt_ids)
        if request.answer_ids is None and length + tokens > self.max_model_len:
            raise ValueError(f"{length} tokens and {tokens} more do not fit the context of {self.max_model_len}")
        if request.answer_ids is not None:
            answer, short = list(request.answer_ids), True
        else:
            short = bool(self._short_every) and sum(request.prompt_ids) % self._short_every == 0
            answer = self._answer[:1] if short else (self._answer * tokens)[:tokens]
        self._queue.append(Finished(self._submitted, request, answer, "stop" if short else "length", 0))
        self._taken_slots += 1
        self._submitted += 1
        return self._submitted - 1

    def step(self) -> list[Finished]:
        self.steps_run += 1
        finished, self._queue = self._queue, []
        return finished

    def collect(self, finished: Sequence[Finished], want_mass: bool = False) -> Ticket:
        self._taken_slots -= len(finished)
        self._tickets += 1
        self._want_mass = want_mass
        return Ticket(self._tickets, tuple(finished))

    def recordings(self, ticket: Ticket) -> list[Recording]:
        return [self._recording(done) for done in ticket.probed]

    def _recording(self, done: Finished) -> Recording:
        """Masses that a softmax could have: the system prompt's is within the prompt's, which is 1 at step 0."""
        ids = np.asarray(done.request.prompt_ids, np.int64)
        random = np.random.default_rng(list(hashlib.blake2b(ids.tobytes(), digest_size=8).digest()))
        mass = random.random((done.n_steps + 1, self.layers, self.heads, len(self.regions)), np.float32)
        prompt, system = (self.regions.index(name) for name in ("prompt", "system"))
        mass[0, ..., prompt] = 1.0
        others = [i for i in range(len(self.regions)) if i != prompt]
        mass[..., others] *= mass[..., prompt, None] / len(others)
        share = signal.share(mass[..., system], mass[..., prompt]).astype(np.float32)
        stats = np.sort(random.random((len(share), 3), np.float32))[:, ::-1]
        return Recording(share, mass[0][..., others], mass if self._want_mass else None, {"stats": stats})

    def stop(self, request_id: int) -> bool:
        """False: every request has finished."""
        return False

    def abort(self) -> None:
        self._queue, self._taken_slots = [], 0


@contextmanager
def fake_engines(factory: Callable[..., Any] = FakeEngine, **options: Any) -> Iterator[None]:
    """Within this, every scorer and job of this process makes its engine by `factory`, with these further options."""
    token = engine_factory.set(partial(factory, **options))
    try:
        yield
    finally:
        engine_factory.reset(token)


def write_fake_model(folder: Path, **config: Any) -> Path:
    """Make a folder that passes for a model, and return it: a real tokenizer and chat template, and empty weights.

    `config` is for config.json, as `max_position_embeddings=64`, over the shape of a FakeEngine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    characters = _byte_characters()
    added = [
        {"id": 256 + i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(CONTROL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": CONTROL_TOKENS[1]}
    shape = {"num_hidden_layers": 6, "num_attention_heads": 3, "max_position_embeddings": 4096}
    files = {"config.json": shape | config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def text_of(token_ids: Sequence[int]) -> str:
    """The text of token ids of the fake model, without control tokens."""
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


def _byte_characters() -> list[str]:
    """The character that a byte-level tokenizer writes each byte as: itself if that is printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
