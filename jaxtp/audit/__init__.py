"""What a compiled program really does: its collectives by kind, mesh axis and bytes, its memory, and what it writes."""

from jaxtp.audit.program import Collective, Report, audit
from jaxtp.audit.targets import compile_decode, compile_prefill, compile_step, gpu_mesh

__all__ = ["Collective", "Report", "audit", "compile_decode", "compile_prefill", "compile_step", "gpu_mesh"]
