"""A program, not a test file: model runner V2 with its engine core in a process of its own, interpreted.

    python own_process.py MODEL_FOLDER

prints the masses of two requests as JSON. Every process of the engine starts afresh and has to find the patches of
conftest.py in place: tests/engine/test_interpreted.py puts them on its path.
"""

import json
import sys

from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest

if __name__ == "__main__":
    settings = {
        "dtype": "float32",
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "max_model_len": 160,
        "max_num_batched_tokens": 64,
    }
    spans = {"system": (2, 14), "user": (15, 24), "prompt": (0, 30)}
    requests = [ProbeRequest(list(range(i, i + 30)), spans, steps=3, ignore_eos=True) for i in (5, 90)]
    with ProbedEngine(sys.argv[1], steps=4, slots=4, attention_backend="triton", engine_args=settings) as engine:
        assert type(engine.llm_engine.engine_core).__name__ == "SyncMPClient"
        assert engine.llm_engine.vllm_config.use_v2_model_runner
        for request in requests:
            engine.submit(request)
        finished = []
        while engine.running:
            finished += engine.step()
        recordings = engine.drain(finished, want_mass=True)
    result = [
        {"prompt": list(f.request.prompt_ids), "answer": f.answer_ids, "mass": r.mass.tolist()}
        for f, r in zip(finished, recordings, strict=True)
    ]
    print("FOUND" + json.dumps(result))
