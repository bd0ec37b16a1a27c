"""Every number among the settings of every pipeline is bounded: none below zero, none that is not finite."""

import math
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError

from curate.core.config import Config, parse_command
from curate.core.errors import UserError
from pipelines.branches.config import BranchesConfig
from pipelines.capture_bench.config import CaptureBenchConfig
from pipelines.corpus.build import CorpusConfig
from pipelines.demo import DemoConfig
from pipelines.fidelity.config import BenchConfig
from pipelines.fidelity.cost import CostConfig
from pipelines.fidelity.moments import MomentsConfig
from pipelines.optimizers import OptimizerConfig
from pipelines.phases import PhasesConfig
from pipelines.prepare import PrepareConfig
from pipelines.pretrain import PretrainConfig
from pipelines.published.__main__ import PublishedConfig

CONFIGS = (
    BenchConfig, BranchesConfig, CaptureBenchConfig, CorpusConfig, CostConfig, DemoConfig, MomentsConfig,
    OptimizerConfig, PhasesConfig, PrepareConfig, PretrainConfig, PublishedConfig,
)  # fmt: skip


def shapes(annotation):
    """What a number can be put into: itself, or tuples of it, as functions of the number."""
    if annotation in (int, float):
        return [lambda number: number]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shapes(inner[0])
    if origin is tuple:
        width = 1 if inner[-1] is Ellipsis else len(inner)
        return [lambda number, put=put: [put(number)] * width for put in shapes(inner[0])]
    if origin is None or isinstance(annotation, type):
        return []
    return [put for each in inner for put in shapes(each)]  # unions


def numbers():
    for config in CONFIGS:
        for name, field in config.model_fields.items():
            for put in shapes(field.annotation):
                yield pytest.param(config, name, put, id=f"{config.__name__}.{name}")


@pytest.mark.parametrize(("config", "name", "put"), list(numbers()))
def test_no_number_is_negative_or_not_finite(config, name, put):
    field = config.model_fields[name]
    adapter = TypeAdapter(Annotated[(field.annotation, field)])
    for number in (-1, math.nan, math.inf, -math.inf):
        with pytest.raises(ValidationError):
            adapter.validate_python(put(number))


def test_there_are_such_settings():
    found = {value.id for value in numbers()}
    assert len(found) > 60
    assert {"BranchesConfig.seeds", "PublishedConfig.lrs", "PretrainConfig.micro_batch_size"} <= found
    assert all(issubclass(config, Config) for config in CONFIGS)


@pytest.mark.parametrize(
    "given", ["--seeds=[]", "--seeds=[-1]", "--lr=nan", "--steps=0", "--seq_len=1", "--vocab_size=3"]
)
def test_a_command_refuses_them_in_a_sentence(given):
    for config in (BenchConfig, BranchesConfig):
        with pytest.raises(UserError):
            parse_command(config, "bench", "", [given])
        assert parse_command(config, "bench", "", ["--seeds=[3]"]).seeds == (3,)
