"""Commands that are of no run: this machine, the recipes."""
