"""Commands that look at the machine rather than at a run."""
