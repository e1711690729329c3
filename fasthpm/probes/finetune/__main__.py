"""`python -m fasthpm.probes.finetune`, as launchers start it."""

from fasthpm.cli import run_rank
from fasthpm.probes.finetune.command import main

if __name__ == "__main__":
    run_rank(main)
