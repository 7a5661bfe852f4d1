"""What a run will take, before anything is done.

    counts.py    what both count
    memory.py    peak memory of the stages
    time.py      their seconds

Their constants were measured: examples/benchmarks/README.md, scale.
"""
