"""What runs have led to, for people: one page of a run or of several. Imports no PyTorch."""
