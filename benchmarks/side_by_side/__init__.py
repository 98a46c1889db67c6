"""Expert offloading side by side: this project beside what a user would do today.

``python -m benchmarks.side_by_side`` runs every system on the same weights and the same forced
tokens, each in a process of its own, and writes one JSON file; ``--render`` makes a table of it.
Only the worker processes know torch.
"""
