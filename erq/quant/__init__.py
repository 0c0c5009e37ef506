"""What a quantizer is: its values (`params`), the maps they define (`functional`), their `fit`."""

from erq.quant.functional import dequantize, fake_quantize, quantize
from erq.quant.params import AffineParams, DualAffineParams, LogParams, Params, WeightParams

__all__ = [
    "AffineParams",
    "DualAffineParams",
    "LogParams",
    "Params",
    "WeightParams",
    "dequantize",
    "fake_quantize",
    "quantize",
]
