"""Non-autoregressive text from a denoiser on the simplex: KL-flow's samplers, what they are asked, and their film."""
