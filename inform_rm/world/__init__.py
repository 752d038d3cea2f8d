"""A generated world whose reward is known exactly, and the demo on it. The top floor: only `cli` imports it."""
