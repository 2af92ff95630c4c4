"""Many tracks: find them, separate each, and report the results."""
