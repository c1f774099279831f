"""What travels and what is stored, with its binary form. No PyTorch."""
