"""`python -m fasthpm.dense.segmentation`, as launchers start it."""

from fasthpm.cli import run_rank
from fasthpm.dense.segmentation.command import main

if __name__ == "__main__":
    run_rank(main)
