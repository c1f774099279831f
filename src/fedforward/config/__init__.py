"""The configuration of a run and of a site: sections, loading, errors. No PyTorch."""
