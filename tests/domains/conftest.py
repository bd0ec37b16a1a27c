import numpy as np
import polars as pl
import pytest


def make_values(
    seed=0, *, steps=12, batch=16, domains=("a", "b", "c"), effect=(1.0, 0.0, -1.0), sources=("late",), targets=("t",)
):
    """A values frame as `select` makes it: random batches, one document or two per sample."""
    random = np.random.default_rng(seed)
    frames = []
    for source in sources:
        n = steps * batch
        domain = random.integers(len(domains), size=n)
        tokens = random.integers(1, 9, size=n)
        index = random.permutation(n)
        for target in targets:
            noise = random.standard_normal((3, n))
            value = (np.asarray(effect)[domain] + noise[0]) * tokens
            frames.append(
                pl.DataFrame(
                    {
                        "row": np.arange(n),
                        "step": np.repeat(np.arange(steps), batch),
                        "sample_id": index + 1000,
                        "weight": np.full(n, 1 / batch, np.float32),
                        "predicted_tokens": tokens,
                        "stored_tokens": np.full(n, 9),
                        "source": [source] * n,
                        "horizon": ["window_end"] * n,
                        "domain": [domains[d] for d in domain],
                        "index": index,
                        "shard": index // 24,
                        "documents": [_documents(int(i), int(t)) for i, t in zip(index, tokens, strict=True)],
                        "target": [target] * n,
                        "value_total_nats": value,
                        "value_half_a_nats": value + noise[1],
                        "value_half_b_nats": value + noise[2],
                    }
                )
            )
    return pl.concat(frames)


def _documents(index, tokens):
    first = {"id": f"d{index // 3}", "predicted_tokens": tokens // 2}
    return [first, {"id": f"e{index}", "predicted_tokens": tokens - tokens // 2}]


@pytest.fixture
def values():
    return make_values()


@pytest.fixture
def make():
    return make_values
