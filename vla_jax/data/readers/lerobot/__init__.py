"""LeRobot data sets: reader and writer."""
