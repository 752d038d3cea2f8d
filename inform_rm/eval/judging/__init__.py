"""A language model behind an endpoint as judge: which of two responses is better, and which exploits a reward."""
