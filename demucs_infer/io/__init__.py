"""What works on audio files: reading, writing, formats, places, tracks and batches of them."""
