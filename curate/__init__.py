"""Data curation for language-model pretraining: which training samples moved the model towards your target.

The names of `__all__` are the public API; each is imported when it is first used, so `import curate` is light.

    import curate
    task = curate.TaskSpec(model=curate.ModelSpec(hf_config="config.json"))
    recorder = curate.TrajectoryRecorder(
        folder, curate.RecorderConfig(), model, optimizer, task=task, streams=streams, steps=steps, seq_len=1024
    )
    ...  # train: recorder.begin_step, micro_batch, end_step; then recorder.finish()
    run = curate.Run(folder)
    selection = curate.select(curate.SelectConfig(target="domain.jsonl", retain="general.jsonl"), run)
    print(curate.read_mixture(selection / "mixture.yaml").domains)
    print(curate.read_scores(selection / "scores.parquet"))
    dataset = curate.open_dataset(selection / "data" / "mds", batch_size=64, seed=0)

`curate.select` is also the module of `python -m curate.select`; so are embed, search, verify, branch_test, reconstruct
and report. Each of these modules can be called (`curate.core.callable_module`), so the order of imports does not
matter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from curate.core.interrupts import guard_imports

if TYPE_CHECKING:
    from curate.branch_test import BranchTestCommand, branch_test
    from curate.core.errors import UserError
    from curate.core.trust import trust
    from curate.data.dataset import open_dataset
    from curate.domains.scores_file import read_scores
    from curate.embed import EmbedConfig, embed
    from curate.embeddings.run_capture import CaptureConfig, RunCapture
    from curate.mixture.record import Mixture, read_mixture
    from curate.reconstruct import reconstruct
    from curate.reconstruct.description import ReconstructConfig
    from curate.report import report
    from curate.report.__main__ import ReportConfig
    from curate.search import SearchConfig, search
    from curate.select import select
    from curate.selection.config import SelectConfig
    from curate.training.recorder import RecorderConfig, TrajectoryRecorder
    from curate.training.run import Run
    from curate.training.target import load_target
    from curate.training.task import ModelSpec, TaskSpec
    from curate.verify import VerifyConfig, verify

__all__ = [
    "BranchTestCommand", "CaptureConfig", "EmbedConfig", "Mixture", "ModelSpec", "ReconstructConfig", "RecorderConfig",
    "ReportConfig", "Run", "RunCapture", "SearchConfig", "SelectConfig", "TaskSpec", "TrajectoryRecorder", "UserError",
    "VerifyConfig", "branch_test", "embed", "load_target", "open_dataset", "read_mixture", "read_scores", "reconstruct",
    "report", "search", "select", "trust", "verify",
]  # fmt: skip

_MODULES = {  # name -> module that has it; the imports above say the same to type checkers
    "BranchTestCommand": "curate.branch_test",
    "CaptureConfig": "curate.embeddings.run_capture",
    "EmbedConfig": "curate.embed",
    "Mixture": "curate.mixture.record",
    "ModelSpec": "curate.training.task",
    "ReconstructConfig": "curate.reconstruct.description",
    "RecorderConfig": "curate.training.recorder",
    "ReportConfig": "curate.report.__main__",
    "Run": "curate.training.run",
    "RunCapture": "curate.embeddings.run_capture",
    "SearchConfig": "curate.search",
    "SelectConfig": "curate.selection.config",
    "TaskSpec": "curate.training.task",
    "TrajectoryRecorder": "curate.training.recorder",
    "UserError": "curate.core.errors",
    "VerifyConfig": "curate.verify",
    "branch_test": "curate.branch_test",
    "embed": "curate.embed",
    "load_target": "curate.training.target",
    "open_dataset": "curate.data.dataset",
    "read_mixture": "curate.mixture.record",
    "read_scores": "curate.domains.scores_file",
    "reconstruct": "curate.reconstruct",
    "report": "curate.report",
    "search": "curate.search",
    "select": "curate.select",
    "trust": "curate.core.trust",
    "verify": "curate.verify",
}

guard_imports(__name__)

if not TYPE_CHECKING:  # a type checker would take any name from it

    def __getattr__(name: str) -> object:
        """Import a public name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(_MODULES[name])
        # a callable module stands for its function: the import has put it there, and other imports do so too
        return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
