import json
import math

import numpy as np
import pytest
import torch

from curate.ngrams.counts import bag, buckets_of
from curate.data.mds import Sample
from curate.pools.features import likeness, log_ratios, mean_hidden_states, ngram_features, output_layer
from curate.training.task import ModelSpec, Task, TaskSpec, collate

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip

ALL = np.ones(64, bool)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return Task(TaskSpec(model=ModelSpec(hf_config=folder / "config.json")))


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(0)
    lengths = (10, 4, 16)
    return [
        Sample(tokens=random.integers(0, 50, n, dtype=np.int32), loss_mask=np.ones(n, bool), documents=[])
        for n in lengths
    ]


def test_hidden_states_are_the_models_own_without_padding(task, samples):
    found = mean_hidden_states(task, samples)
    for sample, row in zip(samples, found, strict=True):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        with torch.no_grad():
            wanted = task.model(tokens, output_hidden_states=True).hidden_states[-1][0].mean(0)
        np.testing.assert_allclose(row, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert not output_layer(task.model)._forward_pre_hooks
    assert torch.isfinite(task.sample_losses(collate(samples, np.ones(3, np.float32)))).all()


def test_a_model_that_names_no_output_layer_has_none(task):
    plain = Task(TaskSpec(model=ModelSpec(factory="tests.tiny:factory")))
    assert output_layer(plain.model) is None
    assert output_layer(task.model) is task.model.lm_head


def test_ngrams_do_not_depend_on_the_company(samples):
    found = ngram_features(samples)
    assert found.shape == (3, 4096)
    np.testing.assert_array_equal(ngram_features(samples[1:2])[0], found[1])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_likeness_is_the_smoothed_log_ratio_of_a_plain_loop(samples):
    pool, other = bag((sample.tokens, sample.loss_mask) for sample in samples), bag([(samples[2].tokens, ALL[:16])])
    found = likeness(samples, log_ratios([pool, other], pool))
    for row, sample in zip(found, samples, strict=True):
        for place, target in enumerate((pool, other)):
            terms = []
            for bucket in buckets_of(sample.tokens, sample.loss_mask).tolist():
                q = (pool[bucket] + 1) / sum(count + 1 for count in pool)
                p = (target[bucket] + 2000 * q) / (sum(target) + 2000)
                terms.append(math.log(p) - math.log(q))
            assert row[place] == pytest.approx(math.fsum(terms) / len(terms), abs=1e-6)
    assert found[2, 1] == found[:, 1].max() > 0


def test_a_sample_that_predicts_nothing_is_like_nothing(samples):
    silent = Sample(tokens=samples[0].tokens, loss_mask=np.zeros(10, bool), documents=[])
    assert likeness([silent], log_ratios([bag([])], bag([]))).tolist() == [[0.0]]
