"""Networks as pure functions: recurrent cells, scans over time, attention."""
