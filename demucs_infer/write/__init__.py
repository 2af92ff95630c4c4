"""From samples to files: formats, encoders, videos, players, and the stems of a track."""
