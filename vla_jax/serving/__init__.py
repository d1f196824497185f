"""Policies as a service: wire format, sessions with memory, server, client, and export."""
