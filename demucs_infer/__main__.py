"""Run the command line: `python -m demucs_infer`."""

from .separate import command

if __name__ == "__main__":
    command()
