"""Calibrated quantizers → error-reduced weights: Gram matrices, ridge solves, rounding."""
