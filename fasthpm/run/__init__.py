"""A run's life: its state, what is saved and read, what happens to updates that are not finite, who watches."""
