"""RLDS data sets as tensorflow-datasets writes them, read without TensorFlow."""
