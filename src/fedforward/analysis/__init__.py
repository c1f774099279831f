"""What a model and data tell of a run before it runs: curvature, noise, heterogeneity, rates."""
