"""What an action is: bins, frames of reference, grippers, execution of chunks."""
