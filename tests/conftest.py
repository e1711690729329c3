"""Settings that every test process and whatever it starts share."""

import os

# Idle OpenMP threads that spin would take the cores from the tests that run beside them. Set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
