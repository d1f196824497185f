"""Policies as a service: wire format, sessions with memory, server and client."""
