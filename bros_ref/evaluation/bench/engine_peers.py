"""Other engines that `bros-ref bench engine --peers` runs, on the same weights and prompts and as many threads.

    transformers    `generate` over static batches, in this process
    vLLM            its CPU build, which needs a torch of its own: run by the Python of another environment
    llama.cpp       by the package xllamacpp, on the model's .gguf file rewritten in fp32

vLLM and llama.cpp run in processes of their own (`peer_worker.py`), which wait while another engine is timed. A peer
that is not installed, or cannot run this model, is named with the reason, never left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bros_ref.engine.build import LoadedModel
from bros_ref.evaluation.bench import peer_worker
from bros_ref.evaluation.bench.reference import transformers_llama, write_llama_folder
from bros_ref.model.weights.load import RANDOM_PREFIX, locate

Lengths = list[tuple[int, int]]  # (prompt tokens, output tokens) of each request
PEERS = ("transformers", "vllm", "llama.cpp")
STATIC_BATCH = 32  # sequences at a time, in every engine
TOKEN_BUDGET = 1024  # tokens of a step, in the engines that have such a limit
LONGEST_PEER_TOKENS = 640  # prompt and output of one request together
MOST_REQUESTS = 64
VLLM_PYTHON = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"  # where `make test-vllm` puts it
STOP_S = 20.0


class Unavailable(ValueError):
    """A peer cannot be measured; the text says why."""


class Peer(Protocol):
    """Another engine, loaded. `version` belongs in every report of its figures."""

    name: str
    version: str
    in_this_process: bool

    def seconds(self, lengths: Lengths, seed: int) -> float:
        """Wall time to serve the requests, all present from the start. Prompts are those of `draw_prompts`."""
        ...


def draw_prompts(lengths: Lengths, vocab_size: int, seed: int) -> list[list[int]]:
    """Seeded token ids for each request."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, prompt).tolist() for prompt, _ in lengths]


class Transformers:
    """`generate` over static batches of STATIC_BATCH: prompts padded on the left, and every sequence of a batch runs as
    long as its longest output. In order of arrival, as a server without continuous batching would.

    Raises:
        Unavailable: it is not installed, or has no such model.
    """

    name, in_this_process = "transformers", True

    def __init__(self, loaded: LoadedModel) -> None:
        try:
            self._model = transformers_llama(loaded.config, loaded.parameters)
        except (ImportError, ValueError) as error:
            raise Unavailable("not installed" if isinstance(error, ImportError) else str(error)) from error
        self.version = importlib.metadata.version("transformers")
        self._vocab_size = loaded.config.vocab_size

    def seconds(self, lengths: Lengths, seed: int) -> float:
        """See `Peer`."""
        prompts = draw_prompts(lengths, self._vocab_size, seed)
        start_s = time.perf_counter()
        for first in range(0, len(lengths), STATIC_BATCH):
            batch = prompts[first:first + STATIC_BATCH]
            width, output = max(map(len, batch)), max(output for _, output in lengths[first:first + STATIC_BATCH])
            token_ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(token_ids)
            for row, prompt in enumerate(batch):
                token_ids[row, width - len(prompt):] = torch.tensor(prompt)
                mask[row, width - len(prompt):] = 1
            with torch.inference_mode():
                self._model.generate(input_ids=token_ids, attention_mask=mask, min_new_tokens=output,
                                     max_new_tokens=output, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start_s


class Worker:
    """An engine that `peer_worker.py` runs in a process of its own.

    Args:
        name: of the peer, in tables.
        python: the interpreter that has the engine.
        settings: of the worker; "engine" is the name of the package.

    Raises:
        Unavailable: the process ended before its engine was ready; the text has its last words.
    """

    in_this_process = False

    def __init__(self, name: str, python: Path, settings: dict[str, Any], vocab_size: int) -> None:
        self.name, self._vocab_size = name, vocab_size
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until close
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen([str(python), peer_worker.__file__], text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._errors, env=environment)
        try:
            self.version = str(self._ask(settings)["version"])
        except BaseException:
            self.close()
            raise

    def seconds(self, lengths: Lengths, seed: int) -> float:
        """See `Peer`.

        Raises:
            Unavailable: the engine failed, or generated another number of tokens than was asked for.
        """
        outputs = [output for _, output in lengths]
        answer = self._ask({"prompts": draw_prompts(lengths, self._vocab_size, seed), "outputs": outputs})
        if answer["tokens"] != sum(outputs):
            raise Unavailable(f"{self.name} generated {answer['tokens']} tokens instead of {sum(outputs)}: other work "
                              "is not compared")
        return float(answer["seconds"])

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = [line.strip() for line in self._errors if line.strip()]
            raise Unavailable(f"failed: {said[-1] if said else 'its process ended without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def start_peers(loaded: LoadedModel, names: Sequence[str] = PEERS,
                vllm_python: Path | None = None) -> Iterator[tuple[list[Peer], dict[str, str]]]:
    """Starts the peers that can run here, and ends them afterwards.

    Args:
        names: of PEERS.
        vllm_python: the interpreter that has vLLM; by default that of `make test-vllm`, else this one.

    Yields:
        The peers, each warmed up; and for every other name, why it is not among them.
    """
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts: dict[str, Callable[[], Peer]] = {
            "transformers": lambda: Transformers(loaded), "vllm": lambda: _vllm(loaded, folder, vllm_python),
            "llama.cpp": lambda: _llama_cpp(loaded, folder)}
        try:
            for peer in names:
                try:
                    peers.append(starts[peer]())
                    peers[-1].seconds([(16, 2)], 0)
                except Unavailable as reason:
                    absent[peer] = str(reason)
            yield peers, absent
        finally:
            for started in peers:
                if isinstance(started, Worker):
                    started.close()


def _settings(engine: str, model: Path) -> dict[str, Any]:
    return {"engine": engine, "model": str(model), "threads": torch.get_num_threads(), "max_num_seqs": STATIC_BATCH,
            "max_tokens": LONGEST_PEER_TOKENS, "max_num_batched_tokens": TOKEN_BUDGET, "most_requests": MOST_REQUESTS}


def _vllm(loaded: LoadedModel, folder: Path, python: Path | None) -> Worker:
    python = python or (VLLM_PYTHON if VLLM_PYTHON.exists() else Path(sys.executable))
    if not _has(python, "vllm"):
        raise Unavailable("not installed")
    try:
        write_llama_folder(loaded.config, loaded.parameters, folder)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return Worker("vllm", python, _settings("vllm", folder), loaded.config.vocab_size)


def _llama_cpp(loaded: LoadedModel, folder: Path) -> Worker:
    if not _has(Path(sys.executable), "xllamacpp"):
        raise Unavailable("not installed")
    source = None if loaded.name.startswith(RANDOM_PREFIX) else locate(loaded.name)
    if source is None or source.suffix != ".gguf":
        raise Unavailable("it needs a .gguf file")
    target = folder / "fp32.gguf"
    write_fp32_gguf(source, target)
    return Worker("llama.cpp", Path(sys.executable), _settings("xllamacpp", target), loaded.config.vocab_size)


def _has(python: Path, package: str) -> bool:
    """Whether an interpreter finds a package, without importing it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def write_fp32_gguf(source: Path, target: Path) -> None:
    """Copies a .gguf file with every tensor dequantised to float32: the very values that we compute with."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        is_list = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if is_list else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
