"""What fits, what it costs and what is best: pure arithmetic over a model, GPUs and a way to split the work. Touches no device.

B batch, T tokens of a row, D embed, N query heads, K KV heads, H head_dim, F mlp, V vocabulary, L layers.
"""

from jaxtp.planner.cluster import Cluster, cluster
from jaxtp.planner.cost import Machine
from jaxtp.planner.prediction import Plan
from jaxtp.planner.report import Plans
from jaxtp.planner.search import plan
from jaxtp.planner.work import Generation, Split, Training

__all__ = ["Cluster", "Generation", "Machine", "Plan", "Plans", "Split", "Training", "cluster", "plan"]
