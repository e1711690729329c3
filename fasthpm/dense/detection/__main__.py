"""`python -m fasthpm.dense.detection`, as launchers start it."""

from fasthpm.cli import run_rank
from fasthpm.dense.detection.command import main

if __name__ == "__main__":
    run_rank(main)
