"""The laboratory: any module compiled from a cell, kernels timed and priced, and machine code looked into."""
