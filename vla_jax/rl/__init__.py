"""Learning from reward: equations written for one episode, and what acts while it learns."""
