"""Tests run beside each other: one thread each, before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
