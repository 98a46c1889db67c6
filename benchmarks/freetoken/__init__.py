"""This project's runtime beside FreeToken 0.1.2, on one machine and in one run.

``python -m benchmarks.freetoken`` gives both the same random checkpoint, the same number of slots
and the same forced tokens, each in processes of its own, and writes one JSON list. Routing is the
model's own in both: the same weights and the same tokens make the same choices, but for what
rounding changes where two gates are level. How many experts each one missed is written beside
its times, so that it can be seen. ``--render`` makes a table and a figure of the list. Only the
processes that measure know torch.
"""
