"""What makes a step fast and says how fast it is: compilation, 8 bits, clocks, floating-point operations."""
