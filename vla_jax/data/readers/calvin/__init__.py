"""CALVIN data sets: one file per frame, segments with an instruction."""
