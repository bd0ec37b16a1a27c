"""Inputs that once went wrong, or stand for a kind that did, with what is right."""

from tests.fuzz.outcome import ACCEPTED, REFUSED

BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)) for level in range(1, 30)
)
DEEP = b"a: " + b"[" * 10_000
DIGITS = b"9" * 5000


def refused(*inputs: bytes) -> tuple[tuple[bytes, str], ...]:
    return tuple((data, REFUSED) for data in inputs)


def accepted(*inputs: bytes) -> tuple[tuple[bytes, str], ...]:
    return tuple((data, ACCEPTED) for data in inputs)


YAML = (
    b"",
    b"- a",
    b"a: [",
    b"a: \xff",
    b"a: 1\na: 2",
    b"a: &b [*b]",
    b"a: *b",
    b"a: \x00",
    b"3: 4",
    DEEP,
    BOMB,
    b"a: " + DIGITS,
)
LINE = b'{"id": "s", "text": "the cat sat on the mat"}\n'
PLAN = b"""folder: p
data: d
target: t.jsonl
train: train {out} {steps}
stages: [{name: one, steps: 3}, {name: two, steps: 4}]
"""
DESCRIPTION = b"""out: r
streams: {web: {local: data/web}, code: {local: data/code, choose: 5000}}
dataset: {shuffle: true, shuffle_seed: 17, num_canonical_nodes: 1}
loader: {batch_size: 8, world_size: 2, workers: 4, resumed: [{step: 700}]}
steps: 2000
task: {model: {hf_config: config.json}}
optimizers: [{name: AdamW, arguments: {weight_decay: 0.1, betas: [0.9, 0.95]}}]
clip_norm: 1.0
lr: {peak: 1.0e-3, warmup_steps: 100, min_ratio: 0.1}
log: {file: log.csv}
checkpoints: {0: ckpt/0.pt, 1950: ckpt/1950.pt}
"""
SETTINGS = b"# curate.select\ntarget: t.jsonl\n"
SCHEDULE = b"""- start_sample: 0
  streams: [{local: data/a, choose: 3}]
- start_sample: 3
  streams: [{local: data/b, choose: 2}]
"""

CORPUS = {
    "documents": accepted(
        LINE,
        b"\xef\xbb\xbf" + LINE,
        b'{"prompt": "a", "completion": "b"}',
        b'{"tokens": [1, 2], "loss_mask": [0, 1], "id": 7}\r\n',
        b'{"text": "a", "score": NaN}',
        b'{"text": "\\ud83d\\ude00 \\u0000", "tokens": null}',
    )
    + refused(
        b"",
        b"\n",
        b"[]",
        b"{",
        b"\xff",
        b'{"text": null}',
        b'{"text": "a", "tokens": 3}',
        b'{"text": "a", "prompt": "b"}',
        b'{"text": "a", "text": "b"}',
        b'{"text": "\\ud83d1"}',
        b'{"id": "\\ud83d1", "text": "a"}',
        b'{"id": [1], "text": "a"}',
        b'{"text": "a", "n": ' + DIGITS + b"}",
        b'{"text": "a", "n": ' + b"[" * 100_000,
        b'{"tokens": [true]}',
        b'{"tokens": []}',
        b'{"tokens": [1.0]}',
        b'{"tokens": [1], "loss_mask": [0.5]}',
        b'{"tokens": [1, 2], "loss_mask": [1]}',
        b'{"input_ids": [1]}',
        LINE + b"\n" + LINE,
        b'{"prompt": "", "completion": "b"}',
        b'{"tokens": [99999999999]}',
    ),
    "target": accepted(LINE + b'{"text": "and the dog sat on the log, and the cat"}\n')
    + refused(LINE, LINE * 30, b'{"tokens": [299999]}\n' + LINE, b'{"text": "a"}\n{"text": "b"}\n'),
    "plan": accepted(PLAN, b"\xef\xbb\xbf" + PLAN)
    + refused(
        *YAML,
        PLAN + b'train_first: "train \'"\n',
        PLAN + b'train_first: " "\n',
        PLAN + b"train_first: train {steps!q}\n",
        PLAN + b"train_first: train {steps:zz}\n",
        PLAN + b'train_first: "a \\0"\n',
        PLAN + b"train_first: train {steps:99999999999d}\n",
        PLAN + b"selection: {mixture: anneal}\n",
        PLAN + b"selection: {mixture: {schedule: [anneal]}}\n",
        PLAN + b"selection: {shards: {drop_fraction: .1}}\n",
        PLAN.replace(b"one", b"two"),
        PLAN.replace(b"3}", b"true}"),
        PLAN.replace(b"3}", b"0}"),
        PLAN.replace(b"one", b"../one"),
        PLAN + b"checkpoint: ../c.pt\n",
        PLAN.replace(b"data: d", b"data: s3://b/d"),
        PLAN + BOMB,
        PLAN + PLAN,
    ),
    "description": accepted(DESCRIPTION, DESCRIPTION.replace(b"clip_norm: 1.0", b"clip_norm: .inf"))
    + refused(
        *YAML,
        DESCRIPTION + b"tolerance: 0\n",
        DESCRIPTION + b"tolerance: .inf\n",
        DESCRIPTION + b"micro_batch_size: 0\n",
        DESCRIPTION.replace(b"1.0e-3", b".nan"),
        DESCRIPTION.replace(b"2000", b"1e999"),
        DESCRIPTION.replace(b"web:", b"c++:"),
        DESCRIPTION.replace(b"ckpt/0.pt", b"gs://b/0.pt"),
        DESCRIPTION + b"steps: 2000\n",
    ),
    "settings": accepted(
        SETTINGS,
        SETTINGS + b"mixture: {max_epochs: 1e3}\n",
        SETTINGS + b"filter: {held_out: a.jsonl}\nsource: {earlier_runs: ~/r}\n",
        b"# curate.embed\nwindow: late\nadjoint: {anchor_files: a.jsonl}\ntolerance: 1e-3\n",
        b"# curate.verify\ntarget: t.jsonl\n",
    )
    + refused(
        *YAML,
        SETTINGS + b"mixture: {prior_strength: .inf}\n",
        b"# curate.embed\ntolerance: -1\n",
        b"# curate.embed\nwindow: late\ntarget_batch_size: 0\n",
        SETTINGS + b"mixture: {prior_strength: .nan}\n",
        b"# curate.embed\nwindow: late\nwindow_steps: 0\n",
        b"# curate.embed\nwindow_steps: 3\n",
        b"# curate.embed\nwindow: late\ncandidates: d\n",
        SETTINGS + b"window: late\n",
        SETTINGS + b"method: dsir\nretain: r.jsonl\n",
        SETTINGS + b"method: [a]\n",
        SETTINGS + b"seed: true\n",
        SETTINGS + b"mixture: {max_epochs: 3}\nmixture: {max_epochs: 4}\n",
        SETTINGS + b"unknown:\n" + b"\n".join(b"  " + line for line in BOMB.split(b"\n")),
        b"target: s3://b/t.jsonl\n",
        SETTINGS + b"mixture: 3\n",
        SETTINGS + b"seed: 1e30\n",
        b"# pipelines.prepare\nout: s3://b/o\ndomains: x\n",
    ),
    "streams": accepted(b"- {local: data/a, choose: 3}\n- {local: data/b, repeat: 0.01}\n", SCHEDULE)
    + refused(*YAML, b"- local: [a]\n", b"- {choose: 3}\n", b"[]", b"- 3"),
    "schedule": accepted(SCHEDULE)
    + refused(
        *YAML[2:8],
        SCHEDULE.replace(b"choose: 3", b"choose: 0"),
        SCHEDULE.replace(b"start_sample: 3", b"start_sample: 4"),
        SCHEDULE.replace(b"choose: 3", b"choose: .inf"),
        SCHEDULE.replace(b"- start_sample: 0", b"- start_sample: -1"),
        SCHEDULE.replace(b"choose: 3}", b"3: 4}"),
        SCHEDULE.replace(b"choose: 3", b"chose: 3"),
    ),
}
