"""Images → calibrated quantizers: the simulated modules, how their ranges are found, folding."""
