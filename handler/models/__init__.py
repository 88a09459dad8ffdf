"""Models that transformers does not have: small ones of our own, and pipelines of the diffusers library."""
