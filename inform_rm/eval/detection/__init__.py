"""Overoptimization seen in latents: CSI, MOP, outlier scores, early stopping."""
