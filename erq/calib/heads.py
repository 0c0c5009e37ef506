"""Another basis for the heads of an attention, in which few bits hold q, k, v and their sum better.

Adding one vector to all k of a head changes no softmax; q and k may be rotated together; v may be
shifted, rotated and scaled if proj takes it back. All of it goes into weights and biases: the
network's output stays, and inference costs nothing more. A rotation spreads what single channels
hold over all of a head, and the ranges of its channels become alike; a Hadamard matrix spreads
most evenly. A large key that all channels hold alike it gathers in one: q and
k are rotated only where the softmax then loses less. Source: docs/math.md, "Heads";
docs/accuracy.md has what it is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erq.calib.simulate import SimLinear, SimScores
from erq.models.attention import Attention
from erq.quant.fit import ACTIVATION_PERCENTILES, fit_scores


@dataclass(frozen=True)
class HeadStatistics:
    """What the basis follows from, per head.

    Args:
        k_mean, v_mean: fp32 [H, D], means of k and of v.
        v_size: fp32 [H], > 0, root mean square of v about its mean.
        turns_scores: whether the softmax loses less with q and k rotated.
    """

    k_mean: Tensor
    v_mean: Tensor
    v_size: Tensor
    turns_scores: bool

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, bits: int | None, ranges: str, temperature: float
    ) -> HeadStatistics:
        """Statistics of q, k and v, fp32 [B, H, T, D] each.

        Args:
            bits: of q and k; None if they keep their basis. ranges: as in the config.
        """
        mean = v.mean(dim=(0, 2))
        size = (v - mean[:, None]).square().mean(dim=(0, 2, 3)).sqrt()
        k_mean = k.mean(dim=(0, 2))
        turns = False
        if bits is not None:
            k, rotation = k - k_mean[:, None], spreading_rotation(k.shape[-1], k.device).float()
            percentiles = ACTIVATION_PERCENTILES[ranges]
            plain, turned = (
                fit_scores(a, b, bits, percentiles, temperature)[2]
                for a, b in ((q, k), (q @ rotation, k @ rotation))
            )
            turns = turned < plain
        return cls(k_mean, mean, torch.where(size > 0, size, 1.0), turns)


@dataclass(frozen=True)
class ValueBasis:
    """The change of basis of v, hence of what enters proj: y' = (y − mean) R / size, per head."""

    statistics: HeadStatistics

    def apply(self, y: Tensor) -> Tensor:
        """The rotated network's value of [..., H·D]."""
        mean, size = self.statistics.v_mean, self.statistics.v_size
        rotation = spreading_rotation(mean.shape[1], y.device).to(y.dtype)
        parts = y.unflatten(-1, mean.shape) - mean
        rotated: Tensor = parts @ rotation / size[:, None]
        return rotated.flatten(-2)


def spreading_rotation(n: int, device: torch.device) -> Tensor:
    """Orthogonal fp64 [n, n] with entries of similar size: Hadamard for powers of two, for other n
    its product with the cosine transform of the odd factor."""
    power = n & -n
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    odd = n // power
    grid = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(math.pi / odd * (grid[:, None] + 0.5) * grid) * math.sqrt(2 / odd)
    cosine[:, 0] = math.sqrt(1 / odd)
    return torch.kron(hadamard / math.sqrt(power), cosine).to(device)


def rotates_scores(attention: Attention) -> bool:
    """Whether q and k can have another basis, and quantizers that gain by it."""
    plain = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    return plain and isinstance(attention.qk, SimScores) and isinstance(attention.qkv, SimLinear)


def rotates_values(attention: Attention) -> bool:
    """Whether v can have another basis, and a quantizer that gains by it."""
    layers = isinstance(attention.qkv, SimLinear) and isinstance(attention.proj, SimLinear)
    return layers and isinstance(attention.norm, nn.Identity)


def rotated_attention(sim: nn.Module, layer: str) -> Attention | None:
    """The attention whose q, k and v the layer named `layer` makes, if another basis serves it."""
    attention = sim.get_submodule(layer.rpartition(".")[0])
    if not isinstance(attention, Attention) or attention.qkv is not sim.get_submodule(layer):
        return None
    return attention if rotates_scores(attention) or rotates_values(attention) else None


@torch.no_grad()
def rotate_heads(attention: Attention, statistics: HeadStatistics) -> ValueBasis | None:
    """Put an attention into the basis, in place; its output stays.

    Args:
        attention: with simulated layers whose weights are still in full precision.

    Returns:
        What became of proj's input, or None where v kept its basis.
    """
    qkv, proj = attention.qkv, attention.proj
    heads, width = attention.num_heads, attention.head_dim
    assert isinstance(qkv, SimLinear)
    weight = qkv.weight.double()
    bias = weight.new_zeros(len(weight)) if qkv.bias is None else qkv.bias.double()
    rows = torch.cat([weight, bias[:, None]], dim=1).reshape(3, heads, width, -1)
    rotation = spreading_rotation(width, weight.device)
    basis = None
    if rotates_scores(attention):
        rows[1, :, :, -1] -= statistics.k_mean
        if statistics.turns_scores:
            rows[:2] = rotation.t() @ rows[:2]
    if rotates_values(attention):
        assert isinstance(proj, SimLinear)
        basis = ValueBasis(statistics)
        mean, size = statistics.v_mean.double(), statistics.v_size.double()[:, None, None]
        rows[2, :, :, -1] -= mean
        rows[2] = rotation.t() @ rows[2] / size
        columns = proj.weight.double().unflatten(1, (heads, width))
        shift = torch.einsum("nhd,hd->n", columns, mean)
        rotated = torch.einsum("nhd,de,hxy->nhe", columns, rotation, size)
        proj.set_weight(rotated.flatten(1), shift if proj.bias is None else proj.bias + shift)
    rows = rows.flatten(0, 2)
    qkv.set_weight(rows[:, :-1], rows[:, -1])
    return basis
