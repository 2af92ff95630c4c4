"""The folders of tracks, as {folder} in a file name shows them."""
