"""The real world: models, gates, GPUs.

Knows torch and transformers, and imports them only when a model is touched, so that the
command line and `simctl doctor` work without them. Knows nothing of simulated time.
"""
