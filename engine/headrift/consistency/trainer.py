"""`headrift train-consistency`: a LoRA that makes a model treat wrapped prompts as it treats clean ones.

A folder holds training.json (settings, what is held out), losses.jsonl (a line a step), checkpoint.pt and, in the end,
adapter/. Everything that a step does follows from the settings, its number and the weights so far, so a training that
was broken off goes on from its checkpoint to the same losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrift.consistency import hooks, lora, losses
from headrift.consistency.generating import answers
from headrift.consistency.pairs import Pair, fingerprint
from headrift.consistency.training_data import DataAsked, batches, load
from headrift.model_facts import read_model
from headrift.runs.folder import JobError, atomic_path, write_json
from headrift.runs.provenance import model_fingerprint, versions
from headrift.runs.resumable import ResumableParts

if TYPE_CHECKING:
    import torch

SETTINGS, LOSSES, CHECKPOINT, ADAPTER = "training.json", "losses.jsonl", "checkpoint.pt", "adapter"
ANSWERS, OUTCOME = "clean_answers.json", "outcome.json"
TARGETS = ("initial", "current")
_MAX_NORM = 1.0
# Steps until the learning rate is reached, and for how many steps it is kept.
_WARM_UP, _FULL = 10, 20
# Of the plain text that `keep` looks at in a step.
_PLAIN_TOKENS = 32
Say = Callable[[int], None]


class TrainingError(JobError):
    """The training cannot be done as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for. weights: of the losses, by their names in losses.METHODS; keep: of the loss of that name, on
    plain text, 0 for none. rank, alpha: of a new adapter; lora: one to start from instead, which has its own. layers:
    None for all. target: whose clean side the wrapped one is drawn to: of the model as it was (without any adapter), or
    as it is. steps: of `batch` pairs each, and at most `minutes` of them. answer_tokens: the longest clean answer that
    BCT trains on.
    """

    data: DataAsked
    out: Path
    weights: Mapping[str, float]
    steps: int = 100
    minutes: float | None = None
    batch: int = 4
    learning_rate: float = 3e-3
    keep: float = 0.03
    rank: int = 8
    alpha: float = 16.0
    layers: tuple[int, ...] | None = None
    target: str = "initial"
    seed: int = 0
    answer_tokens: int = 16
    lora: Path | None = None
    checkpoint_every: int = 20
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """steps: done in all, seconds: that they took; first, last: mean loss over the first and the last ten steps."""

    steps: int
    seconds: float
    first: float
    last: float


class TrainingJob:
    """One training; making it checks all that can be checked without the model."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        lora.check_peft()
        _check_numbers(asked)
        model = asked.data.model
        facts = read_model(model)
        if facts.layers is None:
            raise TrainingError(f"--model {model}: its config.json does not say how many layers it has")
        self.layers = frozenset(range(facts.layers) if asked.layers is None else asked.layers)
        if not self.layers <= set(range(facts.layers)):
            raise TrainingError(f"--layers {max(self.layers)}: the model's layers are 0 to {facts.layers - 1}")
        if asked.lora is not None:
            lora.check(asked.lora, model)
        self.data = load(asked.data, facts, asked.answer_tokens)
        self.pairs, self.rejected = self.data.trained()
        self._begin()

    @property
    def done(self) -> int:
        """How many steps the folder's checkpoint has behind it."""
        path = self.asked.out / CHECKPOINT
        return _load(path)["step"] if path.exists() else 0

    def run(self, on_step: Say | None = None) -> Outcome:
        """Train, from the checkpoint on where there is one, and write the adapter. on_step: told how many more steps
        are done."""
        trainer = Trainer(self.asked, self.layers, self.pairs, self.data.renderer.tokenizer)
        asked, out = self.asked, self.asked.out
        seconds = trainer.restore(out / CHECKPOINT)
        _cut(out / LOSSES, trainer.step)
        begun = time.monotonic() - seconds
        limit = float("inf") if asked.minutes is None else 60 * asked.minutes
        trainer.prepare(out / ANSWERS)
        whole = True  # the weights and the file of losses are those of the same step
        try:
            with open(out / LOSSES, "a", encoding="utf-8") as file:
                while trainer.step < asked.steps and time.monotonic() - begun < limit:
                    whole = False
                    line = trainer.train_step()
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    whole = True
                    if trainer.step % asked.checkpoint_every == 0:
                        trainer.save(out / CHECKPOINT, time.monotonic() - begun)
                    if on_step:
                        on_step(1)
        finally:
            if whole:
                trainer.save(out / CHECKPOINT, time.monotonic() - begun)
        trainer.model.save_pretrained(out / ADAPTER)
        values = [line["loss"] for line in read_losses(out)]
        ends = values[:10], values[-10:]
        found = Outcome(trainer.step, time.monotonic() - begun, *(sum(end) / max(1, len(end)) for end in ends))
        write_json(out / OUTCOME, asdict(found))
        return found

    def _begin(self) -> None:
        """Make the folder, or check that the training in it has the same settings."""
        data, held_out = self.asked.data, self.data.split
        about = {
            "model": str(data.model),
            "inputs": list(data.inputs),
            "columns": dict(data.columns or {}),
            "system_prompt": data.system_prompt,
            "split_seed": data.split_seed,
            "held_out_questions": data.held_out_questions,
            "limit": data.limit,
            "answer_tokens": self.asked.answer_tokens,
            "versions": versions(),
        }
        kept = {"questions": sorted(held_out.questions), "families": sorted(held_out.families)}
        results = {"held_out": kept, "pairs": len(self.pairs)}
        ResumableParts(self.asked.out, SETTINGS, self._settings(), about, resume=self.asked.resume, results=results)

    def _settings(self) -> dict[str, Any]:
        """What the losses hang on. How many steps there will be is not among it: a training can go on longer."""
        asked = self.asked
        found: dict[str, Any] = {
            "model": model_fingerprint(asked.data.model)["fingerprint"],
            "pairs": fingerprint(self.pairs),
            "weights": dict(sorted(asked.weights.items())),
            "layers": sorted(self.layers),
        }
        names = ("batch", "learning_rate", "keep", "rank", "alpha", "target", "seed", "answer_tokens")
        found |= {name: value for name, value in asdict(asked).items() if name in names}
        return found | {"lora": None if asked.lora is None else lora.fingerprint(asked.lora)}


class Trainer:
    """The model, its adapter and its optimizer, a step at a time."""

    def __init__(self, asked: Asked, layers: frozenset[int], pairs: Sequence[Pair], tokenizer: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._asked, self._layers, self._pairs, self._tokenizer = asked, layers, pairs, tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base: Any = AutoModelForCausalLM.from_pretrained(str(asked.data.model), dtype=torch.float32)
        hooks.install(base)
        self.model = lora.attach(base.to(device).eval(), asked.rank, asked.alpha, asked.seed, asked.lora)
        hooks.recompute_long(base)
        self.model.eval()  # no dropout: what a step does hangs on its number and the weights alone
        self._head, self._decoder = base.get_output_embeddings(), base.base_model
        self._weights = lora.trained(self.model)
        self._optimizer = torch.optim.AdamW(self._weights.values(), lr=asked.learning_rate, weight_decay=0.0)
        self._plain = _plain_text(tokenizer)
        self._to_step(0)
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def _to_step(self, step: int) -> None:
        """Go on with what comes after so many steps."""
        self.step, seed = step, self._asked.seed
        self._batches = batches(len(self._pairs), self._asked.batch, seed, step)
        self._excerpts = (self._plain[i] for (i,) in batches(len(self._plain), 1, seed, step))

    def prepare(self, path: Path) -> None:
        """For BCT, the answers of the model as it was to the clean prompts; path: where they are kept."""
        if not self._asked.weights.get(losses.BCT):
            return
        prompts = sorted({tuple(pair.clean_ids) for pair in self._pairs})
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            with self.model.disable_adapter():
                found = answers(self.model, self._tokenizer, prompts, self._asked.answer_tokens)
            with atomic_path(path) as unfinished:
                unfinished.write_text(json.dumps(found), encoding="utf-8")
        self._answers = dict(zip(prompts, found, strict=True))

    def train_step(self) -> dict[str, Any]:
        """Do a step; its number, loss (with each part of it) and pairs."""
        import torch

        some = [self._pairs[i] for i in next(self._batches)]
        sums: dict[str, float] = {}
        for places in hooks.in_one_pass([len(pair.wrapped_ids) for pair in some]):
            together = [some[i] for i in places]
            found = self.parts(together)
            loss = torch.stack([self._weighed(parts) for parts in found]).sum() / len(some)
            if not torch.isfinite(loss):
                pairs = ", ".join(pair.id for pair in together)
                raise RuntimeError(f"the loss of pairs {pairs} is not finite at step {self.step + 1}: lower --lr")
            loss.backward()
            for parts in found:
                for name, part in parts.items():
                    sums[name] = sums.get(name, 0.0) + float(part.detach()) / len(some)
        total = sum(self._asked.weights[name] * value for name, value in sums.items())
        if self._asked.keep:
            kept = self._kept(next(self._excerpts))
            (self._asked.keep * kept).backward()
            sums[losses.KEEP] = float(kept.detach())
            total += self._asked.keep * sums[losses.KEEP]
        torch.nn.utils.clip_grad_norm_(self._weights.values(), _MAX_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._asked.learning_rate * _pace(self.step + 1)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": total, **sums, "pairs": [pair.id for pair in some]}

    def parts(self, pairs: Sequence[Pair]) -> list[dict[str, torch.Tensor]]:
        """Of each pair, the losses that have a weight, by name; from one pass over all wrapped prompts, and one over
        all clean ones."""
        import torch

        weights = {name: weight for name, weight in self._asked.weights.items() if weight}
        rows = self._layers if losses.ATTCT in weights else frozenset[int]()
        states = losses.ACT in weights
        layers = self._layers if states else rows
        answers = [self._answers[tuple(pair.clean_ids)] if losses.BCT in weights else [] for pair in pairs]
        # An answer's last token is foretold and never read.
        prompts = [[*pair.wrapped_ids, *answer[:-1]] for pair, answer in zip(pairs, answers)]
        queries = [pair.wrapped_queries for pair in pairs]
        wrapped = hooks.run_together(self._decoder, prompts, queries, layers, states=states)
        clean = self._clean(pairs, layers, states) if layers else [None] * len(pairs)
        found: list[dict[str, torch.Tensor]] = [{} for _ in pairs]
        for parts, pair, answer, ours, theirs in zip(found, pairs, answers, wrapped, clean):
            if theirs and rows:
                keys = (
                    torch.from_numpy(at).to(self.model.device) for at in (pair.wrapped_positions, pair.clean_positions)
                )
                parts[losses.ATTCT] = losses.attct(ours.rows, theirs.rows, *keys)
            if theirs and states:
                parts[losses.ACT] = losses.act(ours.states, theirs.states)
            if answer:
                logits = self._head(ours.last[len(pair.wrapped_ids) - 1 :])
                parts[losses.BCT] = losses.bct(logits, torch.tensor(answer, device=self.model.device))
        return found

    def _kept(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The loss `keep` of a plain text."""
        import torch

        def logits() -> torch.Tensor:
            return self._head(hooks.run(self._decoder, token_ids, [], frozenset()).last)

        with torch.no_grad(), self.model.disable_adapter():
            before = logits()
        return losses.keep(logits(), before)

    def _weighed(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.stack([self._asked.weights[name] * part for name, part in parts.items()]).sum()

    def _clean(self, pairs: Sequence[Pair], layers: frozenset[int], states: bool) -> list[hooks.Pass]:
        """The clean sides, without gradient: of the model as it was, or as it is."""
        from contextlib import nullcontext

        import torch

        initial = self._asked.target == "initial"
        prompts = [pair.clean_ids for pair in pairs]
        queries = [pair.clean_queries for pair in pairs]
        with torch.no_grad(), self.model.disable_adapter() if initial else nullcontext():
            return hooks.run_together(self._decoder, prompts, queries, layers, states=states)

    def save(self, path: Path, seconds: float) -> None:
        """Write a checkpoint. seconds: that the training has taken so far."""
        import torch

        state = {
            "step": self.step,
            "seconds": seconds,
            "weights": {name: weight.detach().cpu() for name, weight in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        with atomic_path(path) as unfinished:
            torch.save(state, unfinished)

    def restore(self, path: Path) -> float:
        """Go on from a checkpoint, if there is one; the seconds that the training has taken so far."""
        import torch

        if not path.exists():
            return 0.0
        state = _load(path)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._to_step(state["step"])
        return float(state["seconds"])


def _pace(step: int) -> float:
    """The part of the learning rate that a step takes: up to 1, then down with the square root of the steps (as in
    arXiv:1706.03762), which needs no end to be known."""
    return min(step / _WARM_UP, 1.0, (_FULL / step) ** 0.5)


def _plain_text(tokenizer: Any) -> list[list[int]]:
    """Token ids of the passages that `keep` is of; an evaluation's perplexity is of another text."""
    text = (files("headrift.consistency") / "kept.txt").read_text(encoding="utf-8")
    passages = [" ".join(passage.split()) for passage in text.split("\n\n")]
    return [tokenizer(passage)["input_ids"][:_PLAIN_TOKENS] for passage in passages]


def read_losses(out: Path) -> list[dict[str, Any]]:
    """The steps of a training, as losses.jsonl has them."""
    path = out / LOSSES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _cut(path: Path, steps: int) -> None:
    """Leave the lines of the first so many steps: those of steps behind the checkpoint are done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()[:steps]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in any way
        raise TrainingError(
            f"{path} is damaged ({type(error).__name__}): delete it, and --resume begins anew"
        ) from error
    return state


def _check_numbers(asked: Asked) -> None:
    weights = asked.weights
    unknown = set(weights) - set(losses.METHODS)
    if unknown:
        raise TrainingError(f"there is no loss {sorted(unknown)[0]!r}: losses are {', '.join(losses.METHODS)}")
    if not any(weights.values()) or any(not 0 <= weight < float("inf") for weight in weights.values()):
        raise TrainingError("weights of losses are numbers of 0 or more, and at least one is above 0")
    if not 0 <= asked.keep < float("inf"):
        raise TrainingError(f"--keep {asked.keep:g} is not 0 or more")
    if asked.target not in TARGETS:
        raise TrainingError(f"--target is {' or '.join(TARGETS)}, and not {asked.target!r}")
    if not asked.learning_rate > 0:
        raise TrainingError(f"--lr {asked.learning_rate:g} is not above 0")
