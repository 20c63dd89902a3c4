"""What a layer's experts take on a device: which lie there, how many of them tokens hit, what they compute and read.

E experts, k of them a token, F width of one, D embed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtp.config import ModelConfig
from jaxtp.ops.experts import Products as Form
from jaxtp.ops.experts import choose_products
from jaxtp.planner.work import Split


@dataclass(frozen=True)
class Share:
    """A device's part of a layer's experts: `count` of them, each cut to `width`."""

    count: int
    width: int

    def kernels(self, embed: int) -> tuple[int, int]:
        """Weights of gate and up, and of down."""
        return 2 * self.count * self.width * embed, self.count * self.width * embed


def share(config: ModelConfig, split: Split) -> Share:
    """What each device has of them. Raises ValueError where they cannot be cut so."""
    experts = config.experts
    assert experts
    if split.rules(config).axis("expert_mlp") is None:  # whole ones over ep and tp, and cp
        return Share(experts.count // (split.ep * split.ways), experts.width)
    return Share(experts.count // split.ep, experts.width // split.ways)


def hit(config: ModelConfig, tokens: float) -> float:
    """How many of all experts so many tokens go to, where a router loads them alike: E (1 - (1 - k/E)^tokens)."""
    experts = config.experts
    assert experts
    return experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)


def travels(config: ModelConfig, ep: int) -> float:
    """To how many of the other ranks of ep a token has to go, where a router loads all experts alike: each has e = E/ep of
    them, and a token has none of those in C(E - e, k) of C(E, k) cases.
    """
    experts = config.experts
    assert experts
    elsewhere = math.comb(experts.count - experts.count // ep, experts.per_token)
    return (ep - 1) * (1 - elsewhere / math.comb(experts.count, experts.per_token))


@dataclass(frozen=True)
class Products:
    """A layer's products with experts on each device. pairs: of tokens and experts, that are computed. read: weights. width: of
    an expert there.
    """

    form: Form
    pairs: float
    read: float
    width: int


def products(config: ModelConfig, split: Split, tokens: float) -> Products:
    """Where each group of rows has so many tokens: those of all of ep are on every device that has experts.

    As `ops.experts` chooses: the experts of each pair, all of them, or blocks of pairs, loaded alike.
    """
    experts, mine = config.experts, share(config, split)
    assert experts
    all_tokens, each = tokens * split.ep, 3 * mine.width * config.hidden_size
    part = mine.count / experts.count
    pairs = all_tokens * experts.per_token
    form = choose_products(platform="gpu", tokens=round(all_tokens), pairs=round(pairs), experts=experts.count)
    if form == "every":
        return Products(form, all_tokens * mine.count, mine.count * each, mine.width)
    if form == "chosen":  # pairs that are elsewhere look at one expert, all at the same
        return Products(form, pairs, min(mine.count, part * pairs + (part < 1)) * each, mine.width)
    return Products(form, part * pairs, part * hit(config, all_tokens) * each, mine.width)
