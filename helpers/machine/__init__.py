"""The machine: its hardware, whether it is ready, other Pythons on it, and worker processes."""
