"""Conversion of any raw data set to LeRobot v3.0, in parts that are written independently."""
