"""Params from samples: the percentile search that keeps the clipping range of least squared error.

For each percentile p the range is [quantile(x, 1 − p), quantile(x, p)]; the p whose quantizer has
the smallest mean squared error wins, row by row, all rows and percentiles at once. Source:
method.md of RepQ-ViT's and ERQ's calibration (`init_quantization_scale`); derivation in
docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from erq.quant.functional import fake_quantize
from erq.quant.params import AffineParams, DualAffineParams, LogParams, check_bits

A = TypeVar("A")
B = TypeVar("B")

_FINE = (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
_OFFICIAL = (0.999, 0.9999, 0.99999)
ACTIVATION_PERCENTILES = {"fine": _FINE, "attention": _FINE, "official": _OFFICIAL}
"""What `QuantConfig.ranges` names; four bits want to clip more than was published."""
NORM_PERCENTILES = {"fine": _FINE, "attention": _OFFICIAL, "official": _OFFICIAL}
"""The same behind LayerNorms, whose few tokens that stand out later layers look for."""
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)

# A range narrower than this share of its largest magnitude is a constant to a b-bit quantizer: its
# zero point would outgrow what fp32 adds exactly.
_CONSTANT = 1e-4
# Elements of one slice while errors are summed: its temporaries stay in a core's cache.
_SLICE = 1 << 18
# Elements of k or v, and scores, at most that candidates for attention are compared on.
_OPERAND = 1 << 19
_SCORES = 1 << 18
# A single row longer than this has its tails found among those that a sample says may be in them.
_SAMPLED = 1 << 17
_SAMPLE_STEP = 101
# A whole tensor's candidates are compared on every s-th element, the largest s here that leaves
# this many: primes that divide no usual number of channels, so that all channels take part.
_ERROR_STEPS = (1, 11, 23, 47, 101)
_ERROR_SAMPLE = 1 << 18


def tail_quantiles(rows: Tensor, percentiles: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Upper and lower quantiles of each row, by linear interpolation as torch.quantile defines
    them.

    Args:
        rows: fp32 [R, n].
        percentiles: each in (0.5, 1].

    Returns:
        hi, lo: fp32 [P, R], the quantiles at p and at 1 − p. Only the tails are sorted.
    """
    n = rows.shape[1]
    depth = [(1.0 - p) * (n - 1) for p in percentiles]  # distance from the end, in elements
    k = min(n, int(max(depth)) + 2)

    def at(tail: Tensor) -> Tensor:
        out = []
        for d in depth:
            i = int(d)
            j = min(i + 1, k - 1)
            out.append(torch.lerp(tail[:, i], tail[:, j], d - i))
        return torch.stack(out)

    return at(_largest(rows, k)), at(-_largest(-rows, k))


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest of each row [R, n], descending."""
    n = rows.shape[1]
    if len(rows) == 1 and n > _SAMPLED and 8 * k < n:
        row = rows[0]
        sample = row[::_SAMPLE_STEP]
        # Half as many again as the sample should have above, and some: then a rerun is rare.
        expected = min(len(sample), 3 * k // (2 * _SAMPLE_STEP) + 50)
        threshold = torch.topk(sample, expected).values[-1]
        tail = row[row >= threshold]
        if k <= len(tail):
            return torch.topk(tail, k).values[None]
    return torch.topk(rows, k, dim=1).values


def _affine_from_range(lo: Tensor, hi: Tensor, bits: int, centered_int8: bool) -> AffineParams:
    """Asymmetric params of [lo, hi] per row; ranges that no code could use are mended.

    A constant range is widened to contain 0. With `centered_int8` so is a range whose
    code − zero_point would not fit int8 (a row far from 0), and 8 bits become symmetric.
    """
    top = 2**bits - 1
    magnitude = torch.maximum(lo.abs(), hi.abs())
    if centered_int8 and bits == 8:
        scale = torch.maximum(hi / 127, -lo / 128)
        zero_point = torch.full_like(scale, 128.0)
    else:
        constant = (hi - lo) <= _CONSTANT * magnitude
        lo = torch.where(constant, lo.clamp(max=0), lo)
        hi = torch.where(constant, hi.clamp(min=0), hi)
        scale = (hi - lo) / top
        zero_point = (-lo / scale).round()
        if centered_int8:
            far = (zero_point > 128) | (zero_point < top - 127)
            lo, hi = torch.where(far, lo.clamp(max=0), lo), torch.where(far, hi.clamp(min=0), hi)
            scale = (hi - lo) / top
            zero_point = (-lo / scale).round()
    dead = ~(scale > torch.finfo(torch.float32).tiny * 1e4)
    if bool(dead.any()):
        # All zero: any scale is exact; a neighbour's keeps per-channel folding well conditioned.
        alive = scale[~dead]
        scale = scale.masked_fill(dead, float(alive.median()) if alive.numel() else 1.0)
        fallback = float(zero_point[~dead].median()) if alive.numel() else 0.0
        zero_point = zero_point.masked_fill(dead, fallback)
    return AffineParams(scale, zero_point.to(torch.int32), bits)


def _error_sample(row: Tensor) -> Tensor:
    """The elements of a whole tensor, flat, that candidate ranges are compared on."""
    step = max(s for s in _ERROR_STEPS if s == 1 or s * _ERROR_SAMPLE <= row.numel())
    return row[::step].contiguous()


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """fake_quantize of fp32 values, for the inner loops of calibration: in place and in floats.

    Same arithmetic as `quantize`, whose codes are whole numbers that fp32 holds exactly.
    """
    zero = zero_point.float()
    codes = (x * scale.reciprocal()).round_().add_(zero).clamp_(0.0, float(2**bits - 1))
    return codes.sub_(zero).mul_(scale)


def _squared_error(rows: Tensor, params: AffineParams) -> Tensor:
    """Sum of squared quantization errors per row, fp64 [R]."""
    step = max(1, _SLICE // rows.shape[0])
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    scale, zero = params.scale[:, None], params.zero_point[:, None]
    for start in range(0, rows.shape[1], step):
        x = rows[:, start : start + step]
        y = _rounded(x, scale, zero, params.bits).sub_(x)
        total += y.square_().sum(dim=1, dtype=torch.float64)
    return total


def fit_rows(
    rows: Tensor, bits: int, percentiles: tuple[float, ...], centered_int8: bool = False
) -> AffineParams:
    """Affine params of least squared error for each row.

    Args:
        rows: fp32 [R, n], n >= 1.
        bits: 2..8.
        percentiles: candidates, tried in this order; the first of equals wins.
        centered_int8: hold code − zero_point within int8, as weight kernels need.

    Returns:
        AffineParams with scale and zero_point [R].
    """
    check_bits(bits)
    rows = rows.detach().float()
    hi, lo = tail_quantiles(rows, percentiles)
    if len(rows) == 1:
        rows = _error_sample(rows[0])[None]
    best = _affine_from_range(lo[0], hi[0], bits, centered_int8)
    error = _squared_error(rows, best)
    scale, zero_point = best.scale.clone(), best.zero_point.clone()
    for p in range(1, len(percentiles)):
        candidate = _affine_from_range(lo[p], hi[p], bits, centered_int8)
        candidate_error = _squared_error(rows, candidate)
        better = candidate_error < error
        error = torch.where(better, candidate_error, error)
        scale = torch.where(better, candidate.scale, scale)
        zero_point = torch.where(better, candidate.zero_point, zero_point)
    return AffineParams(scale, zero_point, bits)


def fit_tensor(
    x: Tensor, bits: int, percentiles: tuple[float, ...] = ACTIVATION_PERCENTILES["fine"]
) -> AffineParams:
    """Affine params (scale and zero point 0-d) for a whole activation tensor of any shape."""
    params = fit_rows(x.reshape(1, -1), bits, percentiles)
    return AffineParams(params.scale[0], params.zero_point[0], bits)


def fit_channels(
    x: Tensor, bits: int, percentiles: tuple[float, ...] = ACTIVATION_PERCENTILES["fine"]
) -> AffineParams:
    """Affine params [C] for an activation [..., C], one pair for each channel of the last dim."""
    rows = x.reshape(-1, x.shape[-1]).t().contiguous()
    return fit_rows(rows, bits, percentiles)


def fit_weight(weight: Tensor, bits: int) -> AffineParams:
    """Affine params [N] for the rows of a weight [N, K]; code − zero_point fits int8."""
    return fit_rows(weight, bits, WEIGHT_PERCENTILES, centered_int8=True)


def outlier_columns(weight: Tensor) -> Tensor:
    """The input channels that hold most rows' extreme weights: DUQ's outlier columns.

    A row hits the columns above its 99th percentile of positive or below its 1st percentile of
    negative entries; the N // 20 columns with most hits are chosen, among equals the one hit by the
    earlier row, then the lower index.

    Args:
        weight: fp32 [N, K].

    Returns:
        int64 [S], sorted, S = min(N // 20, columns hit at all, K − 1); empty if N < 20.
    """
    w = weight.detach().float()

    def threshold(sign: float) -> Tensor:
        # 99th percentile of the positive entries of sign·w, per row: at most the hundredth part of
        # a row stands above it.
        x = (sign * w).masked_fill(sign * w <= 0, float("-inf"))
        count = (x > 0).sum(dim=1)
        ordered = x.topk(min(w.shape[1], w.shape[1] // 100 + 2), dim=1).values
        depth = 0.01 * (count - 1).clamp(min=0).double()
        i = depth.long()
        j = torch.minimum(i + 1, (count - 1).clamp(min=0))
        upper = ordered.gather(1, i[:, None])[:, 0].double()
        lower = ordered.gather(1, j[:, None])[:, 0].double()
        value = upper + (depth - i) * (lower - upper)
        # A row of one sign has no threshold on the other side, hence no hit there.
        return torch.where(count > 0, value, torch.full_like(value, float("inf")))

    hit = (w > threshold(1.0)[:, None]) | (-w > threshold(-1.0)[:, None])
    rows = weight.shape[0]
    count = hit.sum(dim=0)
    index = torch.arange(rows, device=w.device)[:, None].expand_as(hit)
    first = torch.where(hit, index, rows).amin(dim=0)
    size = min(rows // 20, int((count > 0).sum()), weight.shape[1] - 1)
    order = torch.sort(count * (rows + 1) - first, descending=True, stable=True).indices
    return order[:size].sort().values


def fit_dual_weight(
    weight: Tensor, bits: int, columns: Tensor | None = None
) -> AffineParams | DualAffineParams:
    """Dual params for a weight [N, K]: one scale pair per row for the outlier columns, one for the
    rest.

    Args:
        columns: int64 [S] sorted, or None to choose them (`outlier_columns`).

    Returns:
        DualAffineParams, or plain AffineParams where no outlier column exists (N < 20).
    """
    columns = outlier_columns(weight) if columns is None else columns
    if not len(columns):
        return fit_weight(weight, bits)
    rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    rest[columns] = False
    return DualAffineParams(
        fit_weight(weight[:, columns], bits), fit_weight(weight[:, rest], bits), columns
    )


def fit_softmax(
    p: Tensor, bits: int, percentiles: tuple[float, ...] = ACTIVATION_PERCENTILES["fine"]
) -> LogParams:
    """Log-√2 params of least squared error for softmax outputs of any shape, in [0, 1].

    Both meanings of the last code are tried: exactly 0, which long sequences with many small
    probabilities need, or one more level, which short ones use better.
    """
    check_bits(bits)
    flat = p.detach().float().reshape(-1)
    scales = _softmax_scales(flat, percentiles)
    last = 2**bits - 1
    errors = torch.zeros(len(scales), 2, dtype=torch.float64, device=flat.device)
    for x in _error_sample(flat).split(_SLICE):
        exponent = torch.log2(x)
        for i, scale in enumerate(scales):
            code = ((exponent - torch.log2(scale)) * -2.0).round_().clamp_(0, last)
            squared = (torch.exp2(code * -0.5).mul_(scale) - x).square_()
            is_last = code == last
            errors[i, 1] += squared.sum(dtype=torch.float64)
            errors[i, 0] += torch.where(is_last, x * x, squared).sum(dtype=torch.float64)
    best = int(errors.argmin())
    return LogParams(scales[best // 2], bits, zero_last=best % 2 == 0)


def fit_scores(
    q: Tensor,
    k: Tensor,
    bits: int,
    percentiles: tuple[float, ...],
    temperature: float,
    rounds: int = 2,
) -> tuple[AffineParams, AffineParams, float]:
    """Affine params (0-d) of q and k by what the softmax of their product loses, and that loss.

    A few tokens with large k may decide where all others look: clipping them is a small squared
    error of k and a large one of the attention. The candidates are those of `fit_tensor` and the
    whole range; the pair of least KL divergence of the softmax wins, one operand at a time.

    Args:
        q, k: fp32 [B, H, T, D]. temperature: factor of the scores. rounds: of q, then k.

    Returns:
        Params of q and of k, and the KL divergence of the softmax, summed over a sample of rows.
    """
    check_bits(bits)
    some = some_entries(k)
    queries, keys = some_queries(q[some].float(), k.shape[2]), k[some].float().transpose(-2, -1)
    log_p = ((queries @ keys) * temperature).log_softmax(-1)
    p = log_p.exp()

    def divergence(a: Tensor, b: Tensor) -> float:
        estimate = ((a @ b) * temperature).log_softmax(-1)
        return float((p * (log_p - estimate)).sum(dtype=torch.float64))

    whole = (*percentiles, 1.0)
    of_q = [(c, _affine(queries, c)) for c in _candidates(q, bits, whole)]
    of_k = [(c, _affine(keys, c)) for c in _candidates(k, bits, whole)]
    return _best_pair(of_q, of_k, keys, divergence, rounds)


def fit_values(
    p: Tensor, v: Tensor, bits: int, percentiles: tuple[float, ...], rounds: int = 2
) -> tuple[LogParams, AffineParams]:
    """Params (0-d) of softmax outputs and of v by the squared error of their product.

    The rows that attend to a single token have the few large probabilities: clipping them is a
    small squared error of p, and a large one of what attention gives there. The candidates are
    those of `fit_softmax` and `fit_tensor` and the whole ranges.

    Args:
        p: fp32 [B, H, T, T]. v: fp32 [B, H, T, D]. rounds: of p, then v.
    """
    check_bits(bits)
    some = some_entries(v)
    rows, values = some_queries(p[some].float(), p.shape[3]), v[some].float()
    target = rows @ values

    def error(a: Tensor, b: Tensor) -> float:
        return float((a @ b).sub_(target).square_().sum(dtype=torch.float64))

    whole = (*percentiles, 1.0)
    scales = _softmax_scales(p.detach().float(), whole)
    candidates = [LogParams(s, bits, zero_last=z) for s in scales for z in (True, False)]
    of_p = [(c, fake_quantize(rows, c)) for c in candidates]
    of_v = [(c, _affine(values, c)) for c in _candidates(v, bits, whole)]
    return _best_pair(of_p, of_v, values, error, rounds)[:2]


def _best_pair(
    of_a: list[tuple[A, Tensor]],
    of_b: list[tuple[B, Tensor]],
    b: Tensor,
    loss: Callable[[Tensor, Tensor], float],
    rounds: int,
) -> tuple[A, B, float]:
    """Of candidates, each with what it rounds its operand to, those of least loss, and that loss.

    One operand is chosen at a time, a first, beside b as it is in float.
    """
    for _ in range(rounds):
        best_a, a = min(of_a, key=lambda c: loss(c[1], b))
        best_b, b = min(of_b, key=lambda c: loss(a, c[1]))
    return best_a, best_b, loss(a, b)


def some_entries(x: Tensor) -> Tensor:
    """Indices of entries of the batch of x [B, H, T, D], so many that few elements are left to
    compare candidates on; drawn, as a regular step could meet the same window of every image."""
    count = max(1, _OPERAND * len(x) // x.numel())
    if count >= len(x):
        return torch.arange(len(x), device=x.device)
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(x.device)


def some_queries(x: Tensor, keys: int) -> Tensor:
    """Every n-th query of x [B, H, T, …], so many that few scores are left to compare on."""
    scores = x.shape[0] * x.shape[1] * x.shape[2] * keys
    return x[:, :, :: -(-scores // _SCORES)]


def _softmax_scales(p: Tensor, percentiles: tuple[float, ...]) -> Tensor:
    """Scales of log quantizers of fp32 softmax outputs of any shape, one for every percentile."""
    return tail_quantiles(p.reshape(1, -1), percentiles)[0][:, 0].clamp(min=1e-6)


def _affine(x: Tensor, params: AffineParams) -> Tensor:
    return _rounded(x, params.scale, params.zero_point, params.bits)


def _candidates(x: Tensor, bits: int, percentiles: tuple[float, ...]) -> list[AffineParams]:
    """Affine params of a whole tensor for every percentile."""
    hi, lo = tail_quantiles(x.detach().float().reshape(1, -1), percentiles)
    tensors = (_affine_from_range(lo[i], hi[i], bits, False) for i in range(len(percentiles)))
    return [AffineParams(c.scale[0], c.zero_point[0], bits) for c in tensors]
