"""Locations of files (local paths, stores, the web), the HTTP client, and temporary files."""
