"""The engine: plan windows, run models on them, and overlap-add the results."""
