"""Measured comparisons: peers, proof, benchmark. In the repository, neither in the wheel nor in the zip."""
