"""Another engine in a process of its own: `engine_peers.py` starts this file with the Python that has the engine.

It imports nothing of bros_ref and runs on Python 3.10, since that Python need not be ours. Messages are lines of JSON
on standard input and output. First the settings arrive; the answer {"version": ...} says that the engine is ready.
Then each request {"prompts": [[token id]], "outputs": [tokens]} is answered by {"seconds": wall time, "tokens":
generated}. What the engine prints goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Generate = Callable[[list[list[int]], list[int]], int]  # prompts, output tokens of each -> tokens generated


def vllm(settings: dict[str, Any]) -> Generate:
    """vLLM's offline `LLM`, V1 engine, within this process; prefix caching off, everything else at its defaults."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    library = importlib.import_module("vllm")
    llm = library.LLM(settings["model"], skip_tokenizer_init=True, dtype="float32", disable_log_stats=True,
                      max_model_len=settings["max_tokens"], max_num_seqs=settings["max_num_seqs"],
                      max_num_batched_tokens=settings["max_num_batched_tokens"], enable_prefix_caching=False)

    def generate(prompts: list[list[int]], outputs: list[int]) -> int:
        params = [library.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
                  for count in outputs]
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return generate


def xllamacpp(settings: dict[str, Any]) -> Generate:
    """llama.cpp's server, within this process: fp32 weights and KV, one slot per sequence, no prompt cache."""
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = settings["model"]
    params.n_parallel = settings["max_num_seqs"]
    params.n_ctx = settings["max_tokens"] * settings["max_num_seqs"]
    params.n_batch = params.n_ubatch = settings["max_num_batched_tokens"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
    params.cache_prompt, params.cache_ram_mib, params.verbosity = False, 0, 0
    server = library.Server(params)
    pool = ThreadPoolExecutor(settings["most_requests"])  # a call returns when its request has ended

    def one(prompt: list[int], count: int) -> int:
        result = server.handle_completions({"prompt": prompt, "n_predict": count, "ignore_eos": True, "top_k": 1,
                                            "cache_prompt": False})
        if "error" in result:
            raise RuntimeError(str(result["error"]))
        return int(result["usage"]["completion_tokens"])

    return lambda prompts, outputs: sum(pool.map(one, prompts, outputs))


def main() -> None:
    """Serves requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines, and the libraries below them, print to descriptor 1
    settings = json.loads(sys.stdin.readline())
    generate: Generate = {"vllm": vllm, "xllamacpp": xllamacpp}[settings["engine"]](settings)
    [distribution, *_] = importlib.metadata.packages_distributions()[settings["engine"]]
    print(json.dumps({"version": importlib.metadata.version(distribution)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        tokens = generate(request["prompts"], request["outputs"])
        print(json.dumps({"seconds": time.perf_counter() - start_s, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
