"""Data curation for language-model pretraining: which training samples moved the model towards your target.

The names of `__all__` are the public API; each is imported when it is first used, so `import curate` is light.

    import curate
    task = curate.TaskSpec(model=curate.ModelSpec(hf_config="config.json"))
    recorder = curate.TrajectoryRecorder(
        folder, curate.RecorderConfig(), model, optimizer, task=task, streams=streams, steps=steps, seq_len=1024
    )
    ...  # train: recorder.begin_step, micro_batch, end_step; then recorder.finish()
    run = curate.Run(folder)
    selection = curate.select(curate.SelectConfig(target=Path("domain.jsonl"), mode="filter"), run)
    print(curate.read_mixture(selection / "mixture.yaml").domains)
    print(curate.read_scores(selection / "scores.parquet"))
    dataset = curate.open_dataset(selection / "data", batch_size=64, seed=0)

`curate.select` is also the module of `python -m curate.select`, and embed, verify, reconstruct, report and trust are
modules too. Each can be called as the function of its name (`curate.callable_module`), in any order of imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from curate.interrupts import guard_imports

if TYPE_CHECKING:
    from curate.embed import EmbedConfig, embed
    from curate.embeddings.run_capture import CaptureConfig, RunCapture
    from curate.errors import UserError
    from curate.formats.dataset import open_dataset
    from curate.mixture.record import Mixture, read_mixture
    from curate.reconstruct import reconstruct
    from curate.reconstruct.description import ReconstructConfig
    from curate.report import report
    from curate.report.__main__ import ReportConfig
    from curate.scores.schema import read_scores
    from curate.select import select
    from curate.selection import SelectConfig
    from curate.target import load_target
    from curate.task import ModelSpec, TaskSpec
    from curate.trajectory.recorder import RecorderConfig, TrajectoryRecorder
    from curate.trajectory.run import Run
    from curate.trust import trust
    from curate.verify import VerifyConfig, verify

__all__ = [
    "CaptureConfig", "EmbedConfig", "Mixture", "ModelSpec", "ReconstructConfig", "RecorderConfig", "ReportConfig",
    "Run", "RunCapture", "SelectConfig", "TaskSpec", "TrajectoryRecorder", "UserError", "VerifyConfig", "embed",
    "load_target", "open_dataset", "read_mixture", "read_scores", "reconstruct", "report", "select", "trust", "verify",
]  # fmt: skip

_MODULES = {  # name -> module that has it; the imports above say the same to type checkers
    "CaptureConfig": "curate.embeddings.run_capture",
    "EmbedConfig": "curate.embed",
    "Mixture": "curate.mixture.record",
    "ModelSpec": "curate.task",
    "ReconstructConfig": "curate.reconstruct.description",
    "RecorderConfig": "curate.trajectory.recorder",
    "ReportConfig": "curate.report.__main__",
    "Run": "curate.trajectory.run",
    "RunCapture": "curate.embeddings.run_capture",
    "SelectConfig": "curate.selection",
    "TaskSpec": "curate.task",
    "TrajectoryRecorder": "curate.trajectory.recorder",
    "UserError": "curate.errors",
    "VerifyConfig": "curate.verify",
    "embed": "curate.embed",
    "load_target": "curate.target",
    "open_dataset": "curate.formats.dataset",
    "read_mixture": "curate.mixture.record",
    "read_scores": "curate.scores.schema",
    "reconstruct": "curate.reconstruct",
    "report": "curate.report",
    "select": "curate.select",
    "trust": "curate.trust",
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
