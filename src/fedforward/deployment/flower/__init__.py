"""The adapter to Flower: it carries messages, identities and TLS, and knows nothing of rounds."""
