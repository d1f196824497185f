"""From a robot's observation to the action that is sent; rollouts."""
