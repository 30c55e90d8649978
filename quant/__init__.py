"""Low-bit weights: schemes, the methods that choose codes, builds on disk, and dequantizing matmuls."""
