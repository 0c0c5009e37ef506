"""One streamed pass over a layer's rows: all that error reduction needs of the data.

With A = [Q(X) | 1] the quantized inputs and E = X − Q(X) their error against full precision, three
matrices are enough, whatever the number of images (docs/math.md): G = AᵀA, C = AᵀE, P = EᵀE.
H = Aᵀ[X | 1] of the paper's form is G + [C | 0]; C itself is the better conditioned of the two.
Of C and P the solves use CWᵀ and the trace of WPWᵀ alone; a layer with fewer outputs than inputs
sums these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erq.quant import AffineParams
from erq_kernels import reference
from erq_kernels.formats import code_offset


class Gram:
    """Sums over rows, in fp64.

    Args:
        columns: D, the layer's input channels; matrices are [D + 1, D + 1], [D + 1, D], [D, D].
        weight: fp32 [N, D], the layer's in full precision. With N < D, CWᵀ [D + 1, N] is summed
            for C and the trace [1, 1] for P: a quarter of the work at fc2.

    Attributes:
        g, c, p: the matrices above. rows: how many rows they sum over.
    """

    def __init__(self, columns: int, device: torch.device, weight: Tensor | None = None) -> None:
        def zeros(a: int, b: int) -> Tensor:
            return torch.zeros(a, b, dtype=torch.float64, device=device)

        self._weight = weight if weight is not None and len(weight) < columns else None
        outputs = columns if self._weight is None else len(self._weight)
        self.columns = columns
        self.rows = 0
        self.g = zeros(columns + 1, columns + 1)
        self.c = zeros(columns + 1, outputs)
        self.p = zeros(columns, columns) if self._weight is None else zeros(1, 1)

    def add(self, x: Tensor, upstream: Tensor | None, params: AffineParams | None) -> None:
        """Add a chunk of rows.

        Args:
            x: float [..., D], the layer's input in the network that feeds it.
            upstream: float [..., D], the same rows in the full-precision network; None: x itself.
            params: the activation quantizer, or None if the layer sees x unquantized.
        """
        rows = x.reshape(-1, self.columns).float()
        full = rows if upstream is None else upstream.reshape(-1, self.columns).float()
        if params is None:
            a = rows
            self._add_g(rows.t() @ rows, rows.sum(dim=0), len(rows), 1.0)
        else:
            codes = reference.quantize(rows, params.inv_scale, params.zero_point, params.bits)
            shift = params.zero_point - code_offset(params.bits)
            self._add_codes(codes, shift, params.scale)
            a = (codes.float() - shift) * params.scale  # a 0-d int32 would not widen int8
        self.rows += len(rows)
        if params is None and upstream is None:
            return
        error = full - a
        if self._weight is not None:
            error = error @ self._weight.t()
            # Rounded like all that is summed here, so that ranks can send it in fp32.
            self.p += error.square().sum(dtype=torch.float64).float()
        else:
            self.p += error.t() @ error
        self.c[:-1] += a.t() @ error
        self.c[-1] += error.sum(dim=0)

    def cross(self, weight: Tensor) -> Tensor:
        """CWᵀ, fp64 [D + 1, N], of the layer's weight W, fp64 [N, D]."""
        return self.c if self._weight is not None else self.c @ weight.t()

    def energy(self, weight: Tensor) -> float:
        """Trace of WPWᵀ: ‖EWᵀ‖² of the layer's weight W, fp64 [N, D]."""
        if self._weight is not None:
            return float(self.p)
        w = weight.float()
        return float(((w @ self.p.float()) * w).sum(dtype=torch.float64))

    def _add_codes(self, codes: Tensor, shift: Tensor, scale: Tensor) -> None:
        # On codes q the products are exact integers, and int8 GEMMs are the fastest there are;
        # (q − z)ᵀ(q − z) follows from qᵀq and the column sums. 2**17 rows of 8-bit codes stay
        # inside int32, and sums of whole numbers in fp64 are exact.
        z = shift.double()
        for part in codes.split(1 << 16):
            columns, n = part.t().contiguous(), len(part)
            product = reference.int_matmul(columns, columns).double()
            total = columns.sum(dim=1, dtype=torch.int64)
            half = z * total - n * z * z / 2
            product.sub_(half[:, None]).sub_(half)
            self._add_g(product, total - n * z, n, float(scale))

    def _add_g(self, product: Tensor, total: Tensor, rows: int, scale: float) -> None:
        self.g[:-1, :-1] += product.double().mul_(scale * scale)
        self.g[-1, :-1] += total.double() * scale
        self.g[:-1, -1] += total.double() * scale
        self.g[-1, -1] += rows


class OutputError:
    """‖Y − A Ŵᵀ‖² / ‖Y‖² of a layer's output Y = [X | 1] Wᵀ, for any weight Ŵ in its place.

    With δ = W − Ŵ the error is δGδᵀ + 2 δCWᵀ + WPWᵀ; all but δ is known beforehand, and with δ = W
    it is ‖Y‖². A report, not part of any solve: products in fp32.

    Args:
        gram: statistics of the layer. full: fp64 [N, D + 1], full-precision weight, bias last.
        cross: fp64 [D + 1, N], `gram.cross` of it.
    """

    def __init__(self, gram: Gram, full: Tensor, cross: Tensor) -> None:
        self._full = full
        self._g = gram.g.float()
        self._cross = 2 * cross.t().float()
        self._base = gram.energy(full[:, :-1])
        total = self._base + self._change(full)
        self._total = max(total, torch.finfo(torch.float32).tiny)

    def _change(self, delta: Tensor) -> float:
        d = delta.float()
        return float((torch.addmm(self._cross, d, self._g) * d).sum(dtype=torch.float64))

    def of(self, weight: Tensor) -> float:
        """Relative squared error with `weight`, fp64 [N, D + 1], in use."""
        change = 0.0 if weight is self._full else self._change(self._full - weight)
        return max(self._base + change, 0.0) / self._total
