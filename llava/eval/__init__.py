"""Benchmarks: ask a model the questions of a benchmark, score the answers, compare runs.

`python -m llava.eval {list,answer,score,report}` is the face; `scripts/v1_5/eval/*.sh` drive it on every visible GPU.
A benchmark is one small file in `tasks`, its arithmetic one in `metrics`; one loop (`runner`) asks them all.
"""
