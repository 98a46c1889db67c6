"""What happened: model specs, routing traces, their files, generators and statistics.

Knows numpy, pandas and pyarrow; knows nothing of policies, clocks, simulators or GPUs.
"""

from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import MemoryTrace, TokenSequence, Trace

__all__ = ["InputError", "MemoryTrace", "ModelSpec", "TokenSequence", "Trace"]
