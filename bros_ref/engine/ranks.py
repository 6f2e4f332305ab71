"""The processes of a model that is split over several devices of this machine, and what happens when one of them dies.

    rank 0: this process          ranks 1 to N - 1: started here, one process each
    StepWork ----- one message per step and rank -----> the same copies and the same forward pass
    logits <-------- the sums and the gather of model/parallel.py --------

Scheduler, KV accounting and sampling run on rank 0 alone. Ranks wait for work without a time limit and end when rank 0
does, however it ends. Within a step, a rank that died or hangs ends the step with `RankFailed`, which names it, after
at most `timeout_s`; the other ranks are ended too, for their sums can no longer be trusted.
"""

from __future__ import annotations

import datetime
import os
import signal
import tempfile
import weakref
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.cpu.linear import FastestLinear
from bros_ref.engine.model_runner import ModelRunner, StepWork
from bros_ref.model.backends import attention_backend
from bros_ref.model.decoder import Decoder
from bros_ref.model.parallel import ExchangeFailed, TensorParallel
from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import Parameters

START_TIMEOUT_S = 600.0  # a rank has to import torch and read its part of the weights
END_TIMEOUT_S = 5.0


class RankFailed(RuntimeError):
    """A rank died or did not answer in time. No rank is left; the model has to be loaded again."""


@dataclass(frozen=True)
class RankSpec:
    """What a rank needs to know to build its part of the model; plain data."""

    model: str
    size: int
    device: str
    dtype: torch.dtype
    seed: int
    backend: str
    threads: int
    store: str
    timeout_s: float


def build_rank(spec: RankSpec, parallel: TensorParallel) -> tuple[Decoder, Parameters, torch.device]:
    """Joins the process group, then reads this rank's part of each weight as it comes: no rank ever holds the whole
    model."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device, parallel.rank) if spec.device == "cuda" else torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{spec.store}",
                            rank=parallel.rank, world_size=spec.size,
                            timeout=datetime.timedelta(seconds=START_TIMEOUT_S))
    parameters = load_weights(spec.model, spec.dtype, device, spec.seed, parallel.shard)
    model = Decoder(parallel.config, parameters, spec.dtype, device, attention_backend(spec.backend, spec.device),
                    FastestLinear(parameters.values()), parallel)
    dist.barrier()  # all ranks have their part: from here on none may take long
    parallel.group = dist.new_group(timeout=datetime.timedelta(seconds=spec.timeout_s))
    return model, parameters, device


class Ranks:
    """Ranks 1 to N - 1 as processes, and rank 0's own part of the model.

    Attributes:
        model, parameters, device: of rank 0.

    Raises:
        ValueError: the model does not divide over so many ranks, or this process has a split model already.
        RankFailed: a rank could not load its part.
    """

    def __init__(self, name: str, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
                 backend: str = "auto", timeout_s: float = 60.0) -> None:
        if device == "cuda" and torch.cuda.device_count() < size:
            raise ValueError(f"tp={size} needs {size} GPUs, this machine has {torch.cuda.device_count()}")
        if dist.is_initialized():
            raise ValueError("this process has a split model already; close it before loading another with tp > 1")
        context, config = get_context("spawn"), load_model_config(name)
        self.progress: Any = context.Array("q", size, lock=False)
        parallel = TensorParallel(0, size, config, self.progress)
        self.timeout_s, self.size = timeout_s, size
        self._folder = tempfile.TemporaryDirectory(prefix="bros-ref-ranks-")
        spec = RankSpec(name, size, device, dtype, seed, backend, max(1, torch.get_num_threads() // size),
                        str(Path(self._folder.name) / "store"), timeout_s)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._threads = torch.get_num_threads()
        self.close = weakref.finalize(self, _end, self._processes, self._pipes, self._threads, self._folder)
        try:
            for rank in range(1, size):
                ours, theirs = context.Pipe()
                process = context.Process(target=rank_main, args=(rank, spec, config, self.progress, theirs),
                                          name=f"bros-ref rank {rank}", daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            try:
                self.model, self.parameters, self.device = build_rank(spec, parallel)
            except RuntimeError:  # another rank left the group: it says why
                self._expect("ready", END_TIMEOUT_S)
                raise
            self._expect("ready", START_TIMEOUT_S)
        except RankFailed:
            raise
        except BaseException:
            self.close()
            raise

    def send(self, message: object) -> None:
        """Gives all other ranks something to do. Raises RankFailed: one of them is gone."""
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                pipe.send(message)
            except (OSError, ValueError):
                self.fail(f"rank {rank} {self._how_it_ended(rank)}")

    def fail(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        """Ends all ranks and raises RankFailed."""
        self.close()
        raise RankFailed(f"{reason}; all ranks of the split model were ended, load it again") from cause

    def blame(self, cause: BaseException) -> NoReturn:
        """After a failed exchange: names the rank that died, or else the one that has entered the fewest exchanges,
        since the others wait for it."""
        for rank, process in enumerate(self._processes, 1):
            process.join(0.2)
            if not process.is_alive():
                self.fail(f"rank {rank} {self._how_it_ended(rank)} during a step", cause)
        behind = min(range(1, self.size), key=lambda rank: self.progress[rank])
        self.fail(f"rank {behind} did not answer within {self.timeout_s:g} s", cause)

    def _expect(self, word: str, timeout_s: float) -> None:
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                answer = pipe.recv() if pipe.poll(timeout_s) else f"did not answer within {timeout_s:g} s"
            except (EOFError, OSError):
                answer = self._how_it_ended(rank)
            if answer != word:
                self.fail(f"rank {rank} {answer}")

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes[rank - 1]
        process.join(0.5)
        return f"ended with exit code {process.exitcode}" if process.exitcode is not None else "closed its pipe"


def _end(processes: list[Any], pipes: list[Connection], threads: int, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Ends every process: closing its pipe tells it to exit, and one that does not exit is killed."""
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(0.2)
        if process.is_alive():
            process.kill()
        process.join(END_TIMEOUT_S)
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    folder.cleanup()


def rank_main(rank: int, spec: RankSpec, config: ModelConfig, progress: Any, pipe: Connection) -> None:
    """Main function of a rank other than 0: builds its part, then computes what the pipe brings until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; rank 0 decides what it means
    try:
        model, _, device = build_rank(spec, TensorParallel(rank, spec.size, config, progress))
    except Exception as error:  # told to rank 0, which raises it
        pipe.send(f"could not load its part: {type(error).__name__}: {' '.join(str(error).split())}")
        return
    pipe.send("ready")
    runner: ModelRunner | None = None
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # rank 0 is done, or gone: no exchange can be completed, and nothing here needs cleaning up
        if isinstance(message, KVCacheConfig):
            runner = ModelRunner(model, message, device, spec.dtype)
        elif runner is not None:
            try:
                runner.compute(message)
            except ExchangeFailed:
                os._exit(1)  # another rank is gone; rank 0 says which, and a traceback here would hide that


class TensorParallelRunner(ModelRunner):
    """`ModelRunner` on rank 0 of a split model: every other rank computes the same step on its own part.

    Raises:
        RankFailed: from `execute`; see there.
    """

    def __init__(self, ranks: Ranks, kv_config: KVCacheConfig, dtype: torch.dtype, backend: str = "torch") -> None:
        super().__init__(ranks.model, kv_config, ranks.device, dtype, backend)
        self.ranks = ranks
        ranks.send(kv_config)

    def compute(self, work: StepWork) -> torch.Tensor:
        """See `ModelRunner.compute`."""
        self.ranks.send(work)
        try:
            return super().compute(work)
        except ExchangeFailed as error:
            self.ranks.blame(error)
        except Exception as error:
            self.ranks.fail(f"rank 0 failed with {type(error).__name__}: {error}", error)
        except BaseException:  # Ctrl-C: the other ranks wait in an exchange that will not come
            self.ranks.close()
            raise
