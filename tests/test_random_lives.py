"""Random lives: 20 seconds of them with a fresh seed, which is printed, or as many as `make soak MINUTES=30` takes."""

import os
import random
import time

from lives import Life

SECONDS = float(os.environ.get("LIVES_SECONDS", "20"))
MIN_LIVES = 30  # however slow the machine


def test_random_lives_lose_no_token_no_text_no_block_and_no_end():
    first_seed = int(os.environ.get("LIVES_SEED", random.SystemRandom().getrandbits(32)))
    started_s, count = time.perf_counter(), 0
    print(f"lives from seed {first_seed} on")
    while count < MIN_LIVES or time.perf_counter() - started_s < SECONDS:
        life = Life(first_seed + count)
        try:
            life.live()
        except Exception as error:
            seed = first_seed + count
            raise AssertionError(f"{type(error).__name__} in the life of seed {seed} (policy {life.policy}); "
                                 f"LIVES_SEED={seed} LIVES_SECONDS=0 repeats it") from error
        count += 1
    print(f"{count} lives")
