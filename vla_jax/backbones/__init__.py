"""Images and an instruction -> tokens `[..., N, D]`."""
