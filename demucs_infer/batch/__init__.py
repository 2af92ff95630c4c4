"""Many tracks: find them, separate each, and report what became of it."""
