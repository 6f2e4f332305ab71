"""The demo's workload: people asking short questions while a batch job works through long documents.

Every text is made here. The KV pool is sized so that a full batch of documents needs 1.3 times what fits. Less the
batch slots that the questions take, that is where scheduling and KV sharing matter: with less demand any policy is
fine, with much more none is.
"""

from __future__ import annotations

import numpy as np

from bros_ref.config import cdiv
from bros_ref.engine.build import LoadedModel
from bros_ref.request import SLO, RequestClass
from bros_ref.workload.generate import WorkloadItem, merge, poisson_arrivals

QUESTIONS = (
    "What is the capital of France?", "Name three primary colours.", "Why is the sky blue?",
    "How many days are in a leap year?", "What does a compiler do?", "Give me a synonym for happy.",
    "What is the boiling point of water?", "Who needs sunscreen, and why?", "What is a prime number?",
    "Name a large ocean.", "What do bees make?", "Explain gravity in one sentence.",
    "What is the opposite of cold?", "How do plants drink water?", "What is 7 plus 5?",
    "Name a fruit that is yellow.",
)
PLACES = ("harbour", "north ridge", "old mill", "river mouth", "observatory", "east field", "quarry", "lighthouse")
EVENTS = ("the wind turned to the west", "two visitors asked for directions", "the pump was switched off for an hour",
          "a light rain began", "the gate stood open until noon", "the battery was replaced", "fog hid the far shore",
          "the radio lost its signal twice", "a delivery of timber arrived", "the sensor was cleaned")
QUESTION_SLO = SLO(ttft_s=1.0, tpot_s=0.25)


def document(index: int, sentences: int, rng: np.random.Generator) -> str:
    """A log book to be summarised, about 20 tokens per sentence."""
    place = PLACES[index % len(PLACES)]
    lines = []
    for hour in range(sentences):
        event, degrees = EVENTS[rng.integers(len(EVENTS))], int(rng.integers(-3, 24))
        lines.append(f"At {hour % 24:02d}:00 {event}, and the thermometer showed {degrees} degrees.")
    return f"Log book of the {place}. " + " ".join(lines) + " Summarise this log book."


def demo_items(loaded: LoadedModel, seed: int, *, num_documents: int = 14, num_questions: int = 12,
               over_s: float = 20.0) -> list[WorkloadItem]:
    """Documents at time 0 (best-effort) and questions as a Poisson stream over `over_s` seconds (real-time)."""
    rng = np.random.default_rng(seed)
    documents = [_item(loaded, 0.0, RequestClass.BEST_EFFORT, document(i, int(rng.integers(6, 12)), rng), 48)
                 for i in range(num_documents)]
    times = poisson_arrivals(num_questions / over_s, over_s, rng)
    questions = [_item(loaded, time_s, RequestClass.REAL_TIME, QUESTIONS[i % len(QUESTIONS)], 24)
                 for i, time_s in enumerate(times)]
    return merge(documents, questions)


def pool_blocks(items: list[WorkloadItem], max_num_seqs: int, block_size: int, oversubscription: float = 1.3) -> int:
    """Blocks such that a full batch of best-effort requests asks for `oversubscription` times the pool.

    Never less than the largest request needs alone.
    """
    best_effort = sorted((item.prompt_tokens + item.output_tokens for item in items
                          if item.request_class is RequestClass.BEST_EFFORT), reverse=True)
    largest = max(item.prompt_tokens + item.output_tokens for item in items)
    wanted = sum(best_effort[:max_num_seqs]) / oversubscription
    return cdiv(int(max(wanted, largest)), block_size)


def _item(loaded: LoadedModel, arrival_s: float, request_class: RequestClass, text: str, output_tokens: int,
          ) -> WorkloadItem:
    slo = QUESTION_SLO if request_class is RequestClass.REAL_TIME else None
    return WorkloadItem(arrival_s, request_class, len(loaded.tokenizer.chat(text)), output_tokens, slo, text)
