"""Server, client and ledger: the same objects in simulation and deployment."""
