"""Memory tasks on the table: something is shown, time passes, then the robot must act on it."""
