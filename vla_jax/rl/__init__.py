"""Reinforcement learning: returns and losses, exploration, rollouts, and training loops."""
