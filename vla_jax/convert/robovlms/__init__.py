"""RoboVLMs' checkpoints and acting conventions."""
