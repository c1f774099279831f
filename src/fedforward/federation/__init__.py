"""Server, client, their messages and the ledger: the same objects in simulation and deployment."""
