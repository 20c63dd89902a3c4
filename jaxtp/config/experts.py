"""Mixture of experts in a config: how many, how wide, how they are chosen, and in which layers they stand."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtp.checks import INT32, whole


@dataclass(frozen=True)
class Experts:
    """The experts of a sparse layer: of `count` MLPs of `width`, the `per_token` with the highest scores see a token.

    renormalize: the weights of those chosen add up to 1 (else they are what the softmax over all gives). shared: the width of
    an MLP beside them that sees every token, weighted by a sigmoid of its own; 0: there is none. dense: the layers that have an
    MLP all the same. balance: the coefficient of the load-balancing loss that the checkpoint was trained with.
    """

    count: int
    per_token: int
    width: int
    renormalize: bool = False
    shared: int = 0
    dense: tuple[int, ...] = ()
    balance: float = 0.001

    def __post_init__(self) -> None:
        whole("num_experts", self.count, least=1, most=INT32)
        whole("num_experts_per_tok", self.per_token, least=1, most=INT32)
        whole("moe_intermediate_size", self.width, least=1, most=INT32)
        whole("shared_expert_intermediate_size", self.shared, least=0, most=INT32)
        if self.per_token > self.count:
            raise ValueError(f"num_experts_per_tok={self.per_token} exceeds num_experts={self.count}")
        if not self.balance >= 0:
            raise ValueError(f"router_aux_loss_coef={self.balance} must be at least 0")


@dataclass(frozen=True)
class ExpertKeys:
    """How a family's config.json spells it. renormalize: True where the family always does; None: `norm_topk_prob` says.

    layers: whether `decoder_sparse_step` and `mlp_only_layers` choose the layers. shared: whether there is a shared expert.
    """

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    renormalize: bool | None = None
    layers: bool = True
    shared: bool = False
