"""Another basis for the heads of an attention, in which few bits hold q, k, v and their sum better.

Adding one vector to all k of a head changes no softmax; q and k may be rotated together; v may be
shifted and rotated if proj takes it back. All of it goes into weights and biases: the network's
output stays, and inference costs nothing more. Centring saves the range that channels far from 0
cost, and moves what was 0, a value of every quantizer; a rotation spreads what single channels hold
over all of a head, and gathers what all of them hold alike in one. Which of it pays differs between
networks and layers, so what is lost is measured and the best of four bases taken. Source:
docs/math.md, "Heads"; docs/accuracy.md has what it is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erq.calib.simulate import SimLinear, SimScores, SimValues
from erq.config import FLOAT_BITS
from erq.models.attention import Attention
from erq.quant import fake_quantize
from erq.quant.fit import fit_scores, fit_tensor, fit_values, some_entries, some_queries


@dataclass(frozen=True)
class Basis:
    """x' = (x − mean) R per head, R `spreading_rotation` or nothing.

    Args:
        mean: fp32 [H, D]. rotated: whether R is the rotation.
    """

    mean: Tensor
    rotated: bool

    @property
    def rotation(self) -> Tensor:
        """R, orthogonal fp64 [D, D]."""
        size, device = self.mean.shape[1], self.mean.device
        if self.rotated:
            return spreading_rotation(size, device)
        return torch.eye(size, dtype=torch.float64, device=device)

    def of_heads(self, x: Tensor) -> Tensor:
        """x' of x [B, H, T, D]."""
        return self.turn(x - self.mean[:, None])

    def turn(self, x: Tensor) -> Tensor:
        """x R of x [..., D]."""
        return x @ self.rotation.to(x.dtype) if self.rotated else x

    def apply(self, y: Tensor) -> Tensor:
        """x' of the heads joined, [..., H·D]: what becomes of proj's input in v's basis."""
        return self.turn(y.unflatten(-1, self.mean.shape) - self.mean).flatten(-2)


@dataclass(frozen=True)
class HeadBases:
    """What is chosen for an attention.

    Args:
        scores: the basis of k; q gets its rotation. values: of v. None: as they are.
    """

    scores: Basis | None
    values: Basis | None


def choose_bases(
    attention: Attention,
    operands: tuple[Tensor, ...],
    bits: Mapping[str, int],
    percentiles: tuple[float, ...],
) -> HeadBases:
    """The bases in which an attention loses least.

    Args:
        operands: q, k, softmax and v; fp32 [B, H, T, D], the softmax [B, H, T, T].
        bits: `a_bits` of the sites `qk`, `av` and `proj`.
        percentiles: candidates for the ranges.
    """
    q, k, p, v = operands
    scores = values = None
    if rotates_scores(attention):
        assert isinstance(attention.qk, SimScores)
        scores = choose_scores(q, k, bits["qk"], percentiles, attention.qk.temperature)
    if rotates_values(attention):
        assert isinstance(attention.proj, SimLinear)
        v_bits = bits["av"] if isinstance(attention.av, SimValues) else FLOAT_BITS
        values = choose_values(p, v, attention.proj.weight, v_bits, bits["proj"], percentiles)
    return HeadBases(scores, values)


def _bases(x: Tensor) -> list[Basis]:
    """The candidates for x [B, H, T, D], the one that changes nothing first."""
    mean = x.mean(dim=(0, 2))
    return [Basis(m, turns) for turns in (False, True) for m in (torch.zeros_like(mean), mean)]


def choose_scores(
    q: Tensor, k: Tensor, bits: int, percentiles: tuple[float, ...], temperature: float
) -> Basis:
    """The basis of q and k whose quantized softmax loses least, by KL divergence.

    Args:
        q, k: fp32 [B, H, T, D]. temperature: factor of the scores.
    """
    candidates, some = _bases(k), some_entries(k)
    q, k = q[some], k[some]

    def loss(basis: Basis) -> float:
        turned = basis.turn(q), basis.of_heads(k)
        return fit_scores(*turned, bits, percentiles, temperature, rounds=1)[2]

    return min(candidates, key=loss)


def choose_values(
    p: Tensor,
    v: Tensor,
    weight: Tensor,
    bits: int,
    out_bits: int,
    percentiles: tuple[float, ...],
) -> Basis:
    """The basis of v with the least squared error of what proj gives.

    Args:
        p: fp32 [B, H, T, T], the softmax. v: fp32 [B, H, T, D]. weight: fp32 [N, H·D], proj's.
        bits, out_bits: of p and v and of what enters proj; 16: float.
    """
    candidates, some = _bases(v), some_entries(v)
    p, v = p[some], v[some]
    rows = rounded_p = some_queries(p, p.shape[3])
    if bits != FLOAT_BITS:
        rounded_p = fake_quantize(rows, fit_values(p, v, bits, percentiles, rounds=1)[0])
    turned_weight = weight.unflatten(1, (v.shape[1], -1))

    def joined(p: Tensor, v: Tensor) -> Tensor:
        return (p @ v).transpose(1, 2).flatten(2)

    def loss(basis: Basis) -> float:
        moved = basis.of_heads(v)
        target, rounded = joined(rows, moved), moved
        if bits != FLOAT_BITS:
            rounded = fake_quantize(moved, fit_tensor(moved, bits, percentiles))
        out = joined(rounded_p, rounded)
        if out_bits != FLOAT_BITS:
            out = fake_quantize(out, fit_tensor(out, out_bits, percentiles))
        error = (out - target) @ basis.turn(turned_weight).flatten(1).t()
        return float(error.square().sum(dtype=torch.float64))

    return min(candidates, key=loss)


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
def rotate_heads(attention: Attention, bases: HeadBases) -> None:
    """Put an attention into its bases, in place; its output stays.

    Args:
        attention: with simulated layers whose weights are still in full precision.
    """
    qkv, proj = attention.qkv, attention.proj
    heads, width = attention.num_heads, attention.head_dim
    assert isinstance(qkv, SimLinear)
    weight = qkv.weight.double()
    bias = weight.new_zeros(len(weight)) if qkv.bias is None else qkv.bias.double()
    rows = torch.cat([weight, bias[:, None]], dim=1).reshape(3, heads, width, -1)
    if bases.scores is not None:
        rows[1, :, :, -1] -= bases.scores.mean
        rows[:2] = bases.scores.rotation.t() @ rows[:2]
    if bases.values is not None:
        assert isinstance(proj, SimLinear)
        mean, rotation = bases.values.mean.double(), bases.values.rotation
        rows[2, :, :, -1] -= mean
        rows[2] = rotation.t() @ rows[2]
        columns = proj.weight.double().unflatten(1, (heads, width))
        shift = torch.einsum("nhd,hd->n", columns, mean)
        turned = (columns @ rotation).flatten(1)
        proj.set_weight(turned, shift if proj.bias is None else proj.bias + shift)
    rows = rows.flatten(0, 2)
    qkv.set_weight(rows[:, :-1], rows[:, -1])
