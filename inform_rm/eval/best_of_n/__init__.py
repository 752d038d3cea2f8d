"""Best-of-n against a proxy: how far the gold reward follows (Gao et al. 2023)."""
