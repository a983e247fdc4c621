"""`headrift train-consistency`: a LoRA that makes a model treat wrapped prompts like clean ones.

The folder has training.json (settings, what is held out), losses.jsonl (a line per step), checkpoint.pt and, at the
end, adapter/. A step depends only on the settings, its number and the weights so far, so that an interrupted training
resumes from its checkpoint to the same losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headrift.consistency import losses, models
from headrift.consistency.data import DataConfig, batches, load_data, render
from headrift.consistency.pairs import Pair, fingerprint
from headrift.model_facts import read_shape
from headrift.runs.folder import JobError, ResumableParts, atomic_path, model_fingerprint, versions, write_json

TRAINING, LOSSES, CHECKPOINT, ADAPTER = "training.json", "losses.jsonl", "checkpoint.pt", "adapter"
ANSWERS, OUTCOME = "clean_answers.json", "outcome.json"
TARGETS = ("initial", "current")
_MAX_NORM = 1.0
# Steps until the learning rate is reached, and the step until which it is kept.
_WARM_UP, _FULL = 10, 20
_PLAIN_TOKENS = 32  # of the plain text that `keep` reads in a step


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Options of `headrift train-consistency`. It ends after `steps` or `minutes`, whichever comes first."""

    data: DataConfig
    out: Path
    weights: Mapping[str, float]  # of the losses, by their names in losses.METHODS
    steps: int = 100
    minutes: float | None = None
    batch: int = 4  # pairs in a step
    learning_rate: float = 3e-3
    keep: float = 0.03  # weight of losses.keep on plain text; 0 for none
    rank: int = 8  # of a new adapter
    alpha: float = 16.0
    layers: tuple[int, ...] | None = None  # that are compared; None for all
    target: str = "initial"  # of TARGETS: the clean side is the model's without any adapter, or the current one's
    seed: int = 0
    answer_tokens: int = 16  # longest clean answer that BCT trains on
    lora: Path | None = None  # an adapter to start from, with its own rank
    checkpoint_every: int = 20
    resume: bool = False


@dataclass(frozen=True, slots=True)
class TrainResult:
    steps: int
    seconds: float
    first: float  # mean loss over the first ten steps
    last: float  # and over the last ten


class TrainingJob:
    """One training. ValueError if the config cannot be used, before the model is loaded."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        models.check_peft()
        _check(config)
        facts, n_layers, _ = read_shape(config.data.model)
        self.layers = frozenset(range(n_layers) if config.layers is None else config.layers)
        if not self.layers <= set(range(n_layers)):
            raise JobError(f"--layers {max(self.layers)}: the model's layers are 0 to {n_layers - 1}")
        if config.lora is not None:
            models.check_lora(config.lora, config.data.model)
        self.data = load_data(config.data, facts, config.answer_tokens)
        split = self.data.split
        self.pairs, self.rejected = render(self.data.renderer, [t for t in self.data.texts if split.is_trained(t)])
        held_out = {"questions": sorted(split.questions), "families": sorted(split.families)}
        results = {"held_out": held_out, "pairs": len(self.pairs)}
        ResumableParts(config.out, TRAINING, self._settings(), self._about(), resume=config.resume, results=results)

    @property
    def done(self) -> int:
        """Number of steps that the folder's checkpoint contains."""
        path = self.config.out / CHECKPOINT
        return _load(path)["step"] if path.exists() else 0

    def run(self, on_step: Callable[[int], None] | None = None) -> TrainResult:
        """Train, from the checkpoint if there is one, and write the adapter. on_step: called with 1 after each step."""
        config, out = self.config, self.config.out
        trainer = Trainer(config, self.layers, self.pairs, self.data.renderer.tokenizer)
        seconds = trainer.restore(out / CHECKPOINT)
        if (out / LOSSES).exists():  # steps that are not in the checkpoint are done again
            lines = (out / LOSSES).read_text(encoding="utf-8").splitlines()[: trainer.step]
            (out / LOSSES).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        begin = time.monotonic() - seconds
        limit = float("inf") if config.minutes is None else 60 * config.minutes
        trainer.prepare(out / ANSWERS)
        is_whole = True  # the weights and the file of losses are of the same step
        try:
            with open(out / LOSSES, "a", encoding="utf-8") as file:
                while trainer.step < config.steps and time.monotonic() - begin < limit:
                    is_whole = False
                    line = trainer.train_step()
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    is_whole = True
                    if trainer.step % config.checkpoint_every == 0:
                        trainer.save(out / CHECKPOINT, time.monotonic() - begin)
                    if on_step:
                        on_step(1)
        finally:
            if is_whole:
                trainer.save(out / CHECKPOINT, time.monotonic() - begin)
        trainer.model.save_pretrained(out / ADAPTER)
        values = [line["loss"] for line in read_losses(out)]
        ends = values[:10], values[-10:]
        result = TrainResult(trainer.step, time.monotonic() - begin, *(sum(end) / max(1, len(end)) for end in ends))
        write_json(out / OUTCOME, asdict(result))
        return result

    def _about(self) -> dict[str, Any]:
        data = self.config.data
        names = ("inputs", "columns", "system_prompt", "split_seed", "held_out_questions", "limit")
        about = {"model": str(data.model), **{name: getattr(data, name) for name in names}}
        return {**about, "answer_tokens": self.config.answer_tokens, "versions": versions()}

    def _settings(self) -> dict[str, Any]:
        """What the losses depend on; not the number of steps, so that a training can be continued."""
        config = self.config
        names = ("batch", "learning_rate", "keep", "rank", "alpha", "target", "seed", "answer_tokens")
        return {
            "model": model_fingerprint(config.data.model)["fingerprint"],
            "pairs": fingerprint(self.pairs),
            "weights": dict(sorted(config.weights.items())),
            "layers": sorted(self.layers),
            **{name: getattr(config, name) for name in names},
            "lora": None if config.lora is None else models.lora_fingerprint(config.lora),
        }


class Trainer:
    """The model, its adapter and its optimizer, one step at a time."""

    def __init__(self, config: TrainConfig, layers: frozenset[int], pairs: Sequence[Pair], tokenizer: Any) -> None:
        self._config, self._layers, self._pairs, self._tokenizer = config, layers, pairs, tokenizer
        base = models.load_model(config.data.model)
        self.model = models.attach_lora(base, config.rank, config.alpha, config.seed, config.lora)
        models.recompute_long_prompts(base)
        self.model.eval()  # no dropout: a step depends on its number and the weights only
        self._head, self._decoder = base.get_output_embeddings(), base.base_model
        self._weights = models.trainable_weights(self.model)
        self._optimizer = torch.optim.AdamW(self._weights.values(), lr=config.learning_rate, weight_decay=0.0)
        # For `keep`; an evaluation's perplexity is on another text.
        passages = Path(__file__).with_name("kept.txt").read_text(encoding="utf-8").split("\n\n")
        self._plain = [tokenizer(" ".join(text.split()))["input_ids"][:_PLAIN_TOKENS] for text in passages]
        self._set_step(0)
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def _set_step(self, step: int) -> None:
        self.step, seed = step, self._config.seed  # steps that are done
        self._batches = batches(len(self._pairs), self._config.batch, seed, step)
        self._excerpts = (self._plain[i] for (i,) in batches(len(self._plain), 1, seed, step))

    def prepare(self, path: Path) -> None:
        """For BCT, answer the clean prompts without the adapter; the answers are kept in `path`."""
        if not self._config.weights.get(losses.BCT):
            return
        prompts = sorted({tuple(pair.clean_ids) for pair in self._pairs})
        if path.exists():
            answers = json.loads(path.read_text(encoding="utf-8"))
        else:
            with self.model.disable_adapter():
                answers = models.generate(self.model, self._tokenizer, prompts, self._config.answer_tokens)
            with atomic_path(path) as unfinished:
                unfinished.write_text(json.dumps(answers), encoding="utf-8")
        self._answers = dict(zip(prompts, answers, strict=True))

    def train_step(self) -> dict[str, Any]:
        """Do a step; return its line of losses.jsonl: number, loss and its parts, pairs."""
        config, weights, sums = self._config, self._config.weights, dict[str, float]()
        pairs = [self._pairs[i] for i in next(self._batches)]
        for indices in models.batch_by_length([len(pair.wrapped_ids) for pair in pairs]):
            group = [pairs[i] for i in indices]
            parts_of_pairs = self.pair_losses(group)
            weighted = [
                torch.stack([weights[name] * part for name, part in parts.items()]).sum() for parts in parts_of_pairs
            ]
            loss = torch.stack(weighted).sum() / len(pairs)
            if not torch.isfinite(loss):
                names = ", ".join(pair.id for pair in group)
                raise RuntimeError(f"the loss of pairs {names} is not finite at step {self.step + 1}: lower --lr")
            loss.backward()
            for name, part in ((name, part) for parts in parts_of_pairs for name, part in parts.items()):
                sums[name] = sums.get(name, 0.0) + float(part.detach()) / len(pairs)
        total = sum(weights[name] * value for name, value in sums.items())
        if config.keep:
            kept = self._keep_loss(next(self._excerpts))
            (config.keep * kept).backward()
            sums[losses.KEEP] = float(kept.detach())
            total += config.keep * sums[losses.KEEP]
        torch.nn.utils.clip_grad_norm_(self._weights.values(), _MAX_NORM)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = config.learning_rate * _schedule(self.step + 1)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "loss": total, **sums, "pairs": [pair.id for pair in pairs]}

    def pair_losses(self, pairs: Sequence[Pair]) -> list[dict[str, torch.Tensor]]:
        """Each pair's losses with a weight, by name; one pass over all wrapped prompts, one over all clean ones."""
        has_rows, has_states, has_answers = (bool(self._config.weights.get(name)) for name in losses.METHODS)
        layers = self._layers if has_rows or has_states else frozenset[int]()
        answers = [self._answers[tuple(pair.clean_ids)] if has_answers else [] for pair in pairs]
        # An answer's last token is predicted and never read.
        prompts = [[*pair.wrapped_ids, *answer[:-1]] for pair, answer in zip(pairs, answers)]
        queries = [pair.wrapped_queries for pair in pairs]
        wrapped = models.forward_batch(self._decoder, prompts, queries, layers, states=has_states)
        clean: Sequence[models.ForwardPass | None] = [None] * len(pairs)
        if layers:
            with torch.no_grad(), self.model.disable_adapter() if self._config.target == "initial" else nullcontext():
                clean = models.forward_pairs(self._decoder, pairs, "clean", layers, states=has_states)
        result: list[dict[str, torch.Tensor]] = [{} for _ in pairs]
        for parts, pair, answer, own, target in zip(result, pairs, answers, wrapped, clean):
            if target and has_rows:
                positions = pair.wrapped_positions, pair.clean_positions
                keys = (torch.from_numpy(own_keys).to(self.model.device) for own_keys in positions)
                parts[losses.ATTCT] = losses.attct(own.rows, target.rows, *keys)
            if target and has_states:
                parts[losses.ACT] = losses.act(own.states, target.states)
            if answer:
                logits = self._head(own.last[len(pair.wrapped_ids) - 1 :])
                parts[losses.BCT] = losses.bct(logits, torch.tensor(answer, device=self.model.device))
        return result

    def _keep_loss(self, token_ids: Sequence[int]) -> torch.Tensor:
        """losses.keep on plain text."""
        with torch.no_grad(), self.model.disable_adapter():
            before = self._head(models.forward(self._decoder, token_ids, [], frozenset()).last)
        return losses.keep(self._head(models.forward(self._decoder, token_ids, [], frozenset()).last), before)

    def save(self, path: Path, seconds: float) -> None:
        """Write a checkpoint. seconds: of the training so far."""
        state = {
            "step": self.step,
            "seconds": seconds,
            "weights": {name: weight.detach().cpu() for name, weight in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        with atomic_path(path) as unfinished:
            torch.save(state, unfinished)

    def restore(self, path: Path) -> float:
        """Load a checkpoint, if there is one; return the seconds of the training so far."""
        if not path.exists():
            return 0.0
        state = _load(path)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._set_step(state["step"])
        return float(state["seconds"])


def _schedule(step: int) -> float:
    """Factor of the learning rate: up to 1, then down with the square root of the steps (as in arXiv:1706.03762), so
    that the number of steps need not be known."""
    return min(step / _WARM_UP, 1.0, (_FULL / step) ** 0.5)


def read_losses(out: Path) -> list[dict[str, Any]]:
    """The steps of a training, as losses.jsonl has them."""
    path = out / LOSSES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in any way
        raise JobError(f"{path} is damaged ({type(error).__name__}): delete it to restart with --resume") from error
    return state


def _check(config: TrainConfig) -> None:
    weights = config.weights
    unknown = sorted(set(weights) - set(losses.METHODS))
    for is_wrong, message in (
        (unknown, f"--method {''.join(unknown[:1])}: no such loss; give one of {', '.join(losses.METHODS)}"),
        (
            not any(weights.values()) or any(not 0 <= weight < float("inf") for weight in weights.values()),
            "--method: weights must be 0 or more, and at least one above 0",
        ),
        (not 0 <= config.keep < float("inf"), f"--keep {config.keep:g} must be 0 or more"),
        (config.target not in TARGETS, f"--target {config.target} must be {' or '.join(TARGETS)}"),
        (not config.learning_rate > 0, f"--lr {config.learning_rate:g} must be above 0"),
    ):
        if is_wrong:
            raise JobError(message)
