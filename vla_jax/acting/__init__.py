"""Agents (raw observation in, robot action out) and rollouts."""
