"""The server's and the client's side of a round, and the ledger."""
