"""Backbones: images and an instruction to tokens `[..., N, D]`."""
