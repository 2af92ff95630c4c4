"""From files to samples: decoding, conversion, and the tags of a track."""
