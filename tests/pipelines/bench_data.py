"""What tests of benches train on: source files as domains of short documents, and a model of a few thousand weights."""

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from pathlib import Path

MODULES = (argparse, ast, dataclasses, typing, inspect, textwrap)


def write_bench_data(folder: Path) -> None:
    """Write `corpus/<module>.jsonl` and `model.json`."""
    (folder / "corpus").mkdir()
    for module in MODULES:
        text = inspect.getsource(module)
        pieces = [text[at : at + 300] for at in range(0, min(len(text), 15_000), 300)]
        rows = [json.dumps({"id": f"{module.__name__}-{i}", "text": piece}) for i, piece in enumerate(pieces)]
        (folder / "corpus" / f"{module.__name__}.jsonl").write_text("\n".join(rows) + "\n")
    model = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
