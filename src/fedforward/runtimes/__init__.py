"""Runtimes carry messages between a server and its clients, and hold no federation logic."""
