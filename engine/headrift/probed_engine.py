"""A vLLM engine with the recorder in it: token ids and named spans in, finished answers and recorded masses out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headrift import signal, vllm_engine
from headrift.requests import Finished, ProbeRequest, Recording, Ticket
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from headrift.vllm_plugin.instruments import Instrument

Key = TypeVar("Key")
REGIONS = ("system", "user", "prompt")


class ProbedEngine:
    """vLLM, started with headrift's plugin. A context manager; not to be shared between threads.

    Args:
        model: A folder or name that vLLM can load.
        steps: N; requests may record steps 0..N.
        regions: Names of the key ranges, `system` and `prompt` among them.
        slots: Requests in flight (default: twice max_num_seqs).
        attention_backend: auto, cpu, triton or flash.
        engine_args: vLLM's own, over the defaults for this machine.
        verbose: Let vLLM log.
        lora: Folder of a LoRA adapter, as peft writes it, that every request is answered with.
        **options: What else requests may ask for (the instruments' options), by name:
            logit_stats: Record next-token statistics of all probed requests.
            ablation: Requests may ablate heads.
            references: Next-token distributions that can be kept to compare others with.
            hidden_states: Hidden states that can be kept, to compare subspaces.
            row_references, row_keys: Requests whose attention rows can be kept, and over how many keys (prompt tokens
                and steps): row_references x layers x heads x (steps + 1) x row_keys x 4 bytes.
            row_entropy: Requests may ask for the entropy of their attention rows.

    Raises:
        ValueError: regions or options do not make sense.
        EngineError: vLLM cannot start with these settings.
        RefusedError: the engine cannot be measured.

    Attributes:
        options: All options with their values.
        layers, heads: Of the model; windows: sliding window of each layer (None: none); sinks: whether any head has an
            attention sink; dtype; vocabulary; width of a hidden state; max_model_len: tokens of the context.
        recorder_bytes: Device memory of the recorder, over all ranks.
        steps_run: Engine steps so far.
    """

    @vllm_engine.paused_garbage_collection()
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        steps: int,
        regions: Sequence[str] = REGIONS,
        slots: int | None = None,
        attention_backend: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
        lora: str | os.PathLike[str] | None = None,
        **options: int,
    ):
        if not {"system", "prompt"} <= set(regions) or len(set(regions)) != len(regions):
            raise ValueError(f"regions are distinct names with 'system' and 'prompt' among them, not {list(regions)}")
        vllm_engine.prepare_environment(verbose)
        from vllm.lora.request import LoRARequest

        from headrift.vllm_plugin.instruments import instrument_types, parse_config

        user_args = {**vllm_engine.attention_args(attention_backend), **(engine_args or {})}
        defaults = vllm_engine.machine_defaults(user_args.get("tensor_parallel_size", 1))
        args = {"model": os.fspath(model), "disable_log_stats": True, **defaults, **user_args}
        args |= {} if lora is None else vllm_engine.lora_args(os.fspath(lora))
        if "max_num_seqs" not in user_args and "max_num_batched_tokens" in user_args:  # vLLM refuses more of the former
            args["max_num_seqs"] = min(args["max_num_seqs"], user_args["max_num_batched_tokens"])
        self.regions = tuple(regions)
        self.steps = steps
        self.slots = slots or 2 * args["max_num_seqs"]
        additional = args.get("additional_config", {})
        settings = {
            "slots": self.slots,
            "steps": steps,
            "regions": len(regions),
            "system_region": self.regions.index("system"),
            "prompt_region": self.regions.index("prompt"),
            **options,
            **additional.get("headrift", {}),
        }
        recorder_config = parse_config(settings)
        self.options = dict(recorder_config.options)
        args["additional_config"] = {**additional, "headrift": settings}
        args["worker_extension_cls"] = plugin.WORKER_EXTENSION
        config = vllm_engine.engine_config(args, attention_backend)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.max_model_len: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.width: int = config.model_config.get_hidden_size()
        self.llm_engine = vllm_engine.start_llm_engine(config)
        self._lora = None if lora is None else LoRARequest("adapter", 1, os.fspath(lora))
        description = vllm_engine.merge_descriptions(self.llm_engine.collective_rpc("headrift_start"))
        self.layers: int = description["layers"]
        self.heads: int = description["heads"]
        self.windows: list[int | None] = description["windows"]
        self.sinks: bool = description["sinks"]
        self.recorder_bytes: int = description["recorder_bytes"]
        ranks = config.parallel_config.tensor_parallel_size
        self._config = replace(recorder_config, layers=self.layers, heads=self.heads, ranks=ranks)
        # What each instrument remembers of earlier requests.
        self._instruments: dict[type[Instrument], dict[int, int]] = {kind: {} for kind in instrument_types()}
        self._free = list(range(self.slots))[::-1]
        self._running: dict[int, ProbeRequest] = {}
        self._slots: dict[int, int] = {}  # of requests that are submitted and not collected
        self._unread: set[int] = set()
        self._submitted = self._tickets = self.steps_run = 0

    def __enter__(self) -> ProbedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if "llm_engine" in vars(self):
            vllm_engine.stop_llm_engine(vars(self).pop("llm_engine"))

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
        """Queue a request and return its id.

        Raises:
            RuntimeError: no slot is free.
            ValueError: prompt and steps exceed the context, or this engine cannot do what the request asks.
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
            raise ValueError(f"{len(fed)} tokens and {tokens} more exceed the context of {self.max_model_len} tokens")
        slot, request_id = self._free[-1], self._submitted
        extra = self._probe(request, slot, request_id)
        answers_on = request.answer_ids is None and (request.answer_tokens or 0) > request.steps + 1
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=request.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if answers_on else RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True if request.skip_prefix_cache else None,
            prompt_logprobs=0 if request.logprobs else None,
            extra_args={"headrift": extra} if request.probed else None,
        )
        prompt = TokensPrompt(prompt_token_ids=fed)
        salts = [salt for kind in self._instruments if (salt := kind.cache_salt(request)) is not None]
        if salts:
            prompt["cache_salt"] = " ".join(salts)
        self.llm_engine.add_request(str(request_id), prompt, params, lora_request=self._lora)
        for kind, memory in self._instruments.items():
            memory.update(kind.remember(request))
        self._submitted += 1
        self._running[request_id], self._slots[request_id] = request, self._free.pop()
        return request_id

    def _probe(self, request: ProbeRequest, slot: int, request_id: int) -> dict[str, Any]:
        """What the workers are told of a request; ValueError if this engine cannot do what it asks."""
        from headrift.vllm_plugin.instruments import parse_probe

        fields: dict[str, Any] = {}
        for kind, memory in self._instruments.items():
            fields |= kind.ask(request, memory)
        if not request.probed:
            if fields:
                raise ValueError(f"{', '.join(fields)}: a request that asks for it has to be probed")
            return {}
        prompt_len = len(request.prompt_ids)
        regions = {**request.regions, "prompt": (0, prompt_len)}
        ranges = [list(regions.get(name, (0, 0))) for name in self.regions]
        core = {"slot": slot, "request_id": request_id, "prompt_len": prompt_len, "regions": ranges}
        extra = {**core, "steps": request.steps, **fields}
        parse_probe(extra, self._config)
        return extra

    def step(self) -> list[Finished]:
        """Run the engine once; return the requests that finished, and those that answer on past their last step."""
        done = []
        outputs = self.llm_engine.step()
        self.steps_run += 1
        for output in outputs:
            request_id, completion = int(output.request_id), output.outputs[0]
            request = self._running.get(request_id)
            if request is None:  # stopped while this step ran
                continue
            if output.finished:
                del self._running[request_id]
            elif len(completion.token_ids) != request.steps + 1:
                continue
            answer = list(completion.token_ids if request.answer_ids is None else request.answer_ids)
            logprobs = None
            if request.logprobs:
                known = zip(output.prompt_logprobs[1:], request.prompt_ids[1:])
                logprobs = [float(by_token[token].logprob) for by_token, token in known]
            cached, reason = output.num_cached_tokens or 0, completion.finish_reason
            done.append(Finished(request_id, request, answer, reason, cached, not output.finished, logprobs))
        return done

    def stop(self, request_id: int) -> bool:
        """End a request that answers on, and free its slot; False if it has finished by now."""
        if request_id not in self._running:
            return False
        self.llm_engine.abort_request([str(request_id)])
        del self._running[request_id]
        self._free.append(self._slots.pop(request_id))
        return True

    def collect(self, finished: Sequence[Finished], want_mass: bool = False) -> Ticket:
        """Start copying the recordings of finished requests off the device, all at once, and free their slots; those
        that answer on keep theirs.

        The copies need not have arrived before the next `step`: read them with `recordings` when it has run.
        """
        ticket = Ticket(self._tickets, tuple(finished))
        self._tickets += 1
        if ticket.probed:
            requests = [(self._slots[f.request_id], f.request_id) for f in ticket.probed]
            n_steps = max(f.n_steps for f in ticket.probed) + 1
            self._unread.add(ticket.number)
            self._call("collect", ticket.number, requests, n_steps, want_mass)
        # Every rank has enqueued its copies by now, ahead of whatever the slots' next requests will have it do.
        self._free += [self._slots.pop(f.request_id) for f in finished if not f.answering]
        return ticket

    def _call(self, method: str, *args: Any, instrument: str | None = None) -> list[Any]:
        """What each rank's recorder, or an instrument of it, answers to a call."""
        return self.llm_engine.collective_rpc("headrift_call", args=(method, *args), kwargs={"instrument": instrument})

    def recordings(self, ticket: Ticket) -> list[Recording]:
        """The recordings of a ticket's probed requests, in their order; waits until they have arrived.

        Raises:
            RuntimeError: a recording contradicts itself; the engine's numbers are wrong.
            ValueError: the ticket has been read already or was dropped by `abort`.
        """
        if not ticket.probed:
            return []
        if ticket.number not in self._unread:
            raise ValueError(f"ticket {ticket.number} has been read already, or was dropped by abort()")
        self._unread.remove(ticket.number)
        arrays = vllm_engine.merge_recordings(self._call("fetch", ticket.number), self.layers, self.heads)
        return [self._read_recording(f, arrays, i) for i, f in enumerate(ticket.probed)]

    def _read_recording(self, finished: Finished, arrays: Mapping[str, np.ndarray], i: int) -> Recording:
        """The i-th recording of a ticket's arrays."""
        n, prompt, first = finished.n_steps + 1, self.regions.index("prompt"), arrays["first"][i]
        # Step 0 sees the prompt and nothing else, so its mass there is 1 (less with sinks, never more).
        off = np.nan_to_num(np.abs(first[..., prompt] - 1)).max()
        if not self.sinks and off > 1e-3:
            error = f"a head's prompt mass at step 0 is {off:.6f} away from 1; the recording cannot be trusted"
            raise RuntimeError(f"request {finished.request_id}: {error}")
        measures = {
            output.name: arrays[output.name][i, :n] if output.per_step else arrays[output.name][i]
            for kind in self._instruments
            if kind.is_on(self.options) and kind.is_for(finished.request)
            for output in kind.outputs
        }
        mass = arrays["mass"][i, :n] if "mass" in arrays else None
        return Recording(arrays["share"][i, :n], np.delete(first, prompt, -1), mass, measures)

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
        next, from results that were yielded by then. Recordings leave the device while the next step runs, except where
        step 0 decides whether a request answers on. A replayed request that misses steps, because a cached prefix block
        covered them, runs again by itself with `skip_prefix_cache`. If the caller stops early (`close`, an exception),
        what runs is aborted.

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
        ticket: Ticket | None = None

        def read(ticket: Ticket) -> Iterator[tuple[Key, Finished, Recording]]:
            """What a ticket has finished; answers that `stop_if` is true of end here."""
            for f, recording in zip(ticket.probed, self.recordings(ticket), strict=True):
                if f.request_id not in in_flight:
                    continue  # its answer was stopped when it had ended already
                if recording.missing_steps and not f.answering:
                    again.append((in_flight.pop(f.request_id), _without_prefix_cache(f, recording)))
                elif not f.answering or (stop_if and stop_if(in_flight[f.request_id], f, recording)):
                    yield in_flight.pop(f.request_id), f, recording
                    if f.answering:
                        self.stop(f.request_id)

        try:
            while True:
                waits = ended = False
                while self.free_slots and self.running < most and not (waits or ended):
                    entry = again.popleft() if again else next(source, ())
                    waits, ended = entry is None, entry == ()
                    if entry:
                        in_flight[self.submit(entry[1])] = entry[0]
                if not (in_flight or ticket):
                    if waits:
                        raise RuntimeError("the next request waits for a result, and no request is in flight")
                    return
                finished = self.step() if self.running else []
                done = [f for f in finished if not f.answering or (stop_if and f.request.probed)]
                results: list[tuple[Key, Finished, Recording | None]]
                results = [(in_flight.pop(f.request_id), f, None) for f in done if not f.request.probed]
                if ticket:  # its copies have left the device while this step ran
                    results += read(ticket)
                ticket = self.collect(done, want_mass) if done else None
                if ticket and any(f.answering and not f.request.steps for f in done):
                    # What step 0 decides is decided before another token is decoded.
                    results += read(ticket)
                    ticket = None
                yield from results
        finally:
            if in_flight or ticket:
                self.abort()

    def drain(self, finished: Sequence[Finished], want_mass: bool = False) -> list[Recording]:
        """`collect` and `recordings` in one, for a caller with nothing to do in between."""
        return self.recordings(self.collect(finished, want_mass))

    def principal_angles(self, clean: Sequence[int], ablated: Sequence[Sequence[int]], r_main: int) -> np.ndarray:
        """Principal angles between the subspace of clean hidden states and that of each set of ablated ones.

        Args:
            clean: The numbers (`hidden_as`) of the queries' kept hidden states.
            ablated: n lists of as many numbers.
            r_main: Dimensions of the subspaces, see `instruments.hidden_states`.

        Returns:
            [n, r_main] degrees, smallest first; NaN if a state was not kept, or queries are alike.

        Raises:
            ValueError: r_main is not 1 to the number of queries and components, or a number does not exist.
        """
        most, kept = min(len(clean), self.width), self.options["hidden_states"]
        if not 1 <= r_main <= most:
            raise ValueError(f"r_main is 1 to {most} for {len(clean)} queries, not {r_main}")
        if any(len(row) != len(clean) for row in ablated):
            raise ValueError("every ablated set has as many hidden states as the clean one")
        missing = {*clean, *(number for row in ablated for number in row)} - set(range(kept))
        if missing:
            raise ValueError(f"there is no hidden state {min(missing)}; this engine keeps {kept}")
        args = (list(clean), [list(row) for row in ablated], r_main)
        # Every rank has the whole of a hidden state, and computes the same.
        angles = self._call("principal_angles", *args, instrument="HiddenStates")[0]
        return np.reshape(angles, (len(ablated), r_main))

    def abort(self) -> None:
        """Drop every request in flight and free its slot; drop what was collected and not read."""
        self.llm_engine.abort_request([str(request_id) for request_id in self._running])
        self._free += self._slots.values()
        self._running.clear()
        self._slots.clear()
        if self._unread:
            self._call("forget")
            self._unread.clear()


def _without_prefix_cache(finished: Finished, recording: Recording) -> ProbeRequest:
    """The request, to compute the steps that a cached prefix block covered. RuntimeError if it was that already."""
    if finished.request.skip_prefix_cache:
        raise RuntimeError(f"the engine never computed steps {recording.missing_steps}, even without cached prefixes")
    return replace(finished.request, skip_prefix_cache=True)
