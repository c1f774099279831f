"""The adapter to Flower: it carries letters, identities and TLS, and knows nothing of rounds."""
