"""A vLLM engine with the recorder in it: token ids and named spans in, finished answers and recorded masses out."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from headrift import ablation, signal
from headrift.aligned_keys import check_rows, check_runs
from headrift.engine_setup import (
    attention_args,
    compiled_model_found,
    cores_divided,
    engine_config,
    garbage_left,
    instructions,
    llvmlite_out_of_sight,
    lora_args,
    machine_defaults,
    memory_taken_on_use,
    prepare_environment,
)
from headrift.errors import EngineError, RefusedError
from headrift.ranks import merge_descriptions, merge_recordings
from headrift.requests import Finished, ProbeRequest, Recording, Ticket
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

Key = TypeVar("Key")
# Finished requests that are collected together.
_DRAIN = 8
REGIONS = ("system", "user", "prompt")


class ProbedEngine:
    """vLLM, started with headrift's plugin. A context manager; not to be shared between threads.

    model: a folder or name vLLM can load. steps: N, the most steps (0..N) a request may record. regions: names of the
    key ranges, `system` and `prompt` among them. slots: the most requests in flight (twice max_num_seqs by default).
    logit_stats: record next-token statistics too. attention_backend: auto, cpu, triton or flash. engine_args: passed to
    vLLM as they are, over the defaults chosen for this machine. verbose: let vLLM log. ablation: requests may ablate
    heads. references: so many next-token distributions can be kept to compare others with. hidden_states: so many
    hidden states can be kept to tell angles by. row_references, row_keys: of so many requests the attention rows, over
    so many keys at most (prompt tokens and steps), can be kept to compare others' with: row_references x layers x heads
    x (steps + 1) x row_keys x 4 bytes. row_entropy: requests may ask for the entropy of their attention rows. lora: the
    folder of an adapter (LoRA, as peft writes it) that every request is answered with.
    """

    # The engine that runs in this very process, where there is one.
    _in_process: ClassVar[ProbedEngine | None] = None

    @garbage_left()
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        steps: int,
        regions: Sequence[str] = REGIONS,
        slots: int | None = None,
        logit_stats: bool = False,
        attention_backend: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
        ablation: bool = False,
        references: int = 0,
        hidden_states: int = 0,
        row_references: int = 0,
        row_keys: int = 0,
        row_entropy: bool = False,
        lora: str | os.PathLike[str] | None = None,
    ):
        if not {"system", "prompt"} <= set(regions) or len(set(regions)) != len(regions):
            raise ValueError(
                f"regions must be distinct names with 'system' and 'prompt' among them, not {list(regions)}"
            )
        prepare_environment(verbose)
        given = {**attention_args(attention_backend), **(engine_args or {})}
        ranks = given.get("tensor_parallel_size", 1)
        args = {"model": os.fspath(model), "disable_log_stats": True, **machine_defaults(ranks), **given}
        args |= {} if lora is None else lora_args(os.fspath(lora))
        if "max_num_seqs" not in given and "max_num_batched_tokens" in given:  # vLLM refuses more of the former
            args["max_num_seqs"] = min(args["max_num_seqs"], given["max_num_batched_tokens"])
        self.regions = tuple(regions)
        self.steps = steps
        self.ablates = ablation
        self.references = references
        self.hidden_states = hidden_states
        self.row_references, self.row_keys = row_references, row_keys
        self.row_entropy = row_entropy
        self._row_prompts: dict[int, int] = {}
        self.slots = slots or 2 * args["max_num_seqs"]
        additional = args.get("additional_config", {})
        recorder = {
            "slots": self.slots,
            "steps": steps,
            "regions": len(regions),
            "prompt_region": self.regions.index("prompt"),
            "logit_stats": logit_stats,
            "ablation": ablation,
            "references": references,
            "hidden_states": hidden_states,
            "row_references": row_references,
            "row_keys": row_keys,
            "row_entropy": row_entropy,
            **additional.get("headrift", {}),
        }
        args["additional_config"] = {**additional, **instructions(), "headrift": recorder}
        args["worker_extension_cls"] = plugin.WORKER_EXTENSION
        config = engine_config(args, attention_backend)
        self.max_model_len: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.width: int = config.model_config.get_hidden_size()
        self._ranks = config.parallel_config.tensor_parallel_size
        self._start(config)
        self._lora = None if lora is None else _lora_request(os.fspath(lora))
        self.llm_engine.collective_rpc("headrift_warm_up")
        if hidden_states:
            self.llm_engine.collective_rpc("headrift_keep_hidden_states")
        described = merge_descriptions(self.llm_engine.collective_rpc("headrift_describe"))
        self.layers: int = described["layers"]
        self.heads: int = described["heads"]
        self.windows: list[int | None] = described["windows"]
        self.sinks: bool = described["sinks"]
        self.dtype: str = described["dtype"]
        self.recorder_bytes: int = described["recorder_bytes"]
        self._free = list(range(self.slots))[::-1]
        self._submitted = 0
        self._running: dict[str, tuple[int, int, ProbeRequest]] = {}
        self._slot_of: dict[int, int] = {}
        self._tickets = 0
        self._unread: set[int] = set()
        self.steps_run = 0

    def _start(self, config: VllmConfig) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        self._claim_process()
        try:
            # What is there by now is kept, and no collection of vLLM's goes through it.
            gc.freeze()
            ranks = config.parallel_config.local_world_size
            compiled = not config.model_config.enforce_eager
            found = compiled_model_found(compiled)
            with llvmlite_out_of_sight(), memory_taken_on_use(), found, cores_divided(ranks):
                self.llm_engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except BaseException as error:
            self.close()
            if isinstance(error, RefusedError) or not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            raise EngineError(f"vLLM could not start with {config.model_config.model}: {error}") from error

    def __enter__(self) -> ProbedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        engine = self.__dict__.pop("llm_engine", None)
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            gc.unfreeze()
            gc.collect()
        if ProbedEngine._in_process is self:
            ProbedEngine._in_process = None

    def _claim_process(self) -> None:
        """vLLM's parallel state belongs to the process: closing one engine would pull it from under another."""
        import vllm.envs

        if vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            return
        if ProbedEngine._in_process is not None:
            raise EngineError(
                "another engine runs in this process; close it first, or start this one in a process of its own"
            )
        ProbedEngine._in_process = self

    @property
    def free_slots(self) -> int:
        """How many more requests can be submitted now; a slot comes back when its request is collected."""
        return len(self._free)

    @property
    def running(self) -> int:
        """How many submitted requests have not finished."""
        return len(self._running)

    def most_prompt_tokens(self, steps: int) -> int:
        """The longest prompt that leaves room for `steps` recorded steps in the model's context."""
        return self.max_model_len - steps - 1

    def submit(self, request: ProbeRequest) -> int:
        """Queue a request; returns its request id.

        RuntimeError without a free slot; ValueError where prompt and steps do not fit the context, and where heads are
        to be ablated that the model does not have, or in a way this engine cannot.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if not self._free:
            raise RuntimeError("every slot is taken; collect finished requests first")
        fed = list(request.prompt_ids)
        tokens = max(request.steps + 1, request.answer_tokens or 0)
        if request.answer_ids is not None:
            fed += list(request.answer_ids)[: signal.n_steps(len(request.answer_ids), request.steps)]
            tokens = 1
        if len(fed) + tokens > self.max_model_len:
            raise ValueError(f"{len(fed)} tokens and {tokens} more do not fit the context of {self.max_model_len}")
        self._check_ablation(request)
        extra_rows = self._rows(request)
        slot, request_id = self._free[-1], self._submitted
        regions = {**request.regions, "prompt": (0, len(request.prompt_ids))}
        extra: dict[str, Any] = {
            "slot": slot,
            "tenant": request_id,
            "prompt_len": len(request.prompt_ids),
            "regions": [list(regions.get(name, (0, 0))) for name in self.regions],
            "steps": request.steps,
        }
        if request.ablate:
            extra |= {"ablate": [list(entry) for entry in request.ablate], "epsilon": request.epsilon}
        kept = {"keep": request.keep_as, "compare": request.compare_with, "hidden": request.hidden_as}
        extra |= {key: number for key, number in kept.items() if number is not None} | extra_rows
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=request.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if _answers_on(request) else RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True if request.skip_prefix_cache else None,
            prompt_logprobs=0 if request.logprobs else None,
            extra_args={"headrift": extra} if request.probed else None,
        )
        name = str(request_id)
        prompt = TokensPrompt(prompt_token_ids=fed)
        salt = ablation.salt(request.ablate, request.epsilon)
        if salt is not None:
            prompt["cache_salt"] = salt
        self.llm_engine.add_request(name, prompt, params, lora_request=self._lora)
        self._free.pop()
        if request.rows_as is not None:
            self._row_prompts[request.rows_as] = len(request.prompt_ids)
        self._submitted += 1
        self._running[name] = (slot, request_id, request)
        return request_id

    def _rows(self, request: ProbeRequest) -> dict[str, Any]:
        """What the workers are told of a request whose attention rows are measured, kept or compared. ValueError where
        they cannot be."""
        references, own = (request.rows_as, request.rows_against), len(request.prompt_ids)
        if references == (None, None) and not request.row_entropy:
            return {}
        if not request.probed:
            raise ValueError("a request whose attention rows are taken has to be probed: leave `probed` at True")
        if request.row_entropy and not self.row_entropy:
            raise ValueError(
                "attention entropy is asked for, and this engine was not started for that: set row_entropy=True"
            )
        if references == (None, None):
            return {}
        other = own if request.rows_against is None else self._row_prompts.get(request.rows_against, 0)
        check_rows(references, other, own, request.steps, kept=self.row_references, keys=self.row_keys)
        if not other:
            raise ValueError(f"rows {request.rows_against} have not been kept: submit a request with rows_as first")
        check_runs(request.aligned, other, own)
        extra: dict[str, Any] = {"rows_as": request.rows_as, "rows_against": request.rows_against}
        return extra | {"other_len": other, "aligned": [list(run) for run in request.aligned]}

    def _check_ablation(self, request: ProbeRequest) -> None:
        """ValueError where the request's heads cannot be ablated, or what it refers to is not kept."""
        for reference in (request.keep_as, request.compare_with):
            if reference is not None and not 0 <= reference < self.references:
                raise ValueError(f"there is no reference {reference}; this engine keeps {self.references}")
        if request.hidden_as is not None and not 0 <= request.hidden_as < self.hidden_states:
            raise ValueError(f"there is no hidden state {request.hidden_as}; this engine keeps {self.hidden_states}")
        if not request.ablate:
            return
        if not self.ablates:
            raise ValueError("heads are to be ablated, and this engine was not started for that: set ablation=True")
        ablation.check(request.ablate, request.epsilon)
        ablation.check_heads(request.ablate, self.layers, self.heads)
        if not request.probed:
            raise ValueError("a request that ablates heads has to be probed: leave `probed` at True")
        if self._ranks > 1 and any(kind in ablation.MEANS for *_, kind in request.ablate):
            raise ValueError(
                "the mean over heads needs all of them on one device: use one rank (tensor_parallel_size=1), or "
                f"another kind of ablation ({', '.join(kind for kind in ablation.SIDES if kind not in ablation.MEANS)})"
            )

    def step(self) -> list[Finished]:
        """Run the engine once; the requests that finished in it, and those whose last step was recorded in it and that
        answer on."""
        done = []
        outputs = self.llm_engine.step()
        self.steps_run += 1
        for output in outputs:
            if output.request_id not in self._running:  # stopped while this step ran
                continue
            slot, request_id, request = self._running[output.request_id]
            completion = output.outputs[0]
            if output.finished:
                del self._running[output.request_id]
                self._slot_of[request_id] = slot
            elif len(completion.token_ids) != request.steps + 1:
                continue
            answer = list(completion.token_ids if request.answer_ids is None else request.answer_ids)
            cached = output.num_cached_tokens or 0
            reason, answering = completion.finish_reason, not output.finished
            logprobs = _logprobs(request, output.prompt_logprobs) if request.logprobs else None
            done.append(Finished(request_id, request, answer, reason, cached, answering, logprobs))
        return done

    def stop(self, request_id: int) -> bool:
        """End a request that answers on, and free its slot; False where it has finished by now."""
        if str(request_id) not in self._running:
            return False
        self.llm_engine.abort_request([str(request_id)])
        slot, _, _ = self._running.pop(str(request_id))
        self._free.append(slot)
        return True

    def collect(self, finished: Sequence[Finished], want_mass: bool = False) -> Ticket:
        """Start copying the recordings of finished requests off the device, all at once, and free their slots; those
        that answer on keep theirs.

        The copies need not have arrived before the next `step`: read them with `recordings` when it has run.
        """
        ticket = Ticket(self._tickets, tuple(finished), want_mass)
        self._tickets += 1
        probed = ticket.probed
        if probed:
            rows = max(f.n_steps for f in probed) + 1
            tenants = [(self._slot(f), f.request_id) for f in probed]
            system, prompt = self.regions.index("system"), self.regions.index("prompt")
            self._unread.add(ticket.number)
            self.llm_engine.collective_rpc(
                "headrift_collect", args=(ticket.number, tenants, rows, system, prompt, want_mass)
            )
        # Every rank has enqueued its copies by now, ahead of whatever the slots' next requests will have it do.
        for f in finished:
            if not f.answering:
                self._free.append(self._slot_of.pop(f.request_id))
        return ticket

    def _slot(self, finished: Finished) -> int:
        """The slot that a request has; one that answers on may have finished since it was reported."""
        running = self._running.get(str(finished.request_id))
        return self._slot_of[finished.request_id] if running is None else running[0]

    def recordings(self, ticket: Ticket) -> list[Recording]:
        """The recordings of a ticket's probed requests, in their order; waits until they have arrived.

        RuntimeError where a recording contradicts itself: the engine is then not to be trusted. ValueError where the
        ticket has been read already or was dropped by `abort`.
        """
        if not ticket.probed:
            return []
        if ticket.number not in self._unread:
            raise ValueError(f"ticket {ticket.number} has been read already, or was dropped by abort()")
        self._unread.remove(ticket.number)
        answers = self.llm_engine.collective_rpc("headrift_fetch", args=(ticket.number,))
        arrays = merge_recordings(answers, self.layers, self.heads)
        recordings = []
        for i, f in enumerate(ticket.probed):
            n = f.n_steps + 1
            mass = arrays["mass"][i, :n] if ticket.want_mass else None
            kl = float(arrays["divergence"][i]) if "divergence" in arrays else float("nan")
            distance = arrays["distance"][i, :n] if "distance" in arrays else None
            entropy = arrays["row_entropy"][i, :n] if f.request.row_entropy else None
            of_steps = arrays["share"][i, :n], arrays["first"][i], arrays["stats"][i, :n]
            recordings.append(Recording(*of_steps, mass, kl, distance, entropy))
            self._check(f, float(arrays["astray"][i]))
        return recordings

    def run(
        self,
        requests: Iterable[tuple[Key, ProbeRequest] | None],
        *,
        want_mass: bool = False,
        at_once: int | None = None,
        stop_if: Callable[[Key, Finished, Recording], bool] | None = None,
    ) -> Generator[tuple[Key, Finished, Recording | None], None, None]:
        """Run requests; yield each as soon as it is done. The engine loop that everything uses.

        Requests are taken one at a time as slots free up, so `requests` may be a generator that decides late what runs
        next, from results that were yielded by then. Recordings leave the device several at a time, while the next step
        runs. A replayed request that misses steps, because a cached prefix block covered them, runs again by itself
        with `skip_prefix_cache`. If the caller stops early (`close`, an exception), what runs is aborted.

        Args:
            requests: (key, request) pairs. The key is anything that tells the caller which request a result belongs to.
                None: the next request depends on a result that is still to come; ask again after the next step.
            want_mass: recordings contain the masses.
            at_once: most requests in flight; default: all slots.
            stop_if: called with key, finished request and recording of a request that answers on past its recorded
                steps (`answer_tokens`), once they are recorded. True ends the answer there; the request is then yielded
                with `finished.answering` True.

        Yields:
            (key, finished request, recording) in order of completion; the recording is None if not `probed`.

        Raises:
            RuntimeError: steps are missing although no cached prefix was read; or `requests` gives None while nothing
                is in flight.
            ValueError: see `submit`.
        """
        source, most = iter(requests), at_once or self.slots
        in_flight: dict[int, Key] = {}
        again: deque[tuple[Key, ProbeRequest]] = deque()
        finished: list[Finished] = []
        ticket: Ticket | None = None
        try:
            while True:
                entry: tuple[Key, ProbeRequest] | tuple[()] | None = None
                while self.free_slots and self.running < most:
                    entry = again.popleft() if again else next(source, ())
                    if not entry:
                        break
                    in_flight[self.submit(entry[1])] = entry[0]
                if not (in_flight or finished or ticket):
                    if entry is None:
                        raise RuntimeError("the next request waits for a result, and no request is in flight")
                    return
                results: list[tuple[Key, Finished, Recording | None]] = []
                if self.running:
                    done = [f for f in self.step() if not f.answering or (stop_if and f.request.probed)]
                    finished += [f for f in done if f.request.probed]
                    unprobed = [f for f in done if not f.request.probed]
                    self.collect(unprobed)  # there is nothing to copy: their slots are free
                    results += [(in_flight.pop(f.request_id), f, None) for f in unprobed]
                if ticket:
                    # The copies have left the device while this step ran.
                    for f, recording in zip(ticket.probed, self.recordings(ticket), strict=True):
                        if f.request_id not in in_flight:
                            continue  # its answer was stopped when it had ended already
                        if recording.missing_steps and not f.answering:
                            again.append((in_flight.pop(f.request_id), _without_prefix_cache(f, recording)))
                        elif not f.answering or (stop_if and stop_if(in_flight[f.request_id], f, recording)):
                            results.append((in_flight.pop(f.request_id), f, recording))
                            if f.answering:
                                self.stop(f.request_id)
                    ticket = None
                urgent = not self.free_slots or not self.running or any(f.answering for f in finished)
                if finished and (urgent or entry is None or len(finished) >= _DRAIN):
                    ticket, finished = self.collect(finished, want_mass), []
                yield from results
        finally:
            if in_flight or finished or ticket:
                self.abort()

    def drain(self, finished: Sequence[Finished], want_mass: bool = False) -> list[Recording]:
        """`collect` and `recordings` in one, for a caller with nothing to do in between."""
        return self.recordings(self.collect(finished, want_mass))

    def turned(self, clean: Sequence[int], ablated: Sequence[Sequence[int]], r_main: int) -> np.ndarray:
        """How far each of n sets of kept hidden states is turned away from the clean ones: principal angles [n, r_main]
        in degrees, smallest first, see `headrift.subspace`.

        clean: the numbers (`hidden_as`) of the queries' hidden states; ablated: n lists of as many. NaN where one was
        not kept, or queries are alike. ValueError where r_main is not 1 to the number of queries and of components.
        """
        most = min(len(clean), self.width)
        if not 1 <= r_main <= most:
            raise ValueError(f"r_main is 1 to {most} for {len(clean)} queries, not {r_main}")
        if any(len(row) != len(clean) for row in ablated):
            raise ValueError("every ablated set has as many hidden states as the clean one")
        missing = {*clean, *(number for row in ablated for number in row)} - set(range(self.hidden_states))
        if missing:
            raise ValueError(f"there is no hidden state {min(missing)}; this engine keeps {self.hidden_states}")
        asked = list(clean), [list(row) for row in ablated], r_main
        # Every rank has the whole of a hidden state, and finds the same.
        return np.reshape(self.llm_engine.collective_rpc("headrift_turned", args=asked)[0], (len(ablated), r_main))

    def abort(self) -> None:
        """Drop every request in flight and free its slot; drop what was collected and not read."""
        self.llm_engine.abort_request(list(self._running))
        for slot, _, _ in self._running.values():
            self._free.append(slot)
        self._running.clear()
        for slot in self._slot_of.values():
            self._free.append(slot)
        self._slot_of.clear()
        if self._unread:
            self.llm_engine.collective_rpc("headrift_forget")
            self._unread.clear()

    def _check(self, finished: Finished, astray: float) -> None:
        """Step 0 sees the prompt and nothing else, so its prompt mass is 1 (less with sinks, never more)."""
        if not self.sinks and astray > 1e-3:
            raise RuntimeError(
                f"request {finished.request_id}: a head's prompt mass at step 0 is {astray:.6f} away from 1; "
                "do not trust this engine's numbers"
            )


def _lora_request(folder: str) -> LoRARequest:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, folder)


def _logprobs(request: ProbeRequest, of_tokens: Sequence[Any]) -> list[float]:
    """Of the prompt's tokens, out of what vLLM says of each position."""
    return [float(of[token].logprob) for of, token in zip(of_tokens[1:], request.prompt_ids[1:])]


def _without_prefix_cache(finished: Finished, recording: Recording) -> ProbeRequest:
    """The request, to compute the steps that a cached prefix block covered. RuntimeError if it was that already."""
    if finished.request.skip_prefix_cache:
        raise RuntimeError(f"the engine never computed steps {recording.missing_steps}, even without cached prefixes")
    return replace(finished.request, skip_prefix_cache=True)


def _answers_on(request: ProbeRequest) -> bool:
    return request.answer_ids is None and (request.answer_tokens or 0) > request.steps + 1
