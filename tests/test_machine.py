"""Devices by name."""

import pytest
import torch

from curate.core.errors import UserError
from curate.core.machine import usable_device
from curate.training.task import Task
from tests.tiny import TASK

ABSENT = ["cuda0", "cpu:x", "", *([] if torch.cuda.is_available() else ["cuda"])]


def test_a_device_that_is_there():
    assert usable_device("cpu") == torch.device("cpu")
    assert Task(TASK, torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"'{name}'"):
        Task(TASK, name)
