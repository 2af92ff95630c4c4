"""What differs between the supported PyTorch releases: at present, nothing.

The module exists because programs written for `demucs` may import it.
"""
