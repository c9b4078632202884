"""KL-flow (Logit-KL Flow Matching, arXiv 2411.16821): a non-autoregressive denoiser on the simplex of tokens."""
