"""Expert kernels that read the weights where they lie: in the slots of a bank.

``FusedExperts`` computes with kernels of this project, ``ReferenceExperts`` with
transformers' own, bit for bit. Triton is imported only when a CUDA bank asks for it.
"""

from runtime.kernels.fused import FusedExperts
from runtime.kernels.gating import Gating, gating_of
from runtime.kernels.reference import ReferenceExperts

__all__ = ["FusedExperts", "Gating", "ReferenceExperts", "gating_of"]
