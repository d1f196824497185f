"""What is measured, against whom: python -m train.benchmark."""
