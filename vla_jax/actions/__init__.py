"""Actions: bins, frames of reference, grippers, execution of chunks."""
