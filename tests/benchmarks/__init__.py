"""Speed and memory as ratios against a named peer: `python -m tests.benchmarks all|NAME`.

Every module here that does not begin with an underscore is a topic: a first docstring line that
says what it asks, and a function `run(rounds)` that returns comparisons. `ROUNDS` is how many
rounds a published figure takes.
"""
