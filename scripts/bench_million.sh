#!/usr/bin/env bash
# A compressed index of a million real rows, made by the ordinary commands (about 25 minutes on two cores, 6 GB of disk):
# 512 steps of 2048 sequences of 8 tokens, every (sample, step) a row; recall@100 stands in the index's manifest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
out=${1:-runs/million}
python=.venv/bin/python
$python -m pipelines.corpus --out "$out/corpus"
$python -m pipelines.prepare --out "$out/data" --domains.docstrings "$out/corpus/train/docstrings.jsonl" \
    --domains.api_prose "$out/corpus/train/api_prose.jsonl" --domains.python "$out/corpus/train/python.jsonl" \
    --vocab_size 512 --tokenizer_megabytes 4 --seq_len 8
$python -m pipelines.pretrain --out "$out/run" --data "$out/data" --model configs/bench/million.json --steps 512 \
    --batch_size 2048 --micro_batch_size 2048 --recorder.windows '{"late": [0, 512]}'
$python -m curate.embed --run "$out/run" --window late --estimator dvemb --dvemb.width 8
cat "$out"/run/embeddings/*/index-*/manifest.json
